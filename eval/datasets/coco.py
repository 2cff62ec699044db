"""COCO-Object, and COCO-Stuff with 171 and with 27 classes."""

import json
from functools import partial
from pathlib import Path

from eval.common.files import expecting
from eval.datasets.folders import (
    VOID,
    Dataset,
    Layout,
    OtherForm,
    existing_file,
    existing_folder,
    indexed,
    names_in,
    packed_colours,
)


# COCO-Stuff (Caesar, Uijlings and Ferrari, CVPR 2018), labels.txt: ids 1..182, in its files one less, 255 unlabelled.
# "-" stands for the 11 things that COCO never annotated.
_COCO = names_in(
    "person, bicycle, car, motorcycle, airplane, bus, train, truck, boat, traffic light, fire hydrant, -, stop sign, "
    "parking meter, bench, bird, cat, dog, horse, sheep, cow, elephant, bear, zebra, giraffe, -, backpack, umbrella, "
    "-, -, handbag, tie, suitcase, frisbee, skis, snowboard, sports ball, kite, baseball bat, baseball glove, "
    "skateboard, surfboard, tennis racket, bottle, -, wine glass, cup, fork, knife, spoon, bowl, banana, apple, "
    "sandwich, orange, broccoli, carrot, hot dog, pizza, donut, cake, chair, couch, potted plant, bed, -, dining "
    "table, -, -, toilet, -, tv, laptop, mouse, remote, keyboard, cell phone, microwave, oven, toaster, sink, "
    "refrigerator, -, book, clock, vase, scissors, teddy bear, hair drier, toothbrush, -, banner, blanket, branch, "
    "bridge, building, bush, cabinet, cage, cardboard, carpet, ceiling, tile ceiling, cloth, clothes, clouds, "
    "counter, cupboard, curtain, desk, dirt, door, fence, marble floor, floor, stone floor, tile floor, wood floor, "
    "flower, fog, food, fruit, furniture, grass, gravel, ground, hill, house, leaves, light, mat, metal, mirror, "
    "moss, mountain, mud, napkin, net, paper, pavement, pillow, plant, plastic, platform, playing field, railing, "
    "railroad, river, road, rock, roof, rug, salad, sand, sea, shelf, sky, skyscraper, snow, solid, stairs, stone, "
    "straw, structural, table, tent, textile, towel, tree, vegetable, brick wall, concrete wall, wall, panel wall, "
    "stone wall, tile wall, wood wall, water, water drops, window blind, window, wood"
)
_COCO_IDS = {id: name for id, name in enumerate(_COCO, start=1) if name != "-"}
STUFF_171 = tuple(_COCO_IDS.values())
STUFF_171_LABELS = {**{id - 1: index for index, id in enumerate(_COCO_IDS)}, 255: VOID}
STUFF_OTHERS = tuple(
    OtherForm(name, ids, STUFF_171_LABELS.keys())
    for name, ids in (
        ("the ids of labels.txt, which are one more", {0, *_COCO_IDS}),
        ("train ids, 0 to 170", {*range(171), 255}),
        ("stuff alone, 92 to 183", {0, *range(92, 184)}),
    )
)

# The 27 supercategories of COCO-Stuff in the order of IIC, PiCIE and STEGO: of things by the last id, of stuff by name
_THING_GROUPS = (
    ("person", 1), ("vehicle", 9), ("outdoor", 15), ("animal", 25), ("accessory", 33), ("sports", 43), ("kitchen", 51),
    ("food", 61), ("furniture", 71), ("electronic", 77), ("appliance", 83), ("indoor", 91),
)  # fmt: skip
_STUFF_GROUPS = {
    "ceiling": "ceiling, tile ceiling",
    "floor": "carpet, marble floor, floor, stone floor, tile floor, wood floor",
    "food-stuff": "food, fruit, salad, vegetable",
    "furniture-stuff": "cabinet, counter, cupboard, desk, door, furniture, light, mirror, shelf, stairs, table",
    "raw material": "cardboard, metal, paper, plastic",
    "textile": "banner, blanket, cloth, clothes, curtain, mat, napkin, pillow, rug, textile, towel",
    "wall": "brick wall, concrete wall, wall, panel wall, stone wall, tile wall, wood wall",
    "window": "window blind, window",
    "building": "bridge, building, house, roof, skyscraper, tent",
    "ground": "dirt, gravel, ground, mud, pavement, platform, playing field, railroad, road, sand, snow",
    "plant": "branch, bush, flower, grass, leaves, moss, plant, straw, tree",
    "sky": "clouds, sky",
    "solid": "hill, mountain, rock, solid, stone, wood",
    "structural": "cage, fence, net, railing, structural",
    "water": "fog, river, sea, water, water drops",
}
STUFF_27 = names_in(
    "electronic, appliance, food, furniture, indoor, kitchen, accessory, animal, outdoor, person, sports, vehicle, "
    "ceiling, floor, food-stuff, furniture-stuff, raw material, textile, wall, window, building, ground, plant, sky, "
    "solid, structural, water"
)


def _coarse(id: int, name: str) -> str:
    if id <= 91:
        return next(group for group, last in _THING_GROUPS if id <= last)
    return next(group for group, names in _STUFF_GROUPS.items() if name in names_in(names))


STUFF_27_LABELS = {**{id - 1: STUFF_27.index(_coarse(id, name)) for id, name in _COCO_IDS.items()}, 255: VOID}

