"""Synthetic scenes with exact masks and captions: Fluent 3D sprites on procedural stuff, deterministic by seed.

A scene holds some objects (Pascal VOC names, some of two words) on one stuff ground: one to three that differ ("plain"),
four to six ("crowd"), or two or three of one kin ("lookalikes"). Its mask is exact because the scene is composed: a pixel
belongs to the last sprite whose alpha is above one half there, else to the ground.

    python -m eval.scenes --split validation --count 32 --out scenes.png
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
from PIL import Image


SPRITES = Path(__file__).parent / "sprites"
OBJECTS = tuple(sorted(path.stem.replace("_", " ") for path in SPRITES.glob("*.webp")))
ANIMALS = ("bird", "cat", "cow", "dog", "horse", "person", "sheep")  # of the objects, and persons
GROUNDS = ("grass", "sand", "water", "sky", "brick", "snow", "road", "wood")
CLASSES = OBJECTS + GROUNDS
CAPTION_WORDS = ("a", "an", "and", "on", "photo", "of", ",")
SPLITS = {"train": 0, "validation": 10_000_000, "test": 20_000_000}  # first seed of each; the ranges never meet
COUNTS = {"plain": {1: 0.35, 2: 0.45, 3: 0.20}, "crowd": {4: 0.4, 5: 0.3, 6: 0.3}, "lookalikes": {2: 0.6, 3: 0.4}}
KIN = (("cat", "cow", "dog", "horse", "sheep"), ("bus", "car", "motorbike", "train"))
HEIGHTS = {  # sprite height over scene height, by object count
    1: (0.45, 0.80), 2: (0.36, 0.60), 3: (0.32, 0.48), 4: (0.30, 0.42), 5: (0.28, 0.38), 6: (0.26, 0.36),
}  # fmt: skip
VISIBLE = 0.6  # every object keeps at least this fraction of its own pixels


@dataclass(frozen=True)
class Scene:
    """One composed picture: `image` [H W 3] uint8, `mask` [H W] uint8 (index into CLASSES), names and a caption."""

    image: np.ndarray
    mask: np.ndarray
    objects: tuple[str, ...]
    ground: str
    caption: str

    @property
    def names(self) -> tuple[str, ...]:
        """Every class that the mask holds: the objects, then the ground."""
        return (*self.objects, self.ground)


def scene(split: str, index: int, size: int = 64, level: str = "plain") -> Scene:
    """Scene number `index` of a split ("train", "validation" or "test") and a level of `COUNTS`."""
    if split not in SPLITS:
        raise ValueError(f"Expected a split among {sorted(SPLITS)}, but got {split!r}.")
    if not 0 <= index < 10_000_000:
        raise ValueError(f"Expected an index from 0 to 9,999,999, but got {index}: beyond it another split begins.")
    return draw(SPLITS[split] + index, size, level)


def draw(seed: int, size: int = 64, level: str = "plain") -> Scene:
    """Compose the scene of one seed at `size` x `size` pixels."""
    if level not in COUNTS:
        raise ValueError(f"Expected a level among {', '.join(COUNTS)}, but got {level!r}.")
    rng = np.random.default_rng(seed)
    ground = GROUNDS[rng.integers(len(GROUNDS))]
    counts = COUNTS[level]
    count = int(rng.choice([*counts], p=[*counts.values()]))
    known = KIN[rng.integers(len(KIN))] if level == "lookalikes" else OBJECTS
    objects = tuple(known[i] for i in rng.choice(len(known), count, replace=False))
    backdrop = background(ground, rng, size)
    for _ in range(50):
        image, owner = _compose(backdrop, objects, rng, size)
        if all(seen >= VISIBLE * whole for seen, whole in owner):
            break
    picture, mask = image
    mask = np.where(mask < 0, CLASSES.index(ground), np.array([CLASSES.index(o) for o in objects])[mask])
    return Scene(np.asarray(picture), mask.astype(np.uint8), objects, ground, caption(objects, ground, rng))


def _compose(backdrop, objects, rng, size):
    """Paste the sprites left to right in jittered columns, more than three in two rows; return (picture, owner map),
    [(seen, whole) pixels]."""
    picture, owner, whole = backdrop.copy(), np.full((size, size), -1), []
    rows = 1 if len(objects) <= 3 else 2
    columns = -(-len(objects) // rows)
    for place, index in enumerate(rng.permutation(len(objects))):
        sprite = _scaled_sprite(objects[index], rng.uniform(*HEIGHTS[len(objects)]), size, bool(rng.random() < 0.5))
        x, y = _place(sprite.size, place % columns, columns, rng, size)
        y = (y + (size - sprite.height) * (place // columns)) // rows
        picture.paste(sprite, (x, y), sprite)
        solid = np.asarray(sprite)[..., 3] > 127
        owner[y : y + sprite.height, x : x + sprite.width][solid] = index
        whole.append((index, solid.sum()))
    return (picture, owner), [((owner == index).sum(), total) for index, total in whole]


def _place(extent, column, columns, rng, size):
    """Top left corner: the sprite's centre jitters around its column's centre, and it stays inside the picture."""
    width, height = extent
    centre = size * (column + 0.5) / columns + rng.uniform(-0.5, 0.5) * size / columns
    if columns == 1:
        centre = rng.uniform(width / 2, size - width / 2)
    x = int(np.clip(centre - width / 2, 0, size - width))
    return x, int(rng.integers(0, size - height + 1))


@cache
def _sprite(name: str) -> Image.Image:
    sprite = Image.open(SPRITES / f"{name.replace(' ', '_')}.webp").convert("RGBA")
    return sprite.crop(sprite.getchannel("A").point(lambda a: 255 * (a > 127)).getbbox())


def _scaled_sprite(name: str, height: float, size: int, flip: bool) -> Image.Image:
    sprite = _sprite(name)
    scale = min(height * size / sprite.height, 0.8 * size / sprite.width)
    sprite = sprite.resize((max(4, round(sprite.width * scale)), max(4, round(sprite.height * scale))), Image.BOX)
    return sprite.transpose(Image.FLIP_LEFT_RIGHT) if flip else sprite


def caption(objects: Sequence[str], ground: str | None, rng: np.random.Generator) -> str:
    """A comma-joined list (the prompt of segmentation) or a sentence (the prompt of a user), names in random order; without a
    ground it names the objects alone."""
    names = [objects[i] for i in rng.permutation(len(objects))]
    if rng.random() < 0.4:
        return ", ".join([*names, *filter(None, [ground])])
    phrases = [f"{'an' if name[0] in 'aeiou' else 'a'} {name}" for name in names]
    listed = ", ".join(phrases[:-1]) + " and " + phrases[-1] if len(phrases) > 1 else phrases[0]
    return f"{'a photo of ' if rng.random() < 0.3 else ''}{listed}{f' on {ground}' if ground else ''}"


def background(ground: str, rng: np.random.Generator, size: int) -> Image.Image:
    """A procedural texture of one ground; colour and pattern vary with the generator."""
    y, x = np.mgrid[0:size, 0:size] / size
    grain = rng.random((size, size)) - 0.5
    level = 1 + rng.uniform(-0.08, 0.08)
    texture = _TEXTURES[ground](x, y, grain, lambda cells: _noise(rng, cells, size), rng)
    return Image.fromarray(np.clip(texture * level, 0, 255).astype(np.uint8))


def _noise(rng, cells, size):
    """Smooth noise in [0, 1]: a coarse random grid, enlarged."""
    coarse = Image.fromarray((rng.random((cells, cells)) * 255).astype(np.uint8))
    return np.asarray(coarse.resize((size, size), Image.BICUBIC)) / 255.0


def _tinted(base, amount, tint=(1, 1, 1)):
    return np.array(base) + amount[..., None] * np.array(tint)


def _grass(x, y, grain, noise, rng):
    return _tinted((60, 140, 50), grain * 55 + (noise(8) - 0.5) * 45, (0.6, 1, 0.4))


def _sand(x, y, grain, noise, rng):
    return _tinted((222, 192, 132), grain * 26 + (noise(6) - 0.5) * 30)


def _water(x, y, grain, noise, rng):
    waves = np.sin((y * 8 + noise(5) * 2 + rng.random()) * 2 * np.pi)
    return _tinted((35, 85, 170), waves * 25, (0.6, 0.8, 1))


def _sky(x, y, grain, noise, rng):
    return _tinted((130, 185, 242), np.clip(noise(5) - 0.45, 0, 1) * 220, (1, 0.7, 0.25))


def _brick(x, y, grain, noise, rng):
    row = np.floor(y * 8)
    mortar = (y * 8 % 1 < 0.16) | ((x * 4 + 0.5 * (row % 2)) % 1 < 0.08)
    return np.where(mortar[..., None], (190, 180, 170), _tinted((165, 70, 50), (noise(12) - 0.5) * 50))


def _snow(x, y, grain, noise, rng):
    return _tinted((236, 240, 248), (noise(6) - 0.5) * 26)


def _road(x, y, grain, noise, rng):
    lane = (abs(y - rng.uniform(0.2, 0.8)) < 0.03) & ((x * 5 + rng.random()) % 1 < 0.6)
    return np.where(lane[..., None], (230, 220, 120), _tinted((80, 80, 86), grain * 26))


def _wood(x, y, grain, noise, rng):
    return _tinted((150, 100, 55), np.sin((x * 9 + noise(4) * 1.5 + rng.random()) * 2 * np.pi) * 22)


_TEXTURES = dict(zip(GROUNDS, (_grass, _sand, _water, _sky, _brick, _snow, _road, _wood), strict=True))
