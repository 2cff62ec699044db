"""Phrases: how prompts spell them, those of a caption, which class one names, and our own words for the classes.

A phrase names a class if it ends with the class's name or with an alias of it, in whole words, the longest first: the last
noun of an English compound is the thing, so "wine bottle" is a bottle, and neither "car seat" nor "carpet" is a car.
Singular and plural are one: see `forms`.
"""

import re
import unicodedata
from collections.abc import Mapping, Sequence

from eval.datasets.benchmarks import dataset_of


LONGEST = 4  # words in a phrase of a caption; more are a sentence, not a noun
NO_NOUN = re.compile(r"(the )?(background|foreground|top|bottom|left|right)( image)?|x? ?\d+")  # where and how many
AROUND = re.compile(r"^(?:(?:a|an|the|and|in|on|at|of|with|\d+) )+|(?: x ?\d+)+$")  # what is no part of the noun
BACKGROUND = "background"  # the class of this name is what no entity claims: it is never asked for

# A line: names of one thing, then after a colon what is one kind of it or loosely called so. The first name that a benchmark
# has as a class owns all other words of the line that are no classes themselves; of two owners of a word the first counts.
_WORDS = """
aeroplane, airplane: plane, aircraft, jet, jetliner, airliner, biplane, seaplane, glider
bicycle, bike: push bike, mountain bike, tricycle, tandem
motorbike, motorcycle: scooter, motor scooter, moped
minibike: motorbike, motorcycle, scooter, motor scooter, moped
bird: duck, goose, swan, gull, seagull, pigeon, eagle, hawk, owl, parrot, chicken, hen, rooster, penguin, sparrow, heron
boat: ship, sailboat, rowboat, motorboat, speedboat, canoe, kayak, yacht, ferry, dinghy, gondola, barge
bottle: flask
bus: coach, minibus, double decker, double-decker
car: automobile, auto, sedan, taxi, cab, suv, jeep, minivan, van, limousine, convertible
truck, lorry: pickup, pickup truck
cat: kitten, kitty, tomcat
dog: puppy, pup, hound, terrier, poodle, bulldog, sheepdog, retriever, dachshund
chair: armchair, swivel chair, highchair, high chair
cow: cattle, calf, bull, ox, oxen, heifer
horse: pony, foal, mare, stallion, colt
sheep: lamb, ewe
rider: cyclist, bicyclist, motorcyclist, biker
person, pedestrian: people, human, man, men, woman, women, child, children, kid, boy, girl, baby, infant, toddler, lady
person: rider, cyclist, bicyclist, motorcyclist, biker, skier, snowboarder, surfer, skateboarder, policeman, soldier, crowd
person: tennis player, baseball player, soccer player, police officer, bride, groom
dining table, diningtable: kitchen table, table
potted plant, pottedplant: houseplant, flowerpot, plant pot, planter
sofa, couch: loveseat, settee
train: locomotive, tram, streetcar, railcar, train car, railway car, freight car
tv monitor, tvmonitor, tv, television, television receiver, television set: monitor, computer monitor, screen
cell phone, cellphone, mobile phone: phone, smartphone, telephone
laptop: laptop computer, notebook computer
computer: desktop computer, pc, laptop
mouse: computer mouse
remote, remote control
refrigerator, fridge, freezer
microwave, microwave oven
oven: stove
stove: oven
washer, washing machine
sink: basin, washbasin
toilet: toilet bowl, lavatory
hair drier, hair dryer, hairdryer: blow dryer
teddy bear: stuffed bear, stuffed animal, plush toy
plaything, toy: doll
traffic light, traffic signal, stoplight, stop light
stop sign, stopsign
traffic sign: road sign, street sign, signpost, stop sign, sign
signboard, sign: signage
fire hydrant, hydrant
handbag: purse, bag
backpack, rucksack: knapsack
suitcase: luggage, baggage
frisbee, flying disc
skis, ski
sports ball: ball, soccer ball, football, basketball, tennis ball, baseball, volleyball
baseball glove: baseball mitt, catcher mitt
tennis racket, tennis racquet: racket, racquet
wine glass, wineglass: goblet
cup: mug, teacup
glass: drinking glass, wine glass
donut, doughnut
hot dog, hotdog
cake: cupcake
orange: tangerine, mandarin
vase: flower vase
book: magazine
animal: dog, cat, horse, cow, sheep, bird, elephant, giraffe, zebra, bear, deer, goat, creature
road: street, roadway, highway, asphalt, lane
sidewalk, pavement: footpath, walkway
building: house, skyscraper, edifice, apartment building, office building, tower
house: cottage
hovel: hut, shack, shed, barn
vegetation: greenery, foliage, shrubbery, tree, bush, plant, flower, shrub, hedge
palm, palm tree
tree: palm, palm tree
plant: flora, plant life, bush, shrub
bush, shrub
grass: lawn, grassland, turf
ground, earth: soil, dirt
terrain: ground, grass, lawn, soil, earth, dirt, sand
field: farmland, meadow
mountain: mount
hill: hillside
rock, stone, boulder
sky: cloud
sea, ocean
lake: pond
river: stream, creek
water: sea, ocean, lake, river, pond
path: trail
floor: flooring
stairs: staircase, stairway
railing, rail: handrail
bannister, banister, balustrade
railroad, railway: train track, railroad track, railway track, rail track
track: train track, railroad track, railway track
fence, fencing
curtain, drape, drapery
window blind, blind, blinds, window blinds
window, windowpane
cabinet: cupboard, kitchen cabinet
chest of drawers: dresser, bureau
wardrobe, closet
shelf, shelves: shelving
bookcase, bookshelf
lamp: table lamp, floor lamp, desk lamp
light, light source: light fixture, ceiling light
streetlight, street lamp, streetlamp, street light: lamp post, lamppost
painting: picture, photo, photograph
rug, carpet
cushion: throw pillow
blanket: quilt, duvet
bedclothes, bedding: bed linen, bedspread, blanket
apparel, clothes, clothing: garment
ashcan, trash can, garbage can, waste bin, dustbin
pier: dock, wharf, jetty
runway: tarmac, airstrip
case, display case, showcase
column, pillar
counter: countertop
bathtub, bath: tub
pool table, billiard table
swimming pool: pool
flag: banner
stage: podium
poster: placard
pole: post, utility pole, lamp post, lamppost
food: meal
"""


