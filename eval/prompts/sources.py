"""What the text encoder reads for an image, and which of its words stand for which class.

A source gives the prompts of an image: `source(sample_id, image, present)`, where `present` are the labels that the ground
truth holds (indices into the benchmark's classes, that of "background" is left out). `Captions`, `Tags` and `Vocabulary`
are here; `prompt_file.Written`, `tagger.Tagger` and `endpoint.Endpoint` beside it.

A prompt is a list of phrases with commas between them, and no phrase stands in it twice. How a caption becomes a prompt
follows GoCA (arXiv 2603.06178; what its released code does, not its code).
"""

import json
import math
import re
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Literal

import numpy as np
from PIL import Image

from eval.datasets.benchmarks import bare, dataset_of, no_words
from eval.prompts.phrases import BACKGROUND, caption_groups, class_names, clean, name_index, named
from goca_guidance.schema import Count, checked


@dataclass(frozen=True)
class Entity:
    """Phrases of the prompt, separated by commas, whose maps are averaged; `label` of their class, None: background."""

    words: str
    label: int | None

    def __post_init__(self):
        if not isinstance(self.words, str) or not isinstance(self.label, int | None):
            raise TypeError(f"Expected words, and a label or None, but got {self.words!r} and {self.label!r}.")

    @property
    def phrases(self) -> tuple[str, ...]:
        """The words, phrase by phrase."""
        return tuple(phrase.strip() for phrase in self.words.split(","))


@dataclass(frozen=True)
class Prompt:
    """`text` is what the text encoder reads. ValueError unless it holds every phrase and no two entities have equal words."""

    text: str
    entities: tuple[Entity, ...]

    def __post_init__(self):
        phrases = [phrase for entity in self.entities for phrase in entity.phrases]
        spelled = [rf"(?<!\w){re.escape(phrase)}(?!\w)" if phrase else r"(?!)" for phrase in phrases]
        if absent := [p for p, s in zip(phrases, spelled, strict=True) if not re.search(s, self.text, re.IGNORECASE)]:
            raise ValueError(f"Expected a prompt that holds every phrase, but {self.text!r} lacks {absent}.")
        words = [entity.words for entity in self.entities]
        if twice := sorted({word for word in words if words.count(word) > 1}):
            raise ValueError(f"Expected entities of different words, but {twice} stand twice in {self.text!r}.")


def joined(entities: Sequence[Entity]) -> list[Prompt]:
    """The prompt that lists some entities' words, alone in a list; no prompt for no entity."""
    return [Prompt(", ".join(entity.words for entity in entities), tuple(entities))] if entities else []


@checked
class Source:
    """Gives the prompts of an image. `names` are the classes as prompts spell them."""

    def __init__(self, classes: Sequence[str]):
        self.names = class_names(classes)

    def check(self, ids: Sequence[str]) -> None:
        """ValueError, before anything is computed, if the source cannot serve these samples."""

    def __call__(self, sample_id: str, image: Image.Image, present: tuple[int, ...]) -> list[Prompt]:
        """The image's prompts; none where nothing is there to be asked for."""
        raise NotImplementedError

    def asked(self, present: Collection[int]) -> tuple[int, ...]:
        """`present`, sorted, without the background's label; a label that no class has raises ValueError."""
        if wrong := sorted(set(present) - set(range(len(self.names)))):
            raise ValueError(f"Expected labels from 0 to {len(self.names) - 1}, but got {wrong}.")
        return tuple(label for label in sorted(set(present)) if self.names[label] != BACKGROUND)

    def entities(self, labels: Sequence[int]) -> list[Entity]:
        """The names of some classes, an entity each."""
        return [Entity(self.names[label], int(label)) for label in labels]


@checked
class Tags(Source):
    """The names of the classes that the ground truth holds, then those of what else an image shows, where `words` knows it."""

    def __init__(self, classes: Sequence[str], words: Callable[[str], Sequence[str]] = no_words):
        super().__init__(classes)
        self.words = words

    def __call__(self, sample_id, image, present):
        background = [Entity(word, None) for word in self.words(sample_id)]
        return joined(self.entities(self.asked(present)) + background)


@checked
class Vocabulary(Source):
    """The names of all classes, whatever the image holds, in as few prompts of nearly equal length as `chunk` names allow."""

    def __init__(self, classes: Sequence[str], chunk: Count = 20):
        super().__init__(classes)
        labels = [label for label, name in enumerate(self.names) if name != BACKGROUND]
        parts = np.array_split(labels, max(1, math.ceil(len(labels) / chunk)))
        self.prompts = [prompt for part in parts for prompt in joined(self.entities(part))]

    def __call__(self, sample_id, image, present):
        return list(self.prompts)


# ---- captions --------------------------------------------------------------------------------------------------------
def labelled(
    groups: Sequence[tuple[str, ...]], index: Mapping[tuple[str, ...], int], present: Collection[int]
) -> list[tuple[tuple[str, ...], int | None]]:
    """Each group with the present class that it names, or None; the phrases that name the class come first.

    A group that names several is split where a phrase names one: "(tree, person, hat, dog)" into tree, (person, hat) and dog.
    """
    found = []
    for group in groups:
        labels = [label if (label := named(phrase, index)) in present else None for phrase in group]
        naming = [place for place, label in enumerate(labels) if label is not None]
        if len({labels[place] for place in naming}) > 1:
            starts = [*range(naming[0]), *naming, len(group)]
            found += [(group[start:stop], labels[start]) for start, stop in pairwise(starts)]
        else:
            order = naming + [place for place in range(len(group)) if place not in naming]
            found.append((tuple(group[place] for place in order), labels[order[0]]))
    return found


