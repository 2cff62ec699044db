"""Class names of the datasets, as one would write them in a prompt, and maps of the ids that annotation files hold.

A map goes from the id in a file to the index in the tuple of classes, or to VOID. What a map lacks is no id of the
dataset.
"""

VOID = 255  # in a mask: nothing is known there


def _names(text: str) -> tuple[str, ...]:
    return tuple(name.strip() for name in text.split(","))


# Pascal VOC 2012, devkit section 2: ids 0..20, and 255 along outlines
VOC = _names(
    "background, aeroplane, bicycle, bird, boat, bottle, bus, car, cat, chair, cow, dining table, dog, horse, "
    "motorbike, person, potted plant, sheep, sofa, train, tv monitor"
)
VOC_LABELS = {**{i: i for i in range(21)}, 255: VOID}

# Pascal Context (Mottaghi et al., CVPR 2014): the 59 frequent classes in alphabetical order, by their ids among the
# 459 of its labels.txt. Every other id is background.
CONTEXT_IDS = {
    2: "aeroplane", 9: "bag", 18: "bed", 19: "bedclothes", 22: "bench", 23: "bicycle", 25: "bird", 31: "boat",
    33: "book", 34: "bottle", 44: "building", 45: "bus", 46: "cabinet", 59: "car", 65: "cat", 68: "ceiling",
    72: "chair", 80: "cloth", 85: "computer", 98: "cow", 104: "cup", 105: "curtain", 113: "dog", 115: "door",
    144: "fence", 158: "floor", 159: "flower", 162: "food", 187: "grass", 189: "ground", 207: "horse",
    220: "keyboard", 232: "light", 258: "motorbike", 259: "mountain", 260: "mouse", 284: "person", 295: "plate",
    296: "platform", 308: "potted plant", 324: "road", 326: "rock", 347: "sheep", 349: "shelves", 354: "sidewalk",
    355: "sign", 360: "sky", 366: "snow", 368: "sofa", 397: "table", 415: "track", 416: "train", 420: "tree",
    424: "truck", 427: "tv monitor", 440: "wall", 445: "water", 454: "window", 458: "wood",
}  # fmt: skip
CONTEXT = ("background", *CONTEXT_IDS.values())
CONTEXT_LABELS = {**dict.fromkeys(range(460), 0), **{id: index for index, id in enumerate(CONTEXT_IDS, start=1)}}
CONTEXT_PNG_LABELS = {**{i: i for i in range(60)}, 255: VOID}  # the converted form of mmsegmentation

# COCO-Stuff (Caesar, Uijlings and Ferrari, CVPR 2018), labels.txt: ids 1..182, in its files one less, 255 unlabelled.
# "-" stands for the 11 things that COCO never annotated.
_COCO = _names(
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
STUFF_27 = _names(
    "electronic, appliance, food, furniture, indoor, kitchen, accessory, animal, outdoor, person, sports, vehicle, "
    "ceiling, floor, food-stuff, furniture-stuff, raw material, textile, wall, window, building, ground, plant, sky, "
    "solid, structural, water"
)


def _coarse(id: int, name: str) -> str:
    if id <= 91:
        return next(group for group, last in _THING_GROUPS if id <= last)
    return next(group for group, names in _STUFF_GROUPS.items() if name in _names(names))


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

# Cityscapes (Cordts et al., CVPR 2016), cityscapesScripts labels.py: the 19 classes that are evaluated, by label id
_CITYSCAPES_IDS = {
    7: "road", 8: "sidewalk", 11: "building", 12: "wall", 13: "fence", 17: "pole", 19: "traffic light",
    20: "traffic sign", 21: "vegetation", 22: "terrain", 23: "sky", 24: "person", 25: "rider", 26: "car", 27: "truck",
    28: "bus", 31: "train", 32: "motorcycle", 33: "bicycle",
}  # fmt: skip
CITYSCAPES = tuple(_CITYSCAPES_IDS.values())
CITYSCAPES_LABELS = {
    **dict.fromkeys(range(34), VOID),
    **{id: index for index, id in enumerate(_CITYSCAPES_IDS)},
}
CITYSCAPES_TRAIN_LABELS = {**{i: i for i in range(19)}, 255: VOID}

# ADE20K (Zhou et al., CVPR 2017), objectInfo150.txt of the scene parsing challenge: the first of each class's synonyms
ADE20K = _names(
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
