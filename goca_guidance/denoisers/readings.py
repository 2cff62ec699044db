"""Which of what the text encoders read is the prompt, and which the negative prompt."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import permutations
from typing import Any

import torch
from torch import Tensor

from goca_guidance.denoisers.places import Part, Read, Run, placed
from goca_guidance.denoisers.spelling import content, find_prompt
from goca_guidance.denoisers.words import Encoded, bare, has_marks, ids_of


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


# ---- by rows ---------------------------------------------------------------------------------------------------------
def told_by_rows(
    reads: Sequence[Sequence[Read]],
    tokenizers: Sequence[Any],
    texts: Sequence[Part],
    prompts: Sequence[Texts] | None,
) -> list[Encoded] | None:
    """What the encoders read of a text whose rows the denoiser got, wherever they stand; None where no row is theirs.

    Args:
        reads: every call, by encoder.
        texts: the parts of the denoiser's text, in the order of its tokens; each is one [T c] for each image.
        prompts: what the text may be, in one or several forms; None where nobody knows.
    """
    of_images = placed(reads, texts)
    if not of_images or not all(of_images):
        return None
    each, found = _of_each(prompts, len(of_images)), []
    for part, encoder in sorted({(run.part, run.source[0]) for runs in of_images for run in runs}):
        runs_of_it = [[run for run in runs if (run.part, run.source[0]) == (part, encoder)] for runs in of_images]
        found.append(_standing(reads[encoder], bare(tokenizers[encoder]), runs_of_it, each))
    return found


def _standing(reads: Sequence[Read], tokenizer, of_images: Sequence[Sequence[Run]], prompts) -> Encoded:
    """One encoder's texts, those of an image one after another, with the places of their tokens."""
    rows = [read.ids.tolist() if has_marks(tokenizer) else read.rows() for read in reads]
    sources = [list(dict.fromkeys(run.source for run in runs)) for runs in of_images]
    size, chunks = max(len(rows[call][row]) for of in sources for _, call, row in of), max(map(len, sources))
    ids = torch.full((len(sources), chunks * size), -1, dtype=torch.long, device="cpu")
    places = ids.clone()
    for image, runs in enumerate(of_images):
        for slot, (_, call, row) in enumerate(sources[image]):
            found = torch.tensor(rows[call][row], dtype=torch.long, device="cpu")
            ids[image, slot * size : slot * size + len(found)] = found
        for run in runs:
            first = sources[image].index(run.source) * size + run.first
            places[image, first : first + run.length] = torch.arange(run.place, run.place + run.length, device="cpu")
    return Encoded(tokenizer, ids, 0, chunks, places, prompts, [row for of_call in rows for row in of_call])


def other_text(encoded: Encoded, prompts: Sequence[Texts] | None) -> Encoded | None:
    """What an encoder read besides, before the denoiser gets it (of the negative prompt), as if it were handed over alike."""
    tokenizer, count = encoded.tokenizer, len(encoded.ids)
    known = [[i for i in row if i >= 0] for row in encoded.ids.tolist()]
    rest = [list(row) for row in encoded.others if [i for i in row if i >= 0] not in known]
    if encoded.chunks > 1 or len(rest) not in (1, count):
        return None
    rest, places = rest * count if len(rest) == 1 else rest, []
    for image, (row, before) in enumerate(zip(rest, encoded.ids.tolist(), strict=True)):
        at = encoded.places_of(image)
        shift = content(tokenizer, before)[0] - content(tokenizer, row)[0]  # of padding on the left
        moved = ((p + shift, p) for p in range(len(row)))
        first = next(p for p, place in enumerate(at) if place >= 0)
        places.append([at[first] + q - first if q >= first and row[p] >= 0 else -1 for q, p in moved])
    ids, stand = (torch.tensor(each, dtype=torch.long, device="cpu") for each in (rest, places))
    return Encoded(tokenizer, ids, 0, 1, stand, _of_each(prompts, count), encoded.others)


def _of_each(forms: Sequence[Texts] | None, count: int) -> list[tuple[str, ...]] | None:
    """What the text of each image may be."""
    fitting = [form for form in forms or () if len(form) == count]
    return list(zip(*fitting, strict=True)) if fitting else None


# ---- by ids ----------------------------------------------------------------------------------------------------------
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
        tokenizer, others = bare(tokenizer), [row for ids in of_encoder for row in ids.tolist()]
        reading = _told(of_encoder, tokenizer, chunks, prompts or len(of_encoder[0]), asked)
        if reading is None:
            return None
        for number, (parts, ids) in enumerate(zip(found, reading, strict=True)):
            if ids is not None:
                forms = None if asked is None else (asked.prompts, asked.negatives)[number]
                parts.append(Encoded(tokenizer, ids, start, chunks, None, _of_each(forms, len(ids)), others))
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
    if not has_marks(tokenizer):
        return any(
            all(find_prompt(tokenizer, row, [text])[1] for row, text in zip(ids.tolist(), texts, strict=True))
            for texts in forms
            if len(texts) == len(ids)
        )
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
