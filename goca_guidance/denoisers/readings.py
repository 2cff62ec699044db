"""Which of what the text encoders read is the prompt, and which the negative prompt."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import permutations
from typing import Any

import torch
from torch import Tensor

from goca_guidance.denoisers.words import Encoded, ids_of


Texts = list[str]  # one of each image's prompt
Reading = tuple[Tensor, Tensor | None]  # ids of the prompts [b n] and of the negative prompts, of one encoder


@dataclass(frozen=True)
class Asked:
    """What a call was asked to draw, to be found again in what the encoders read.

    `prompts`, `negatives`: the texts as an encoder may get them, in one or several forms. `trusted`: the pipeline is one of
    diffusers', which read the prompt first, whatever they make of it.
    """

    prompts: Sequence[Texts]
    negatives: Sequence[Texts]
    trusted: bool


def told_apart(
    reads: Sequence[Sequence[Tensor]],
    tokenizers: Sequence[Any],
    length: int,
    whole: bool,
    prompts: int | None,
    asked: Asked | None,
) -> tuple[list[Encoded], list[Encoded]] | None:
    """What the encoders read for the prompts and for the negative prompts (nothing where they did not), or None: unknown.

    Args:
        reads: ids [rows n] of every call, by encoder.
        length: tokens of the denoiser's text.
        whole: all encoders are loaded, so that their tokens are all of the denoiser's text.
        prompts: how many; None is as many as were read at once.
        asked: None where nobody knows.
    """
    lengths = [of_encoder[0].shape[1] if of_encoder else 0 for of_encoder in reads]
    chunks = length // lengths[0] if len(reads) == 1 and lengths[0] and length % lengths[0] == 0 else 1
    if not all(lengths) or chunks * sum(lengths) > length or (whole and chunks * sum(lengths) != length):
        return None
    found: tuple[list[Encoded], list[Encoded]] = [], []
    start = 0
    for of_encoder, tokenizer in zip(reads, tokenizers, strict=True):
        reading = _told(of_encoder, tokenizer, chunks, prompts or len(of_encoder[0]), asked)
        if reading is None:
            return None
        for parts, ids in zip(found, reading, strict=True):
            if ids is not None:
                parts.append(Encoded(tokenizer, ids, start, chunks))
        start += chunks * of_encoder[0].shape[1]
    return found


def _told(reads, tokenizer, chunks, prompts, asked) -> Reading | None:
    """Of one encoder: the only order in which the texts are found again, or diffusers' own."""
    if len({ids.shape[1] for ids in reads}) > 1:
        return None
    if {len(ids) for ids in reads} == {1, prompts} and len(reads) == 2:  # one negative prompt serves all (Flux)
        reads = [ids.expand(prompts, -1) for ids in reads]
    plain = chunks == 1 and len(reads) <= 2 and all(len(ids) == prompts for ids in reads)
    stock = (reads[0], reads[1] if len(reads) == 2 else None) if plain else None
    if asked is None:
        return stock
    told = [
        (
            ids,
            negative,
            _says(tokenizer, ids, chunks, asked.prompts),
            _says(tokenizer, negative, chunks, asked.negatives),
        )
        for ids, negative in _orders(torch.cat(list(reads)), chunks, prompts)
    ]
    sure = [(ids, negative) for ids, negative, positive, other in told if positive and other]
    if sure:
        return sure[0] if all(torch.equal(ids, sure[0][0]) for ids, _ in sure) else None
    if stock is None:
        return None
    swapped = any(positive for _, _, positive, _ in told)  # the prompt is there, but so is something unknown
    known = stock[1] is not None and not swapped and _says(tokenizer, stock[1], 1, asked.negatives)
    return stock if asked.trusted or known else None


def _orders(rows: Tensor, chunks: int, prompts: int) -> Iterator[Reading]:
    """Every order in which one or two texts, their chunks and images may have been read; the prompt may be the second."""
    texts, rest = divmod(len(rows), chunks * prompts)
    if rest or texts not in (1, 2):
        return
    sizes = {"text": texts, "image": prompts, "chunk": chunks}
    for order in permutations(sizes):
        found = rows.reshape(*(sizes[axis] for axis in order), -1)
        found = found.permute(*(order.index(axis) for axis in sizes), 3).flatten(2)
        for first in range(texts):
            yield found[first], found[1 - first] if texts == 2 else None


def _says(tokenizer, ids: Tensor | None, chunks: int, forms: Sequence[Texts]) -> bool:
    """Whether ids [b n] are those of a text for each image, cut where the encoder ends; nothing says everything."""
    if ids is None:
        return True
    read = [_content(tokenizer, row, chunks) for row in ids]
    room = ids.shape[1] - 2 * chunks  # a start and an end
    return any(
        all(
            _begins(content, _tokens(tokenizer, text, ids.shape[1]), room)
            for content, text in zip(read, texts, strict=True)
        )
        for texts in forms
        if len(texts) == len(read)
    )


def _begins(content: list[int], text: list[int], room: int) -> bool:
    return content == text or (len(content) >= max(room, 1) and content == text[: len(content)])


def _content(tokenizer, row: Tensor, chunks: int) -> list[int]:
    """The ids of a text, without those of its start, end and padding."""
    end = tokenizer.eos_token_id if tokenizer.eos_token_id is not None else tokenizer.sep_token_id
    special = {tokenizer.bos_token_id, tokenizer.cls_token_id, tokenizer.pad_token_id} - {tokenizer.unk_token_id}
    found: list[int] = []
    for ids in row.unflatten(0, (chunks, -1)).tolist():
        until = ids.index(end) if end in ids else len(ids)
        found += [i for i in ids[:until] if i not in special]
    return found


def _tokens(tokenizer, text: str, length: int) -> list[int]:
    ids = torch.tensor(ids_of(tokenizer, text, length), dtype=torch.long, device="cpu")
    return _content(tokenizer, ids, 1)


def forms_of(texts: Any, count: int, convert: Callable[[str], str]) -> list[Texts]:
    """A prompt, or one for each image, as given and as converted for the tokenizer; none is empty."""
    each = [texts or ""] * count if texts is None or isinstance(texts, str) else list(texts)
    return [each, [convert(text) for text in each]]
