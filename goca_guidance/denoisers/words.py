"""Token ids to words: where the words of a prompt stand in what a text encoder reads.

Three rules say where words begin: CLIP closes each word with `</w>`, sentencepiece (T5) opens it with `▁`, and BERT marks
what continues it with `##`. What any other tokenizer read is spelled out, and the prompt is found in it (`spelling`).
"""

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor
from transformers import BertTokenizer, CLIPTokenizer, ProcessorMixin, T5Tokenizer

from goca_guidance.denoisers.spelling import BREAK, Span, Spelling, content, find_prompt, is_unspaced


Words = list[tuple[str, list[int]]]  # words in order, with the positions of their tokens


@dataclass(frozen=True)
class Encoded:
    """What one text encoder read: `ids` b n, whose first token stands at `start` in the denoiser's text sequence.

    A long prompt may be read in `chunks` of equal length, each with a start and an end of its own.
    `places` b n: where the tokens stand in the denoiser's text, if not side by side; -1 for one that does not.
    `prompts`: what each image's prompt may be, to be found in what was read; None: nobody knows. `others`: what the encoder
    read besides. An id of -1 is no token.
    """

    tokenizer: Any  # of transformers, or what wraps one
    ids: Int[Tensor, "b n"]
    start: int = 0
    chunks: int = 1
    places: Int[Tensor, "b n"] | None = None
    prompts: Sequence[Sequence[str]] | None = None
    others: Sequence[Sequence[int]] = ()

    def words(self, image: int) -> Words:
        """The words of one image's prompt, with their positions in the denoiser's text sequence; none where it is not found.

        Some encoders get no more than what a prompt has in quotes.
        """
        row, size = self.ids[image].tolist(), self.ids.shape[1] // self.chunks
        if has_marks(self.tokenizer):
            rows = ((start, [i for i in row[start : start + size] if i >= 0]) for start in range(0, len(row), size))
            pairs = [(start, _marked(self.tokenizer, ids)) for start, ids in rows]
            found = [(word, [start + p for p in at]) for start, each in pairs for word, at in each]
        else:
            spelling, span = self._found(image)
            found = [] if span is None else spelling.words(span)
        at = self.places_of(image)
        stand = [(word, [at[p] for p in positions if at[p] >= 0]) for word, positions in found]
        return [(word, positions) for word, positions in stand if positions]

    def gathered(self) -> "Encoded":
        """The same without the padding before it: its first token stands at `start`."""
        padding = (self.ids != self.tokenizer.pad_token_id).cumsum(1) == 0
        places = torch.arange(self.ids.shape[1], device="cpu") - padding.sum(1, keepdim=True) + self.start
        return replace(self, places=places.masked_fill(padding, -1))

    def tokens(self, image: int) -> list[tuple[str, int]]:
        """Every token that the denoiser sees, with its place."""
        kept = [
            (i, at) for i, at in zip(self.ids[image].tolist(), self.places_of(image), strict=True) if min(i, at) >= 0
        ]
        names = self.tokenizer.convert_ids_to_tokens([i for i, _ in kept])
        return [(name, at) for name, (_, at) in zip(names, kept, strict=True)]

    def start_token(self, image: int) -> int | None:
        """Place of the first token of the text that the denoiser sees; None where it is the prompt's own."""
        real, behind = self._real(image), self._behind(image)
        is_own = real and behind is not None and behind[0] <= real[0][0]
        return None if is_own or not real else real[0][1]

    def end_token(self, image: int) -> int | None:
        """Place of the token behind the prompt, or of the last one that is no padding, where the text was cut."""
        behind = self.behind_prompt(image)
        return next((at for _, at in self._real(image)[-1:]), None) if behind is None else behind

    def behind_prompt(self, image: int) -> int | None:
        """Place of the token behind the prompt, no padding; None where there is none."""
        behind = self._behind(image)
        return None if behind is None else next((at for p, at in self._real(image) if p >= behind[1]), None)

    def _real(self, image: int) -> list[tuple[int, int]]:
        """Tokens that the denoiser sees and that are no padding: where they were read, and where they stand."""
        row = self.ids[image].tolist()
        if has_marks(self.tokenizer):
            end = _end_of(self.tokenizer)
            low, high = 0, row.index(end) + 1 if end in row else len(row)
        else:
            low, high = content(self.tokenizer, row)
        stand = enumerate(zip(row, self.places_of(image), strict=True))
        return [(p, at) for p, (token, at) in stand if low <= p < high and token >= 0 <= at]

    def _behind(self, image: int) -> tuple[int, int] | None:
        """The prompt's first token, and the one behind it; None where it is not found."""
        row = self.ids[image].tolist()
        if has_marks(self.tokenizer):
            end, found = _end_of(self.tokenizer), _marked(self.tokenizer, [i for i in row if i >= 0])
            return (found[0][1][0] if found else len(row)), row.index(end) if end in row else len(row)
        spelling, span = self._found(image)
        return None if span is None else spelling.tokens(span)

    def _found(self, image: int) -> tuple[Spelling, Span | None]:
        prompts = None if self.prompts is None else self.prompts[image]
        return find_prompt(self.tokenizer, self.ids[image].tolist(), prompts, self.others)

    def holds(self, image: int) -> bool:
        """Whether the prompt is found in what was read."""
        return has_marks(self.tokenizer) or self._found(image)[1] is not None

    def text(self, image: int) -> str:
        """What was read, for a message."""
        if has_marks(self.tokenizer):
            return " ".join(word for word, _ in self.words(image))
        return self._found(image)[0].text.replace(BREAK, " ").strip()[:200]

    def places_of(self, image: int) -> list[int]:
        """Where each token stands in the denoiser's text sequence; -1 for one that does not."""
        if self.places is not None:
            return self.places[image].tolist()
        return list(range(self.start, self.start + self.ids.shape[1]))


