"""ADE20K scene parsing."""

from pathlib import Path

from eval.datasets.folders import (
    VOID,
    Dataset,
    Layout,
    OtherForm,
    base_folder,
    existing_folder,
    indexed,
    names_in,
    split_folder,
)


# ADE20K (Zhou et al., CVPR 2017), objectInfo150.txt of the scene parsing challenge: the first of each class's synonyms
ADE20K = names_in(
    "wall, building, sky, floor, tree, ceiling, road, bed, windowpane, grass, cabinet, sidewalk, person, earth, door, "
    "table, mountain, plant, curtain, chair, car, water, painting, sofa, shelf, house, sea, mirror, rug, field, "
    "armchair, seat, fence, desk, rock, wardrobe, lamp, bathtub, railing, cushion, base, box, column, signboard, "
    "chest of drawers, counter, sand, sink, skyscraper, fireplace, refrigerator, grandstand, path, stairs, runway, "
    "case, pool table, pillow, screen door, stairway, river, bridge, bookcase, blind, coffee table, toilet, flower, "
    "book, hill, bench, countertop, stove, palm, kitchen island, computer, swivel chair, boat, bar, arcade machine, "
    "hovel, bus, towel, light, truck, tower, chandelier, awning, streetlight, booth, television, airplane, dirt "
    "track, apparel, pole, land, bannister, escalator, ottoman, bottle, buffet, poster, stage, van, ship, fountain, "
    "conveyer belt, canopy, washer, plaything, swimming pool, stool, barrel, basket, waterfall, tent, bag, minibike, "
    "cradle, oven, ball, food, step, tank, trade name, microwave, pot, animal, bicycle, lake, dishwasher, screen, "
    "blanket, sculpture, hood, sconce, vase, traffic light, tray, ashcan, fan, pier, crt screen, plate, monitor, "
    "bulletin board, shower, radiator, glass, clock, flag"
)
ADE20K_LABELS = {0: VOID, **{id: id - 1 for id in range(1, 151)}}
OTHERS = (OtherForm("reduced: 255 for other, and all labels one less", {*range(150), 255}, {*range(151)}),)


def ade20k(root: Path, split: str) -> Layout:
    """ADE20K scene parsing, 150 classes; 0 (other) is VOID. The folder of `ADEChallengeData2016`, or this itself:

    images/training/ADE_train_N.jpg, images/validation/ADE_val_N.jpg
    annotations/training/ADE_train_N.png, annotations/validation/ADE_val_N.png (0..150)

    A sample without the folders of the splits is read too.
    """
    base = base_folder(root, "ADEChallengeData2016", inside="images")
    folder = {"train": "training", "val": "validation"}.get(split, split)
    images, masks = split_folder(base / "images", folder), split_folder(existing_folder(base, "annotations"), folder)
    files = {path.stem: (path, masks / f"{path.stem}.png") for path in images.glob(f"ADE_{split}_*.jpg")}
    return Layout(ADE20K, files, indexed(ADE20K_LABELS), OTHERS)


DATASET = Dataset(
    ade20k,
    background_words=("background",),
    phrases="""
crt screen: computer screen
monitor: computer monitor, display
""",
)