def merged(groups: Sequence[tuple[tuple[str, ...], int | None]]) -> list[Entity]:
    """Entities that share no phrase: a group whose first phrase stands in an earlier entity of its label joins it, any other
    phrase stays with the first entity that holds it, and a group left with none is gone.
    """
    entities: list[tuple[list[str], int | None]] = []
    owner: dict[str, int] = {}
    for group, label in groups:
        fresh = [phrase for phrase in group if phrase not in owner]
        place = owner.get(group[0], len(entities))
        if fresh and (place == len(entities) or entities[place][1] != label):
            place = len(entities)
            entities.append(([], label))
        for phrase in fresh:
            entities[place][0].append(phrase)
            owner[phrase] = place
    return [Entity(", ".join(phrases), label) for phrases, label in entities]


def release(benchmark: str) -> dict:
    """What the released code of GoCA does with a benchmark's captions, as arguments of `Captions` and `Endpoint`."""
    dataset = dataset_of(benchmark)
    return {"append_missing": dataset.append_missing, "background": dataset.background_words}


@checked
class CaptionSource(Source):
    """Prompts of captions; where these come from, `caption` of a subclass says.

    The caption's things are entities. One that names a present class has its label, every other is background. Present
    classes that it misses are appended (`append_missing`), then the words of `background`. `labels="caption"`: every class
    that the caption names counts as present, and the ground truth is not read (predicted tags).
    """

    def __init__(
        self,
        classes: Sequence[str],
        aliases: Mapping[str, str] | None = None,
        background: Sequence[str] = (),
        append_missing: bool = True,
        labels: Literal["tags", "caption"] = "tags",
    ):
        super().__init__(classes)
        self.index = name_index(classes, aliases or {})
        self.background = tuple(map(clean, background))
        self.append_missing, self.labels = append_missing, labels

    def caption(self, sample_id: str, image: Image.Image) -> str:
        """The caption of an image."""
        raise NotImplementedError

    def __call__(self, sample_id, image, present):
        groups = caption_groups(self.caption(sample_id, image))
        present = self.mentioned(groups) if self.labels == "caption" else self.asked(present)
        found = labelled(groups, self.index, present)
        if self.append_missing:
            found += [((self.names[i],), i) for i in present if i not in {label for _, label in found}]
        return joined(merged(found + [((word,), None) for word in self.background]))

    def mentioned(self, groups: Sequence[tuple[str, ...]]) -> tuple[int, ...]:
        """Labels of the classes that a caption names, sorted."""
        return tuple(sorted({named(phrase, self.index) for group in groups for phrase in group} - {None}))


@checked
class Captions(CaptionSource):
    """Prompts of a caption file in the released format: {"image file name": {"caption": "noun, (noun, part), noun."}}.

    A sample's entry is found by its file name, without folder, ending and Cityscapes' "_leftImg8bit".
    """

    def __init__(self, path: str | Path, classes: Sequence[str], aliases: Mapping[str, str] | None = None, **settings):
        super().__init__(classes, aliases, **settings)
        self.path, self.captions = Path(path), {}
        for name, text in read_captions(self.path).items():
            if bare(name) in self.captions:
                raise ValueError(f"Expected one entry for an image in {path}, but got two for {bare(name)!r}.")
            self.captions[bare(name)] = text

    def check(self, ids):
        """ValueError where images have no entry, or where no entry of all names a class."""
        require_entries(ids, [i for i in ids if bare(i) not in self.captions], self.path)
        if ids and not any(self.mentioned(caption_groups(self.captions[bare(i)])) for i in ids):
            wanted = [name for name in self.names if name != BACKGROUND]
            raise ValueError(
                f"Expected captions that name classes such as {wanted[:5]}, but none of the {len(ids)} entries of {self.path} "
                "does: choose the caption file of this benchmark."
            )

    def caption(self, sample_id, image):
        require_entries([sample_id], [] if bare(sample_id) in self.captions else [sample_id], self.path)
        return self.captions[bare(sample_id)]


def read_captions(path: Path) -> dict[str, str]:
    """File name -> caption of a file in the released format; ValueError where it has another shape, or a name twice."""
    entries = parsed(path.read_bytes(), path)
    whole = isinstance(entries, dict) and all(isinstance(entry, dict) for entry in entries.values())
    if not whole or not all(isinstance(entry.get("caption"), str) for entry in entries.values()):
        raise ValueError(
            f'Expected {{"image file name": {{"caption": "text"}}, ...}} in {path}, but it has another shape.'
        )
    return {name: entry["caption"] for name, entry in entries.items()}


def parsed(text: str | bytes, place: object):
    """JSON, where no object has one key twice; anything else raises ValueError that names the `place`."""

    def once(pairs):
        keys = [key for key, _ in pairs]
        if len(set(keys)) < len(keys):
            raise ValueError(f"{sorted({key for key in keys if keys.count(key) > 1})[:5]} stand there twice")
        return dict(pairs)

    try:
        return json.loads(text, object_pairs_hook=once)
    except ValueError as error:
        raise ValueError(f"Expected well-formed JSON in {place}, but got: {error}.") from error


def require_entries(ids: Sequence[str], missing: Sequence[str], path: Path) -> None:
    """ValueError that counts the images without an entry in a file, and names some."""
    if missing:
        shown = ", ".join(missing[:5]) + (", ..." if len(missing) > 5 else "")
        raise ValueError(
            f"Expected an entry for each image in {path}, but {len(missing)} of {len(ids)} have none: {shown}."
        )