# COCO panoptic (Kirillov et al., CVPR 2019), panoptic_coco_categories.json: 80 things, 36 stuff, 17 merged stuff
_THINGS = {id: name for id, name in _COCO_IDS.items() if id <= 91}
_PANOPTIC_STUFF = (
    92, 93, 95, 100, 107, 109, 112, 118, 119, 122, 125, 128, 130, 133, 138, 141, 144, 145, 147, 148, 149, 151, 154,
    155, 156, 159, 161, 166, 168, 171, 175, 176, 177, 178, 180, 181, *range(184, 201),
)  # fmt: skip
COCO_OBJECT = ("background", *_THINGS.values())
COCO_OBJECT_LABELS = {
    **dict.fromkeys(_PANOPTIC_STUFF, 0),
    **{id: index for index, id in enumerate(_THINGS, start=1)},
}


def coco_object(root: Path, split: str) -> Layout:
    """COCO-Object, 81 classes: background, and the 80 things of COCO 2017 panoptic in order of category id.

    annotations/panoptic_SPLIT2017.json
    annotations/panoptic_SPLIT2017/ID.png (segment id = R + 256 G + 65536 B, 0 = unlabelled)
    SPLIT2017/ID.jpg, or images/SPLIT2017/ID.jpg; the panoptic parts may lie at the top too

    Stuff and unlabelled pixels are background and nothing is VOID, as GroupViT made the benchmark. A crowd segment
    (iscrowd) names its category, so its pixels count as that class, as in detectron2's semantic masks; only the
    evaluation of instances ignores it.
    pycocotools' COCO cannot index this JSON: a panoptic annotation has no "id".
    """
    index = existing_file(root, f"annotations/panoptic_{split}2017.json", f"panoptic_{split}2017.json")
    masks = existing_folder(root, f"annotations/panoptic_{split}2017", f"panoptic_{split}2017")
    images = existing_folder(root, f"{split}2017", f"images/{split}2017")
    with expecting("COCO's panoptic annotations", index, "take the JSON of the release"):
        content = json.loads(index.read_text())
        names = {image["id"]: image["file_name"] for image in content["images"]}
        annotations = {Path(names[a["image_id"]]).stem: a for a in content["annotations"]}
        files = {id: (images / names[a["image_id"]], masks / a["file_name"]) for id, a in annotations.items()}
        segments = {id: a["segments_info"] for id, a in annotations.items()}
        if unknown := {s["category_id"] for each in segments.values() for s in each} - {*_THINGS, *_PANOPTIC_STUFF}:
            raise ValueError(f"categories {sorted(unknown)[:5]}, which COCO does not have (contiguous ids?)")
    return Layout(COCO_OBJECT, files, partial(_panoptic, segments))


def coco_stuff(root: Path, split: str, coarse: bool = False) -> Layout:
    """COCO-Stuff 164k, 171 classes or the 27 supercategories; 255 (unlabelled) is VOID.

    stuffthingmaps/SPLIT2017/ID.png, or annotations/SPLIT2017/ID.png (0..181: the id of labels.txt less one)
    SPLIT2017/ID.jpg, or images/SPLIT2017/ID.jpg
    """
    masks = existing_folder(root, f"stuffthingmaps/{split}2017", f"annotations/{split}2017")
    images = existing_folder(root, f"{split}2017", f"images/{split}2017")
    files = {image.stem: (image, masks / f"{image.stem}.png") for image in images.glob("*.jpg")}
    if coarse:
        return Layout(STUFF_27, files, indexed(STUFF_27_LABELS), STUFF_OTHERS)
    return Layout(STUFF_171, files, indexed(STUFF_171_LABELS), STUFF_OTHERS)


def _panoptic(segments, id, path):
    ids = packed_colours(path)
    known = COCO_OBJECT_LABELS
    return ids, {0: 0, **{s["id"]: known[s["category_id"]] for s in segments[id] if s["category_id"] in known}}


OBJECT_DATASET = Dataset(coco_object, background_words=("background",))
STUFF_171_DATASET = Dataset(coco_stuff, append_missing=True)
STUFF_27_DATASET = Dataset(
    partial(coco_stuff, coarse=True),
    append_missing=True,
    merged={"food-stuff": "food", "furniture-stuff": "furniture"},
    phrases="""
electronic: electronics, tv, television, monitor, screen, laptop, computer, keyboard, mouse, remote, cell phone, phone
appliance: microwave, oven, stove, toaster, sink, refrigerator, fridge
sports: sport, sport equipment, sports equipment, frisbee, skis, snowboard, ball, kite, bat, baseball bat, baseball glove
sports: skateboard, surfboard, racket, tennis racket
vehicle: car, truck, bus, train, boat, bicycle, bike, motorcycle, airplane, aeroplane, plane, van, taxi, ship
accessory: backpack, umbrella, handbag, purse, bag, tie, suitcase
outdoor: traffic light, fire hydrant, stop sign, parking meter, bench
indoor: book, clock, vase, scissors, teddy bear, hair drier, toothbrush
kitchen: kitchen stuff, kitchenware, utensil, bottle, cup, wine glass, fork, knife, spoon, bowl
food: banana, apple, sandwich, orange, broccoli, carrot, hot dog, pizza, donut, cake
food-stuff: fruit, vegetable, salad
furniture: chair, couch, sofa, potted plant, bed, dining table, toilet
furniture-stuff: cabinet, cupboard, counter, desk, door, light, mirror, shelf, stairs, table
raw material: cardboard, metal, paper, plastic
textile: cloth, curtain, towel, blanket, pillow, rug, napkin, mat, banner
floor: carpet
window: window blind, blinds
building: bridge, house, skyscraper, roof, tent
ground: road, street, sidewalk, pavement, sand, snow, dirt, platform, mud, gravel, earth, railroad, playing field
plant: tree, grass, bush, flower, leaves, branch, straw, moss
solid: rock, stone, wood, mountain, hill
structural: fence, railing, cage, net
water: sea, river, fog
""",
)
