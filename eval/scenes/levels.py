"""What is asked of a scene, by levels: each holds one of the gaps on which the paper's claims rest, all else is as in "plain".

A level says which scenes are drawn, which names the prompt holds, which of them are candidates, and which pixels count. A
question is deterministic by split and index.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image
from scipy.ndimage import maximum_filter, minimum_filter

from eval.scenes.scene import CLASSES, GROUNDS, OBJECTS, SPLITS, Scene, scene


VOID = 255  # of a mask: this pixel does not count
LATENT = 4  # pixels on a side of what the tiny autoencoder makes a latent


@dataclass(frozen=True)
class Level:
    """One level.

    Args:
        says: what is asked, in a few words.
        scenes: composition of the scenes (`eval.scenes.scene.COUNTS`).
        enlarged: side of the picture over the side that a model knows best.
        interior: a pixel within a latent of another class does not count.
        names: what the prompt holds beside the names of the picture: "" nothing; "absent" two or three others; "vocabulary"
            all others; "background" all grounds, which are not candidates but words of one class.
        tokens: of a prompt, at the most.
    """

    says: str
    scenes: str = "plain"
    enlarged: int = 1
    interior: bool = False
    names: str = ""
    tokens: int = 32

    @property
    def classes(self) -> tuple[str, ...]:
        """Names of the labels in a mask; the objects are the first."""
        return (*OBJECTS, "background") if self.names == "background" else CLASSES


LEVELS = {
    "plain": Level("one to three objects, all names given"),
    "interior": Level("the same, pixels within a latent of a border left out", interior=True),
    "fine": Level("the same at twice the side", enlarged=2),
    "crowd": Level("four to six objects", scenes="crowd"),
    "lookalikes": Level("two or three objects of one kin", scenes="lookalikes"),
    "unnamed": Level("grounds are background, by background words", names="background"),
    "absent": Level("two or three names that are not in the picture", names="absent"),
    "vocabulary": Level("all 24 names", names="vocabulary", tokens=51),
}


@dataclass(frozen=True)
class Question:
    """A picture, its mask [H W] uint8 (index into the level's classes, or VOID), the candidates and the background's words.

    The prompt is the names, then the words, with commas between them.
    """

    image: Image.Image
    mask: np.ndarray
    names: tuple[str, ...]
    words: tuple[str, ...] = ()


def question(level: Level, split: str, index: int, home: int = 64) -> Question:
    """Question number `index` of a split and a level, for a model that knows pictures of `home` x `home` pixels best."""
    drawn = scene(split, index, level.enlarged * home, level.scenes)
    names, words, mask = drawn.names, (), drawn.mask
    if level.names == "background":
        names, words, mask = drawn.objects, GROUNDS, np.minimum(mask, len(OBJECTS))
    elif level.names:
        names = _among_others(drawn, level.names, np.random.default_rng((SPLITS[split] + index, 1)))
    mask = without_borders(mask) if level.interior else mask.astype(np.uint8)
    return Question(Image.fromarray(drawn.image), mask, tuple(names), words)


def _among_others(drawn: Scene, which: str, rng: np.random.Generator) -> Sequence[str]:
    """The picture's names and others, in random order."""
    others = [name for name in CLASSES if name not in drawn.names]
    if which == "absent":
        others = [others[i] for i in rng.choice(len(others), rng.integers(2, 4), replace=False)]
    names = [*drawn.names, *others]
    return [names[i] for i in rng.permutation(len(names))]


def without_borders(mask: np.ndarray, border: int = LATENT) -> np.ndarray:
    """A mask [H W] whose pixels with another label up to `border` pixels away, in rows, columns or both, are VOID."""
    window = 2 * border + 1
    alike = minimum_filter(mask, window, mode="nearest") == maximum_filter(mask, window, mode="nearest")
    return np.where(alike, mask, VOID).astype(np.uint8)