# ---- words -----------------------------------------------------------------------------------------------------------
def words(
    tokenizer: Any, ids: Sequence[int], prompts: Sequence[str] | None = None, others: Sequence[Sequence[int]] = ()
) -> Words:
    """The prompt's words, in order, with the positions of their tokens. Special tokens belong to none.

    With the marks of CLIP, T5 or BERT, the sequence ends at the first end token: CLIP pads with that token. The vectors of one
    textual inversion (`<cat>`, `<cat>_1`, ...) are one word, and a sign of punctuation is one. What any other tokenizer read
    is searched for the prompt, which may be `prompts`; see [`~goca_guidance.denoisers.spelling.find_prompt`].
    """
    return _marked(tokenizer, ids) if has_marks(tokenizer) else _spelled(tokenizer, ids, prompts, others)


def bare(tokenizer: Any) -> Any:
    """The tokenizer itself, where a processor for texts and pictures holds it."""
    return tokenizer.tokenizer if isinstance(tokenizer, ProcessorMixin) else tokenizer


def has_marks(tokenizer: Any) -> bool:
    """Whether the tokens themselves show where words begin."""
    return any(_is(tokenizer, kind) for kind in _RULES)


def _spelled(tokenizer, ids, prompts, others) -> Words:
    spelling, span = find_prompt(tokenizer, ids, prompts, others)
    if span is None:
        raise ValueError(
            f"Expected the prompt in what {type(tokenizer).__name__} read, but it read {spelling.text[:200]!r}: pass "
            "`region_tokens`, for example {'cat': [2]} (positions in the text sequence)."
        )
    return spelling.words(span)


def _end_of(tokenizer) -> int:
    return tokenizer.eos_token_id if tokenizer.eos_token_id is not None else tokenizer.sep_token_id


def _marked(tokenizer, ids) -> Words:
    end = tokenizer.eos_token or tokenizer.sep_token
    special = {tokenizer.bos_token, tokenizer.cls_token, tokenizer.pad_token} - {tokenizer.unk_token}
    tokens = tokenizer.convert_ids_to_tokens(list(ids))
    tokens = tokens[: tokens.index(end)] if end in tokens else tokens
    found: Words = []
    for text, first, position in _pieces(tokenizer, tokens):
        if tokens[position] in special:
            continue
        if first or not found:
            found.append((text, [position]))
        else:
            found[-1] = (found[-1][0] + text, [*found[-1][1], position])
    return [(_readable(tokenizer, text), positions) for text, positions in found if text]


def _pieces(tokenizer, tokens) -> Iterator[tuple[str, bool, int]]:
    """Each token's text, whether it begins a word, and its position; added tokens are words whatever the tokenizer."""
    rule = next(rule for kind, rule in _RULES.items() if _is(tokenizer, kind))
    added, start = set(tokenizer.get_added_vocab()) - {tokenizer.unk_token}, 0
    for is_added, together in groupby(tokens, added.__contains__):
        run = list(together)
        for text, first, position in (_added_pieces if is_added else rule)(tokenizer, run):
            yield text, first, start + position
        start += len(run)


def _added_pieces(tokenizer, tokens):
    """Each is a word, but the further vectors of a textual inversion (`<cat>`, `<cat>_1`, `<cat>_2`) belong to the first."""
    base = None
    for position, token in enumerate(tokens):
        further = base is not None and re.fullmatch(rf"{re.escape(base)}_\d+", token) is not None
        yield "" if further else token, not further, position
        base = base if further else token


