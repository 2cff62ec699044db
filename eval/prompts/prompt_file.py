"""Prompts as a file that people read and mend: one line of JSON an image, the classes by name."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

from PIL import Image

from eval.common.files import replacing
from eval.prompts.sources import Entity, Prompt, parsed, require_entries
from goca_guidance.schema import checked


def write_prompts(path: str | Path, prompts: Mapping[str, Sequence[Prompt]], classes: Sequence[str]) -> None:
    """Every image's prompts and their entities, whole or not at all; a label is an index into `classes`."""
    lines = [{"id": i, "prompts": [_entry(prompt, classes) for prompt in each]} for i, each in prompts.items()]
    with replacing(Path(path)) as part:
        part.write_text("".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines), encoding="utf-8")


def _entry(prompt, classes):
    named = [{"words": e.words, "class": None if e.label is None else classes[e.label]} for e in prompt.entities]
    return {"text": prompt.text, "entities": named}


@checked
class Written:
    """Prompts that `write_prompts` wrote, exactly as they were; lines may have been edited since."""

    def __init__(self, path: str | Path, classes: Sequence[str]):
        self.path, self.prompts = Path(path), {}
        labels = {name: label for label, name in enumerate(classes)} | {None: None}
        for number, line in enumerate(self.path.read_bytes().split(b"\n"), 1):
            if line.strip():
                sample_id, prompts = _image(line, labels, f"line {number} of {path}")
                if sample_id in self.prompts:
                    raise ValueError(f"Expected one line for an image in {path}, but got two for {sample_id!r}.")
                self.prompts[sample_id] = prompts

    def check(self, ids: Sequence[str]) -> None:
        """ValueError where images have no line."""
        require_entries(ids, [i for i in ids if i not in self.prompts], self.path)

    def __call__(self, sample_id: str, image: Image.Image, present: tuple[int, ...]) -> list[Prompt]:
        self.check([sample_id])
        return list(self.prompts[sample_id])


def _image(line, labels, place):
    entry = parsed(line, place)
    try:
        prompts = [Prompt(p["text"], tuple(_entity(e, labels) for e in p["entities"])) for p in entry["prompts"]]
        return str(entry["id"]), prompts
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise ValueError(
            f'Expected {{"id": ..., "prompts": [{{"text": ..., "entities": [{{"words": ..., "class": ...}}]}}]}} in {place}, '
            f"but got {type(error).__name__}: {error}"
        ) from error


def _entity(entry, labels):
    if entry["class"] not in labels:
        raise ValueError(f"the class {entry['class']!r}, which the benchmark does not have.")
    return Entity(entry["words"], labels[entry["class"]])