def clean(text: str) -> str:
    """A phrase as prompts spell it: lower case; letters, digits, and hyphens and apostrophes within words.

    That is what a CLIP tokenizer leaves whole, so the words of a phrase are found again in the prompt's words.
    """
    text = "".join(c for c in unicodedata.normalize("NFKC", text) if unicodedata.category(c) != "Cf")
    text = unicodedata.normalize("NFKC", text.lower()).replace("’", "'")
    words = re.sub(r"[^\w\s'-]|_", " ", text).split()
    return " ".join(stripped for word in words if (stripped := word.strip("'-")))


def caption_groups(caption: str) -> list[tuple[str, ...]]:
    """The things that a caption lists ("dog, (person, clothes)."), the phrases of each, as often as it lists them.

    A parenthesis is one thing, and so is one inside another, taken out of it. What stands beside a parenthesis without a
    comma belongs to it ("(animal) zebra"), but ")(" separates. Full stops, colons, semicolons and line breaks are commas; a
    missing ")" ends with the caption. Sentences, and words that say where or how many, are left out.
    """
    found, inner, depth, before = [], [[]], 0, ""
    for piece in re.findall(r"[(),]|[^(),\s][^(),]*", re.sub(r"[;:!?\n]|\.(?!\w)", ",", caption)):
        if piece == "(" and depth:
            inner.append([])
        elif piece == ")" and len(inner) > 1:
            found.append(inner.pop())
        elif (piece == "," and not depth) or (piece == "(" and before == ")"):
            found.append(inner.pop())
            inner.append([])
        elif piece not in "(),":
            inner[-1].append(_noun(piece))
        depth = max(0, depth + (piece == "(") - (piece == ")"))
        before = piece
    groups = [tuple(dict.fromkeys(filter(None, group))) for group in [*found, *inner]]
    return [group for group in groups if group]


def _noun(text: str) -> str:
    phrase = AROUND.sub("", clean(text))
    return "" if NO_NOUN.fullmatch(phrase) or len(phrase.split()) > LONGEST else phrase


def forms(word: str) -> list[str]:
    """A word, and what it may be the plural of: -s, -es after s x z ch sh o, -ies of -y, -ves of -f or -fe.

    Words in -ss, -us and -is stay as they are. Other plurals ("people") are aliases.
    """
    found = [word]
    if word.endswith("s") and not word.endswith(("ss", "us", "is")) and len(word) > 3:
        found.append(word[:-1])
        if word.endswith(("ses", "xes", "zes", "ches", "shes", "oes")):
            found.append(word[:-2])
        if word.endswith("ies"):
            found.append(word[:-3] + "y")
        if word.endswith("ves"):
            found += [word[:-3] + "f", word[:-3] + "fe"]
    return found


def class_names(classes: Sequence[str]) -> tuple[str, ...]:
    """The classes' names as prompts spell them; two of one name, or an empty one, raise ValueError."""
    names = tuple(map(clean, classes))
    if wrong := sorted({raw for raw, name in zip(classes, names, strict=True) if not name or names.count(name) > 1}):
        raise ValueError(f"Expected classes with a name each, spelled differently in lower case, but got {wrong}.")
    return names


def aliases_of(benchmark: str, classes: Sequence[str]) -> dict[str, str]:
    """Our words for a benchmark's classes: phrase -> class. No class's own name, singular or plural, is among the words."""
    index, names, found = name_index(classes, {}), class_names(classes), {}
    for line in (dataset_of(benchmark).phrases + _WORDS).strip().splitlines():
        owners = [index[key] for name in line.split(":")[0].split(",") if (key := tuple(clean(name).split())) in index]
        for word in map(clean, line.replace(":", ",").split(",")) if owners else ():
            *first, last = word.split()
            if not any((*first, form) in index for form in forms(last)):
                found.setdefault(word, names[owners[0]])
    return found


def name_index(classes: Sequence[str], aliases: Mapping[str, str]) -> dict[tuple[str, ...], int]:
    """The words of every name and alias -> label of its class, for `named`.

    Exact spellings come before singular forms, and a class's own name before aliases. An alias of no class raises ValueError.
    """
    labels = {name: label for label, name in enumerate(class_names(classes)) if name != BACKGROUND}
    if wrong := sorted({name for name in aliases.values() if clean(name) not in labels}):
        raise ValueError(f"Expected aliases of the classes {sorted(labels)}, but got some of {wrong}.")
    spelled = {**{clean(phrase): labels[clean(name)] for phrase, name in aliases.items()}, **labels}
    index = {tuple(phrase.split()): label for phrase, label in spelled.items() if phrase}
    for (*first, last), label in list(index.items()):
        for form in forms(last):
            index.setdefault((*first, form), label)
    return index


def named(phrase: str, index: Mapping[tuple[str, ...], int]) -> int | None:
    """Label of the class that a phrase names: its longest ending, in whole words, that is a name or an alias; or None."""
    words = clean(phrase).split()
    for start in range(len(words)):
        for form in forms(words[-1]):
            if (label := index.get((*words[start:-1], form))) is not None:
                return label
    return None
