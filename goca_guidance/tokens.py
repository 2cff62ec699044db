"""Token ids and tokenizers to a `TokenLayout`: which tokens are observed, and which form one region.

Three rules say where words begin: CLIP closes each word with `</w>`, sentencepiece (T5) opens it with `▁`, and BERT marks
what continues it with `##`.
"""

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby

import torch
from jaxtyping import Int
from torch import Tensor
from transformers import BertTokenizer, CLIPTokenizer, PreTrainedTokenizerBase, T5Tokenizer

from goca_guidance.config import STOP_WORDS
from goca_guidance.records import TokenLayout


SINK = "<sos>"  # label of the region that the start token owns
END = "</s>"  # name of the sink among regions that the caller names, where it is the end token
Words = list[tuple[str, list[int]]]  # words in order, with the positions of their tokens


@dataclass(frozen=True)
class Encoded:
    """What one text encoder read: `ids` b n, whose first token stands at `start` in the denoiser's text sequence."""

    tokenizer: PreTrainedTokenizerBase
    ids: Int[Tensor, "b n"]
    start: int = 0


def encoder_ids(args: tuple, kwargs: dict) -> Int[Tensor, "b n"]:
    """The token ids of a text encoder's call, as a forward pre-hook sees it."""
    return (args[0] if args else kwargs["input_ids"]).cpu()


# ---- words -----------------------------------------------------------------------------------------------------------
def words(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int]) -> Words:
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
    base = None
    for position, token in enumerate(tokens):
        further = base is not None and re.fullmatch(rf"{re.escape(base)}_\d+", token) is not None
        yield "" if further else token, not further, position
        base = base if further else token


def _rule(tokenizer) -> Callable[..., Iterator[tuple[str, bool, int]]]:
    """What `_pieces` asks about tokens that were not added."""
    rules = {CLIPTokenizer: _clip_pieces, T5Tokenizer: _t5_pieces, BertTokenizer: _bert_pieces}
    rule = next((rule for kind, rule in rules.items() if isinstance(tokenizer, kind)), None)
    if rule is None:
        raise ValueError(
            "Expected a CLIP, T5 or BERT tokenizer, whose tokens show where words begin, but got "
            f"{type(tokenizer).__name__}: pass `region_tokens`, for example {{'cat': [2]}} (positions in the text sequence)."
        )
    return rule


def _clip_pieces(tokenizer, tokens):
    opens = True
    for position, token in enumerate(tokens):
        yield token.removesuffix("</w>"), opens, position
        opens = token.endswith("</w>")


def _t5_pieces(tokenizer, tokens):
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


def sentence(encoded: Sequence[Encoded], image: int) -> Words:
    """The words of one image's prompt with their positions in the whole text sequence.

    Where several encoders read it one after another, a word's tokens are those of all of them.
    """
    found: dict[tuple[str, int], tuple[str, list[int]]] = {}
    for part in encoded:
        seen: dict[str, int] = {}
        for word, positions in words(part.tokenizer, part.ids[image].tolist()):
            occurrence = seen[word.lower()] = seen.get(word.lower(), -1) + 1
            _, known = found.setdefault((word.lower(), occurrence), (word, []))
            known.extend(part.start + position for position in positions)
    return list(found.values())


def read(
    prompt: str, tokenizers: Sequence, convert: Callable[[str, object], str], longest: int | None = None
) -> list[Encoded]:
    """What text encoders would read of a prompt one after another; all but the last are padded to their full length.

    `longest` is the length of T5's text, which a pipeline's `max_sequence_length` says.
    """
    encoded: list[Encoded] = []
    for number, tokenizer in enumerate(tokenizers):
        last = number + 1 == len(tokenizers)
        limited = longest and isinstance(tokenizer, T5Tokenizer)
        length = longest if limited else tokenizer.model_max_length
        text, padding = [convert(prompt, tokenizer)], False if last else "max_length"
        ids = tokenizer(text, return_tensors="pt", padding=padding, truncation=True, max_length=length).input_ids
        encoded.append(Encoded(tokenizer, ids, sum(part.ids.shape[1] for part in encoded)))
    return encoded


