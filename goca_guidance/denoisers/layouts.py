"""Words with their token positions to a `TokenLayout`: which tokens are observed, and which form one region."""

import re
import unicodedata
from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch

from goca_guidance.denoisers.function_words import content_words, is_sign, spoken_words
from goca_guidance.denoisers.spelling import UNSPACED
from goca_guidance.denoisers.words import Encoded, Words, has_marks, ids_of, is_unknown, sentence, words
from goca_guidance.method.records import TokenLayout


SINK = "<sos>"  # label of the region that the start token owns
ATOM = re.compile(  # <unk> and <toy> are whole; a letter is one where words have no spaces
    rf".*<.+>.*|[{UNSPACED}]|['’]?(?:(?![{UNSPACED}])[^\W_])+|[\W_]", re.DOTALL
)
END = "</s>"  # name of the sink among regions that the caller names, where it is the end token


def named_words(encoded: Sequence[Encoded], sink: str) -> dict[str, list[int]]:
    """The words of a prompt, in the form that `named_layout` takes; a word that stands twice is one region."""
    found: dict[str, list[int]] = {}
    if not any(part.holds(0) for part in encoded):
        raise ValueError(
            "Expected the prompt among what the text encoders read, but they read "
            f"{' '.join(part.text(0) for part in encoded)!r}: use positions of your own (`region_tokens`)."
        )
    for word, positions in sentence(encoded, 0):
        found.setdefault(word, []).extend(positions)
    sinks, is_start = _sinks(encoded, sink)
    return found if is_start else {**found, END: sinks}


# ---- layouts ---------------------------------------------------------------------------------------------------------
def prompt_layout(encoded: Sequence[Encoded], sink: str | None, drop_stop_words: bool = False) -> TokenLayout:
    """One region for every known word of each prompt (generation). Function words and signs can be left out.

    `sink` says which token looks at the background. "start": the first one, which forms a region as well that is no
    content. "end": the one behind the prompt, as where a text has no start. None: no token does.
    """
    entities = []
    for image in range(len(encoded[0].ids)):
        found = sentence(encoded, image)
        if not found:
            read = " ".join(part.text(image) for part in encoded)
            raise ValueError(
                "Expected a prompt with at least one word that the tokenizer knows, to form a region, but prompt "
                f"{image} reads {read!r}: write a word, or pass `region_tokens` or use_scfg=False."
            )
        entities.append(_content(encoded, image) or found if drop_stop_words else found)
    return layout(entities) if sink is None else layout(entities, *_sinks(encoded, sink))


def _content(encoded, image) -> Words:
    """The words that may show a thing, or those that are no signs, or none."""
    return sentence(encoded, image, content_words) or sentence(encoded, image, spoken_words)


def token_layout(encoded: Sequence[Encoded], sink: str, drop_stop_words: bool = False) -> TokenLayout:
    """One region for every single token, special and padding ones included (the rule of S-CFG's own segmentor).

    It drops nothing, whatever is asked.
    """
    entities = [
        [(token, [place]) for part in encoded for token, place in part.tokens(image)]
        for image in range(len(encoded[0].ids))
    ]
    return layout(entities, _sinks(encoded, sink)[0])


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
    entities = [[(n, list(p)) for n, p in mapping.items() if n != END] for mapping in mappings]
    if not all(entities):
        raise ValueError("Expected `region_tokens` to name at least one region, but got an empty mapping.")
    if all(END in mapping for mapping in mappings):
        return layout(entities, [mapping[END][0] for mapping in mappings])
    if encoded:
        return layout(entities, *_sinks(encoded, sink))
    if sink == "end":
        raise ValueError(
            "Expected `region_tokens` to name the prompt's end token too, whose attention tells the background, but got "
            f'none: add its position, for example "{END}": [7].'
        )
    return layout(entities, [0] * batch, region_of_sink=True)


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


def _sinks(encoded, sink) -> tuple[list[int], bool]:
    """Place of each prompt's sink, and whether it is the start; it is no padding."""
    images = range(len(encoded[0].ids))
    starts = [encoded[0].start_token(image) for image in images]
    if sink == "start" and None not in starts:
        return starts, True
    for part in reversed(encoded):  # the last text that goes on behind the prompt: Llama's ends with it (HiDream)
        ends = [place for image in images if (place := part.behind_prompt(image)) is not None]
        if len(ends) == len(images):
            return ends, False
    return [encoded[-1].end_token(image) for image in images], False


# ---- classes ---------------------------------------------------------------------------------------------------------
def class_prompt(names: Sequence[str]) -> str:
    """Names with commas between them.

    Behind a sign or a digit stands a space, or tokenizers would read the comma with it: "),", "++,", "2,".
    """
    return re.sub(
        "([^\\s,]),", lambda found: f"{found[1]}," if found[1].isalpha() else f"{found[1]} ,", ", ".join(names)
    )