def _is(tokenizer, kind: type) -> bool:
    """Whether a tokenizer is of a kind, or holds one that is: a server may wrap it with a lock."""
    return any(isinstance(each, kind) for each in (tokenizer, *vars(tokenizer).values()))


def _clip_pieces(tokenizer, tokens):
    opens = True
    for position, token in enumerate(tokens):
        yield token.removesuffix("</w>"), opens, position
        opens = token.endswith("</w>")


def _t5_pieces(tokenizer, tokens):
    """A word opens with the mark `▁`, which may stand alone before it, and behind a sign; a sign is a word of its own.

    An apostrophe within a word ("it's") is a sign that the word goes on behind; at its beginning it is a quotation mark. In
    a script without spaces each token is a word.
    """
    opens, previous = True, ""
    for position, token in enumerate(tokens):
        text = token.removeprefix("▁")
        sign = bool(text) and not any(map(str.isalnum, text)) and token != tokenizer.unk_token
        apart = is_unspaced(text[:1]) or is_unspaced(previous[-1:])
        first = previous != "▁" and (opens or sign or apart or token.startswith("▁"))  # behind a lone mark is its word
        yield text, first, position
        within = token in ("'", "’") and previous not in ("▁", "'", "’")  # an apostrophe, no quotation mark
        opens, previous = sign and not within, token


def _bert_pieces(tokenizer, tokens):
    for position, token in enumerate(tokens):
        yield token.removeprefix("##"), not token.startswith("##"), position


_RULES: dict[
    type, Callable[..., Iterator[tuple[str, bool, int]]]
] = {  # what `_pieces` asks about tokens that were not added
    CLIPTokenizer: _clip_pieces,
    T5Tokenizer: _t5_pieces,
    BertTokenizer: _bert_pieces,
}


def _readable(tokenizer, text):
    return tokenizer.convert_tokens_to_string([text]).strip() or text


def is_unknown(tokenizer: Any, word: str) -> bool:
    """Whether a word is unknown tokens and nothing else."""
    return tokenizer.unk_token is not None and not word.replace(tokenizer.unk_token, "")


def sentence(encoded: Sequence[Encoded], image: int, chosen: Callable[[Words], Words] = list) -> Words:
    """The words of one image's prompt with their positions in the whole text sequence.

    Where several encoders read it one after another, a word's tokens are those of all of them. What a tokenizer does not
    know at all is left out: one unknown word is to it as any other. So is a sign that has no token but a word's: "(cat" may be
    one. `chosen` picks from the words of each.
    """
    found: dict[tuple[str, int], tuple[str, list[int]]] = {}
    for part in encoded:
        seen: dict[str, int] = {}
        read = [pair for pair in part.words(image) if not is_unknown(part.tokenizer, pair[0])]
        spoken = {p for word, positions in read if any(map(str.isalnum, word)) for p in positions}
        read = [pair for pair in read if any(map(str.isalnum, pair[0])) or not spoken.issuperset(pair[1])]
        for word, positions in chosen(read):
            occurrence = seen[word.lower()] = seen.get(word.lower(), -1) + 1
            _, known = found.setdefault((word.lower(), occurrence), (word, []))
            known.extend(positions)
    return list(found.values())


def tokenise(
    prompt: str, tokenizers: Sequence, convert: Callable[[str, object], str], longest: int | None = None
) -> list[Encoded]:
    """What text encoders would read of a prompt one after another, padded to their full lengths.

    `longest` is the length of T5's text, which a pipeline's `max_sequence_length` says.
    """
    encoded: list[Encoded] = []
    for tokenizer in tokenizers:
        limited = longest and _is(tokenizer, T5Tokenizer)
        length = longest if limited else tokenizer.model_max_length
        text = [convert(prompt, tokenizer)]
        ids = tokenizer(text, padding="max_length", truncation=True, max_length=length).input_ids
        of_text = torch.tensor(ids, dtype=torch.long, device="cpu")
        encoded.append(Encoded(tokenizer, of_text, sum(part.ids.shape[1] for part in encoded)))
    return encoded


def ids_of(tokenizer, text: str, length: int) -> list[int]:
    """All token ids of a text, with its start and end, and padding up to `length`.

    They are asked for as stock pipelines do, but for a longer text: a tokenizer keeps its settings from call to call, and
    threads that share one would get each other's.
    """
    ids = tokenizer(text, padding="max_length", truncation=True, max_length=length, verbose=False).input_ids
    return ids if _end_of(tokenizer) in ids[:-1] else tokenizer(text, verbose=False).input_ids