def named_words(encoded: Sequence[Encoded], sink: str) -> dict[str, list[int]]:
    """The words of a prompt, in the form that `named_layout` takes; a word that stands twice is one region."""
    found: dict[str, list[int]] = {}
    for word, positions in sentence(encoded, 0):
        found.setdefault(word, []).extend(positions)
    return {**found, END: _sinks(encoded, sink)} if sink == "end" else found


# ---- layouts ---------------------------------------------------------------------------------------------------------
def prompt_layout(encoded: Sequence[Encoded], sink: str | None, drop_stop_words: bool = False) -> TokenLayout:
    """One region for every word of each prompt (generation). Stop words can be left out, where the prompt has others.

    `sink` says which token looks at the background. "start": the first one, which forms a region as well that is no
    content. "end": the prompt's end token. None: no token does.
    """
    entities = []
    for image in range(len(encoded[0].ids)):
        found = sentence(encoded, image)
        if drop_stop_words:
            found = [(word, at) for word, at in found if word.lower() not in STOP_WORDS] or found
        if not found:
            text = encoded[0].tokenizer.decode(encoded[0].ids[image], skip_special_tokens=True)
            raise ValueError(
                "Expected a prompt with at least one word to form a region, but got "
                f"{text!r}. Write a word, or pass use_scfg=False."
            )
        entities.append(found)
    return layout(entities, () if sink is None else _sinks(encoded, sink), sink == "start")


def token_layout(encoded: Sequence[Encoded], sink: str) -> TokenLayout:
    """One region for every single token, special and padding ones included (the rule of S-CFG's own segmentor)."""
    entities = [
        [
            (token, [part.start + position])
            for part in encoded
            for position, token in enumerate(part.tokenizer.convert_ids_to_tokens(part.ids[image].tolist()))
        ]
        for image in range(len(encoded[0].ids))
    ]
    return layout(entities, _sinks(encoded, sink), region_of_sink=False)


def named_layout(
    regions: Mapping[str, Sequence[int]] | Sequence[Mapping[str, Sequence[int]]],
    batch: int,
    length: int,
    sink: str,
    encoded: Sequence[Encoded] = (),
) -> TokenLayout:
    """Regions that the caller names by token positions, one mapping for all prompts or one for each.

    Where the end token is the sink and no prompt was read, it must be among them, as "</s>".
    """
    mappings = [regions] * batch if isinstance(regions, Mapping) else list(regions)
    if len(mappings) != batch:
        raise ValueError(
            f"Expected `region_tokens` to be one mapping or {batch} (one for each prompt), but got {len(mappings)}."
        )
    for mapping in mappings:
        _check_named(mapping, length)
    entities = [[(n, list(p)) for n, p in mapping.items() if sink == "start" or n != END] for mapping in mappings]
    if not all(entities):
        raise ValueError("Expected `region_tokens` to name at least one region, but got an empty mapping.")
    if sink == "end" and not all(END in mapping for mapping in mappings):
        if not encoded:
            raise ValueError(
                "Expected `region_tokens` to name the prompt's end token too, whose attention tells the background, but got "
                f'none: add its position, for example "{END}": [7].'
            )
        return layout(entities, _sinks(encoded, sink), region_of_sink=False)
    sinks = [0 if sink == "start" else mapping[END][0] for mapping in mappings]
    return layout(entities, sinks, sink == "start")


def _check_named(mapping, length):
    for name, positions in mapping.items():
        if isinstance(positions, int):
            raise TypeError(
                f"Expected a list of positions for region {name!r}, but got {positions}: use [{positions}]."
            )
        if not positions or not all(0 <= p < length for p in positions):
            raise ValueError(
                f"Expected token positions from 0 to {length - 1} for region {name!r}, but got {list(positions)}."
            )