def class_layout(encoded: Sequence[Encoded], names: Sequence[Sequence[str]], background: int = 0) -> TokenLayout:
    """One region for each class name of each image, wherever its words stand in the image's prompt (segmentation).

    A name can hold several phrases, separated by commas: its region averages the tokens of all of them. The first `background`
    names are background entities, which share one score, and an empty one is padding. ValueError for a name that no encoder
    reads, and for two that none can tell apart.
    """
    found: list[dict[str, list[int]]] = [{phrase: [] for name in each for phrase in _phrases(name)} for each in names]
    for part in encoded:
        phrases = dict.fromkeys(phrase for of_image in found for phrase in of_image)
        spelled = {phrase: _spelled(part, phrase) for phrase in phrases}
        for image, of_image in enumerate(found):
            prompt, spellings = _atoms(part.words(image)), {phrase: spelled[phrase] for phrase in of_image}
            for phrase, positions in of_image.items():
                positions.extend(_find(prompt, phrase, spellings))
    for image, (each, of_image) in enumerate(zip(names, found, strict=True)):
        for name in filter(None, each):
            _check_found(encoded, image, name, of_image)
        _check_distinct(each, of_image)
    regions = [[(name, _tokens(name, of_image)) for name in each] for each, of_image in zip(names, found, strict=True)]
    return replace(layout(regions), background=background)


def _phrases(name: str) -> list[str]:
    return [phrase.strip() for phrase in name.split(",") if phrase.strip()]


def _tokens(name: str, found: dict[str, list[int]]) -> list[int]:
    return sorted({position for phrase in _phrases(name) for position in found[phrase]})


def _spelled(part, phrase) -> list[str]:
    """A phrase as the atoms that are looked for; none where the tokenizer knows nothing of it, or its signs only."""
    if not has_marks(part.tokenizer):
        return [atom for atom, _ in _atoms([(phrase, [])])]
    read = words(part.tokenizer, ids_of(part.tokenizer, phrase, part.ids.shape[1]))
    known = [word for word, _ in read if not is_unknown(part.tokenizer, word)]
    lost = len(known) < len(read) and all(map(is_sign, known))
    return [] if lost else [word for word, _ in _atoms(read)]


def _atoms(found: Words) -> Words:
    """Words cut at signs: one token may hold the end of a name and what follows, as in "),"."""
    composed = ((unicodedata.normalize("NFC", word), positions) for word, positions in found)
    return [(atom.lower(), positions) for word, positions in composed for atom in ATOM.findall(word) if atom.strip()]


def _find(prompt, name, spellings) -> list[int]:
    """Positions of every whole-word occurrence of a name that is not part of a longer name."""
    wanted, spelled = spellings[name], [word for word, _ in prompt]
    longer = [other for other in spellings.values() if len(other) > len(wanted)]
    taken = {i + j for other in longer for i in _occurrences(spelled, other) for j in range(len(other))}
    starts = [i for i in _occurrences(spelled, wanted) if i not in taken]
    return [p for i in starts for _, positions in prompt[i : i + len(wanted)] for p in positions]


def _occurrences(words_, wanted):
    return [i for i in range(len(words_) - len(wanted) + 1) if words_[i : i + len(wanted)] == wanted] if wanted else []


def _check_found(encoded, image, name, found):
    missing = next((phrase for phrase in _phrases(name) or [name] if not found.get(phrase)), None)
    if missing is None:
        return
    if not any(_spelled(part, missing) for part in encoded):
        raise ValueError(
            f"Expected class names that the tokenizer knows, but it knows nothing of {missing!r}: use other words, in the "
            "language of the model (mostly English)."
        )
    raise ValueError(
        f"Expected the class {missing!r} among the words that the text encoder reads, but it reads "
        f"{' '.join(word for word, _ in sentence(encoded, image))!r}. Name it in the prompt, or shorten the prompt: "
        f"the encoder keeps {encoded[-1].ids.shape[1]} tokens."
    )


def _check_distinct(names: Sequence[str], found: dict[str, list[int]]) -> None:
    seen: dict[tuple[int, ...], str] = {}
    for name in names:
        if (other := seen.setdefault(tuple(_tokens(name, found)), name)) != name:
            raise ValueError(
                f"Expected class names that differ to the tokenizer, but {other!r} and {name!r} are the same tokens: leave "
                "one out, or use another word for it."
            )


def layout(entities: Sequence[Words], sinks: Sequence[int] = (), region_of_sink: bool = False) -> TokenLayout:
    """Pad the regions of a batch to one shape; the sink token of each prompt, if any, can be its last region.

    A region without tokens is padding too.
    """
    if region_of_sink:
        entities = [[*regions, (SINK, [sink])] for regions, sink in zip(entities, sinks, strict=True)]
    tokens = [sorted({p for _, positions in regions for p in positions}) for regions in entities]
    m, k = max(map(len, tokens)), max(map(len, entities))
    columns = torch.zeros(len(tokens), m, dtype=torch.long, device="cpu")
    groups = torch.zeros(len(tokens), m, k, dtype=torch.float32, device="cpu")
    content = torch.zeros(len(tokens), m, dtype=torch.bool, device="cpu")
    for b, regions in enumerate(entities):
        columns[b, : len(tokens[b])] = torch.tensor(tokens[b], dtype=torch.long, device="cpu")
        among = [not region_of_sink or p != sinks[b] for p in tokens[b]]
        content[b, : len(tokens[b])] = torch.tensor(among, dtype=torch.bool, device="cpu")
        for region, (_, positions) in enumerate(regions):
            groups[b, [tokens[b].index(p) for p in positions], region] = 1 / max(1, len(positions))
    labels = tuple(tuple(name for name, _ in regions) for regions in entities)
    sink = torch.tensor(sinks, dtype=torch.long, device="cpu").reshape(len(labels), -1)
    return TokenLayout(labels, columns, groups, content, sink)
