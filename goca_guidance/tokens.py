"""Token ids and a tokenizer to a `TokenLayout`: which tokens are observed, and which form one region (CLIP rule)."""

from collections.abc import Mapping, Sequence

import torch
from jaxtyping import Int
from torch import Tensor
from transformers import CLIPTokenizer

from goca_guidance.config import STOP_WORDS
from goca_guidance.records import TokenLayout


SINK = "<sos>"  # label of the region that CLIP's start token owns


def encoder_ids(args: tuple, kwargs: dict) -> Int[Tensor, "b n"]:
    """The token ids of a text encoder's call, as a forward pre-hook sees it."""
    return (args[0] if args else kwargs["input_ids"]).cpu()


def words(tokenizer: CLIPTokenizer, ids: Sequence[int]) -> list[tuple[str, list[int]]]:
    """The prompt's words, in order, with the positions of their tokens. Special tokens belong to none.

    CLIP closes each word with `</w>`. The sequence ends at the first end token, because CLIP pads with that token.
    """
    found: list[tuple[str, list[int]]] = []
    text, positions, added = "", list[int](), tokenizer.get_added_vocab()
    for position, token in enumerate(tokenizer.convert_ids_to_tokens(list(ids))):
        if token == tokenizer.eos_token:
            break
        if token == tokenizer.bos_token:
            continue
        text, positions = text + token.removesuffix("</w>"), [*positions, position]
        if token.endswith("</w>") or token in added:
            found.append((_readable(tokenizer, text), positions))
            text, positions = "", []
    return [*found, (_readable(tokenizer, text), positions)] if positions else found


def _readable(tokenizer, text):
    return tokenizer.convert_tokens_to_string([text]).strip() or text


def prompt_layout(
    tokenizer: CLIPTokenizer, ids: Int[Tensor, "b n"], drop_stop_words: bool = False, sink: int = 0
) -> TokenLayout:
    """One region for every word of each prompt, and one for the start token, which is no content (generation).

    Stop words can be left out, where the prompt has others.
    """
    entities = []
    for row in ids.tolist():
        found = words(tokenizer, row)
        if drop_stop_words:
            found = [(word, at) for word, at in found if word.lower() not in STOP_WORDS] or found
        if not found:
            raise ValueError(
                "Expected a prompt with at least one word to form a region, but got "
                f"{tokenizer.decode(row, skip_special_tokens=True)!r}. Write a word, or pass use_scfg=False."
            )
        entities.append(found)
    return layout(entities, sink)


def token_layout(tokenizer: CLIPTokenizer, ids: Int[Tensor, "b n"]) -> TokenLayout:
    """One region for every single token, special and padding ones included (the rule of S-CFG's own segmentor)."""
    named = [list(enumerate(tokenizer.convert_ids_to_tokens(row))) for row in ids.tolist()]
    return layout([[(token, [position]) for position, token in row] for row in named], sink=None)


def named_layout(
    regions: Mapping[str, Sequence[int]] | Sequence[Mapping[str, Sequence[int]]],
    batch: int,
    length: int,
    sink: int = 0,
) -> TokenLayout:
    """Regions that the caller names by token positions, one mapping for all prompts or one for each."""
    mappings = [regions] * batch if isinstance(regions, Mapping) else list(regions)
    if len(mappings) != batch:
        raise ValueError(
            f"Expected `region_tokens` to be one mapping or {batch} (one for each prompt), but got {len(mappings)}."
        )
    for mapping in mappings:
        for name, positions in mapping.items():
            if isinstance(positions, int):
                raise TypeError(
                    f"Expected a list of positions for region {name!r}, but got {positions}: use [{positions}]."
                )
            if not positions or not all(0 <= p < length for p in positions):
                raise ValueError(
                    f"Expected token positions from 0 to {length - 1} for region {name!r}, but got {list(positions)}."
                )
        if not mapping:
            raise ValueError("Expected `region_tokens` to name at least one region, but got an empty mapping.")
    return layout([[(name, list(positions)) for name, positions in mapping.items()] for mapping in mappings], sink)


def class_layout(tokenizer: CLIPTokenizer, ids: Int[Tensor, "b n"], names: Sequence[str]) -> TokenLayout:
    """One region for each class name, wherever its words stand in each prompt (segmentation)."""
    spellings = {name: [word for word, _ in words(tokenizer, tokenizer(name).input_ids)] for name in names}
    prompts = [words(tokenizer, row) for row in ids.tolist()]
    found = [[(name, _find(prompt, name, spellings, ids.shape[1])) for name in names] for prompt in prompts]
    return layout(found, sink=None)


def _find(prompt, name, spellings, length):
    """Positions of every whole-word occurrence of a name that is not part of a longer name."""
    wanted, spelled = spellings[name], [word for word, _ in prompt]
    longer = [other for other in spellings.values() if len(other) > len(wanted)]
    taken = {i + j for other in longer for i in _occurrences(spelled, other) for j in range(len(other))}
    starts = [i for i in _occurrences(spelled, wanted) if i not in taken]
    if not starts:
        raise ValueError(
            f"Expected the class {name!r} among the words that the text encoder reads, but it reads {' '.join(spelled)!r}. "
            f"Name it in the prompt, or shorten the prompt: the encoder keeps {length} tokens."
        )
    return [p for i in starts for _, positions in prompt[i : i + len(wanted)] for p in positions]


def _occurrences(words_, wanted):
    return [i for i in range(len(words_) - len(wanted) + 1) if words_[i : i + len(wanted)] == wanted] if wanted else []


def layout(entities: Sequence[Sequence[tuple[str, list[int]]]], sink: int | None) -> TokenLayout:
    """Pad the regions of a batch to one shape; with a `sink` position, its token becomes the last region of each prompt."""
    if sink is not None:
        entities = [[*regions, (SINK, [sink])] for regions in entities]
    tokens = [sorted({p for _, positions in regions for p in positions}) for regions in entities]
    m, k = max(map(len, tokens)), max(map(len, entities))
    columns = torch.zeros(len(tokens), m, dtype=torch.long)
    groups, content = torch.zeros(len(tokens), m, k), torch.zeros(len(tokens), m, dtype=torch.bool)
    for b, regions in enumerate(entities):
        columns[b, : len(tokens[b])] = torch.tensor(tokens[b])
        content[b, : len(tokens[b])] = torch.tensor([p != sink for p in tokens[b]])
        for region, (_, positions) in enumerate(regions):
            groups[b, [tokens[b].index(p) for p in positions], region] = 1 / len(positions)
    return TokenLayout(tuple(tuple(name for name, _ in regions) for regions in entities), columns, groups, content)