def _sinks(encoded, sink) -> list[int]:
    if sink == "start":
        return [0] * len(encoded[0].ids)
    last = encoded[-1]
    ends = (row.index(last.tokenizer.eos_token_id) for row in last.ids.tolist())
    return [last.start + position for position in ends]


def class_layout(encoded: Sequence[Encoded], names: Sequence[Sequence[str]]) -> TokenLayout:
    """One region for each class name of each image, wherever its words stand in the image's prompt (segmentation).

    A name can hold several phrases, separated by commas: its region averages the tokens of all of them.
    """
    found: list[dict[str, list[int]]] = [{phrase: [] for name in own for phrase in _phrases(name)} for own in names]
    for part in encoded:
        phrases = dict.fromkeys(phrase for own in found for phrase in own)
        spelled = {phrase: _spelled(words(part.tokenizer, part.tokenizer(phrase).input_ids)) for phrase in phrases}
        for row, own in zip(part.ids.tolist(), found, strict=True):
            prompt, spellings = words(part.tokenizer, row), {phrase: spelled[phrase] for phrase in own}
            for phrase, positions in own.items():
                positions.extend(part.start + p for p in _find(prompt, phrase, spellings))
    for image, own in enumerate(found):
        if missing := next((phrase for phrase, positions in own.items() if not positions), None):
            raise ValueError(
                f"Expected the class {missing!r} among the words that the text encoder reads, but it reads "
                f"{' '.join(word for word, _ in sentence(encoded, image))!r}. Name it in the prompt, or shorten the prompt: "
                f"the encoder keeps {encoded[-1].ids.shape[1]} tokens."
            )
    return layout([[(name, _tokens(name, own)) for name in of] for of, own in zip(names, found, strict=True)])


def _phrases(name: str) -> list[str]:
    return [phrase.strip() for phrase in name.split(",") if phrase.strip()]


def _tokens(name: str, found: dict[str, list[int]]) -> list[int]:
    return sorted({position for phrase in _phrases(name) for position in found[phrase]})


def _spelled(found: Words) -> list[str]:
    return [word.lower() for word, _ in found]


def _find(prompt, name, spellings) -> list[int]:
    """Positions of every whole-word occurrence of a name that is not part of a longer name."""
    wanted, spelled = spellings[name], _spelled(prompt)
    longer = [other for other in spellings.values() if len(other) > len(wanted)]
    taken = {i + j for other in longer for i in _occurrences(spelled, other) for j in range(len(other))}
    starts = [i for i in _occurrences(spelled, wanted) if i not in taken]
    return [p for i in starts for _, positions in prompt[i : i + len(wanted)] for p in positions]


def _occurrences(words_, wanted):
    return [i for i in range(len(words_) - len(wanted) + 1) if words_[i : i + len(wanted)] == wanted] if wanted else []


def layout(entities: Sequence[Words], sinks: Sequence[int] = (), region_of_sink: bool = False) -> TokenLayout:
    """Pad the regions of a batch to one shape; the sink token of each prompt, if any, can be its last region."""
    if region_of_sink:
        entities = [[*regions, (SINK, [sink])] for regions, sink in zip(entities, sinks, strict=True)]
    tokens = [sorted({p for _, positions in regions for p in positions}) for regions in entities]
    m, k = max(map(len, tokens)), max(map(len, entities))
    columns = torch.zeros(len(tokens), m, dtype=torch.long)
    groups, content = torch.zeros(len(tokens), m, k), torch.zeros(len(tokens), m, dtype=torch.bool)
    for b, regions in enumerate(entities):
        columns[b, : len(tokens[b])] = torch.tensor(tokens[b])
        content[b, : len(tokens[b])] = torch.tensor([not region_of_sink or p != sinks[b] for p in tokens[b]])
        for region, (_, positions) in enumerate(regions):
            groups[b, [tokens[b].index(p) for p in positions], region] = 1 / len(positions)
    labels = tuple(tuple(name for name, _ in regions) for regions in entities)
    sink = torch.tensor(sinks, dtype=torch.long).reshape(len(labels), -1)
    return TokenLayout(labels, columns, groups, content, sink)
