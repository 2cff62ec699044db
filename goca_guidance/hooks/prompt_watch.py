"""What the text encoders of a call read of the prompt and of the negative prompt, and where the denoiser gets it."""

from collections.abc import Sequence

from goca_guidance.denoisers.places import Part
from goca_guidance.denoisers.readings import Asked, Texts, other_text, told_apart, told_by_rows
from goca_guidance.denoisers.words import Encoded, has_marks
from goca_guidance.hooks.watch import Watch


Told = tuple[list[Encoded], list[Encoded]]  # of the prompt, and of the negative prompt


class PromptWatch(Watch):
    """A watch that tells the prompt from the negative prompt, at the conditional prediction.

    By their texts, where the tokenizers show where words begin and the denoiser gets all that was read; else by the rows of
    the denoiser's text that are the encoders'.

    Args:
        families, text_encoders: see `Watch`.
        asked: the prompts; None where only the encoders know them.
        prompts: how many; None is as many as were read at once.
        prompt_read: whether an encoder reads the prompt; with prompt embeddings it reads the negative prompt at most.
    """

    def __init__(self, families, text_encoders, asked: Asked | None, prompts: int | None, prompt_read: bool):
        super().__init__(families, text_encoders)
        self.asked, self.prompts, self.prompt_read = asked, prompts, prompt_read

    @property
    def branches(self) -> tuple[int, ...]:
        """Of the denoiser's call in progress: 0 unconditional, 1 conditional."""
        raise NotImplementedError

    @property
    def separate(self) -> bool:
        """Whether a step makes its predictions one after the other."""
        raise NotImplementedError

    def told(self) -> Told | None:
        """What was read; None where it cannot be told."""
        if not any(self.reads):
            return [], []
        if self.family.gathered:
            found = self._told_by_ids()
            return found and ([part.gathered() for part in found[0]], [part.gathered() for part in found[1]])
        if all(map(has_marks, self.tokenizers)):
            return self._told_by_ids() or self._told_by_rows()
        return self._told_by_rows() or self._told_by_ids()

    def _told_by_ids(self) -> Told | None:
        reads = [[read.ids for read in of_encoder] for of_encoder in self.reads]
        asked, length = self.asked, self.call.text
        if not self.prompt_read:
            asked = asked and Asked(asked.negatives, (), asked.trusted)
            if self.separate:  # the negative prompt's own forward is still to come
                length = sum(of_encoder[0].shape[1] for of_encoder in reads if of_encoder)
        whole = len(self.text_encoders) == len(self.family.encoders) or self.family.side_by_side
        found = told_apart(reads, self.tokenizers, length, whole, self.prompts, asked)
        return found if found is None or self.prompt_read else ([], found[0])

    def _told_by_rows(self) -> Told | None:
        positive = self._standing(1) if self.prompt_read else []
        if positive is None:
            return None
        if 0 in self.branches:
            return positive, self._standing(0) or []
        other = other_text(positive[0], self._forms(0)) if len(positive) == 1 else None
        return positive, [] if other is None else [other]

    def _standing(self, branch: int) -> list[Encoded] | None:
        """What was read of the text of a prediction that is in progress."""
        texts = self.texts
        count = len(texts[0]) // len(self.branches)
        first, step = count * self.branches.index(branch), max(1, count // (self.prompts or count))
        rows: list[Part] = [text[first : first + count : step] for text in texts]
        return told_by_rows(self.reads, self.tokenizers, rows, self._forms(branch))

    def _forms(self, branch: int) -> Sequence[Texts] | None:
        if self.asked is None:
            return None
        return self.asked.prompts if branch else self.asked.negatives
