"""Token ids to words: where the words of a prompt stand in what a text encoder reads.

Three rules say where words begin: CLIP closes each word with `</w>`, sentencepiece (T5) opens it with `▁`, and BERT marks
what continues it with `##`.
"""

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor
from transformers import BertTokenizer, CLIPTokenizer, T5Tokenizer


Words = list[tuple[str, list[int]]]  # words in order, with the positions of their tokens


@dataclass(frozen=True)
class Encoded:
    """What one text encoder read: `ids` b n, whose first token stands at `start` in the denoiser's text sequence.

    A long prompt may be read in `chunks` of equal length, each with a start and an end of its own.
    """

    tokenizer: Any  # of transformers, or what wraps one
    ids: Int[Tensor, "b n"]
    start: int = 0
    chunks: int = 1

    def words(self, image: int) -> Words:
        """The words of one image's prompt, with their positions in the denoiser's text sequence."""
        rows = self.ids[image].unflatten(0, (self.chunks, -1)).tolist()
        starts = range(self.start, self.start + self.ids.shape[1], len(rows[0]))
        found = [(start, words(self.tokenizer, row)) for start, row in zip(starts, rows, strict=True)]
        return [(word, [start + p for p in positions]) for start, of_row in found for word, positions in of_row]


def encoder_ids(args: tuple, kwargs: dict) -> Int[Tensor, "b n"]:
    """The token ids of a text encoder's call, as a forward pre-hook sees it."""
    return (args[0] if args else kwargs["input_ids"]).cpu()


# ---- words -----------------------------------------------------------------------------------------------------------
def words(tokenizer: Any, ids: Sequence[int]) -> Words:
    """The prompt's words, in order, with the positions of their tokens. Special tokens belong to none.

    The sequence ends at the first end token: CLIP pads with that token. The vectors of one textual inversion (`<cat>`,
    `<cat>_1`, ...) are one word, and a sign of punctuation is one.
    """
    end = tokenizer.eos_token or tokenizer.sep_token
    special = {tokenizer.bos_token, tokenizer.cls_token, tokenizer.pad_token} - {tokenizer.unk_token}
    tokens = tokenizer.convert_ids_to_tokens(list(ids))
    content = tokens[: tokens.index(end)] if end in tokens else tokens
    found: Words = []
    for text, first, position in _pieces(tokenizer, content):
        if content[position] in special:
            continue
        if first or not found:
            found.append((text, [position]))
        else:
            found[-1] = (found[-1][0] + text, [*found[-1][1], position])
    return [(_readable(tokenizer, text), positions) for text, positions in found if text]


def _pieces(tokenizer, tokens) -> Iterator[tuple[str, bool, int]]:
    """Each token's text, whether it begins a word, and its position; added tokens are words whatever the tokenizer."""
    rule, added, start = _rule(tokenizer), set(tokenizer.get_added_vocab()) - {tokenizer.unk_token}, 0
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


def _rule(tokenizer) -> Callable[..., Iterator[tuple[str, bool, int]]]:
    """What `_pieces` asks about tokens that were not added."""
    rules = {CLIPTokenizer: _clip_pieces, T5Tokenizer: _t5_pieces, BertTokenizer: _bert_pieces}
    rule = next((rule for kind, rule in rules.items() if _is(tokenizer, kind)), None)
    if rule is None:
        raise ValueError(
            "Expected a CLIP, T5 or BERT tokenizer, whose tokens show where words begin, but got "
            f"{type(tokenizer).__name__}: pass `region_tokens`, for example {{'cat': [2]}} (positions in the text sequence)."
        )
    return rule


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

    An apostrophe within a word ("it's") is a sign that the word goes on behind; at its beginning it is a quotation mark.
    """
    opens, previous = True, ""
    for position, token in enumerate(tokens):
        text = token.removeprefix("▁")
        sign = bool(text) and not any(map(str.isalnum, text)) and token != tokenizer.unk_token
        first = previous != "▁" and (opens or sign or token.startswith("▁"))  # a lone mark is followed by its word
        yield text, first, position
        within = token in ("'", "’") and previous not in ("▁", "'", "’")  # an apostrophe, no quotation mark
        opens, previous = sign and not within, token


def _bert_pieces(tokenizer, tokens):
    for position, token in enumerate(tokens):
        yield token.removeprefix("##"), not token.startswith("##"), position


def _readable(tokenizer, text):
    return tokenizer.convert_tokens_to_string([text]).strip() or text


def is_unknown(tokenizer: Any, word: str) -> bool:
    """Whether a word is unknown tokens and nothing else."""
    return tokenizer.unk_token is not None and not word.replace(tokenizer.unk_token, "")


def sentence(encoded: Sequence[Encoded], image: int, chosen: Callable[[Words], Words] = list) -> Words:
    """The words of one image's prompt with their positions in the whole text sequence.

    Where several encoders read it one after another, a word's tokens are those of all of them. What a tokenizer does not
    know at all is left out: one unknown word is to it as any other. `chosen` picks from the words of each.
    """
    found: dict[tuple[str, int], tuple[str, list[int]]] = {}
    for part in encoded:
        seen: dict[str, int] = {}
        read = [pair for pair in part.words(image) if not is_unknown(part.tokenizer, pair[0])]
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
    end = tokenizer.eos_token_id if tokenizer.eos_token_id is not None else tokenizer.sep_token_id
    return ids if end in ids[:-1] else tokenizer(text, verbose=False).input_ids
