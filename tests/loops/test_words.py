"""Where the words of a prompt stand in what denoisers read: told by rows, against rows that change with a word.

Every way of diffusers to make a text, with its own template, padding, layers and cuts, in the tiny pipelines' real code.
"""

import inspect
from functools import cache

import pytest

from goca_guidance.denoisers.places import read_of
from goca_guidance.denoisers.readings import told_by_rows
from tests.helpers.loops.every import LOOPS, stock
from tests.helpers.loops.tiny_loop import run


TEXT = ("encoder_hidden_states",)
CAUSAL: dict[str, tuple[str, ...]] = {  # by pipeline: arguments that are text, in order
    **dict.fromkeys(
        ("QwenImage", "QwenImage21", "Flux2Klein", "OvisImage", "LongCatImage", "BriaFibo", "CogView4"), TEXT
    ),
    **dict.fromkeys(("Lumina2", "HunyuanVideo", "Krea2", "Sana"), TEXT),
    "ZImage": ("cap_feats",),
    "ErnieImage": ("text_bth",),
    "HunyuanImage": ("encoder_hidden_states_2", *TEXT),
    "HiDreamImage": ("encoder_hidden_states_t5", "encoder_hidden_states_llama3"),
}
BIDIRECTIONAL = dict.fromkeys(("AuraFlow", "Wan"), TEXT)
FIRST, SECOND = "a red cat on grass", "a red dog on grass"


class Stop(Exception):  # noqa: N818 (no error)
    """The denoiser is called."""


def pipeline(name: str):
    return stock(f"{name}Pipeline")


def parts_of(pipe):
    """Text encoders with their tokenizers."""
    models = {
        name: part for name, part in pipe.components.items() if name.startswith("text_encoder") and part is not None
    }
    names = {name: name.replace("text_encoder", "tokenizer") for name in models}
    return [(part, pipe.components.get(names[name]) or pipe.processor) for name, part in models.items()]


@cache
def text_of(name: str, prompt: str):
    """What each encoder read, the encoders' tokenizers, and the last image's text in the denoiser's first call."""
    loop, pipe, given = LOOPS[f"{name}Pipeline"], pipeline(name), {}
    parts = parts_of(pipe)
    reads = [[] for _ in parts]

    def stop(module, args, kwargs):
        given.update(inspect.signature(type(module).forward).bind_partial(module, *args, **kwargs).arguments)
        raise Stop

    def note(of_encoder):
        return lambda module, args, kwargs, output: of_encoder.append(read_of(args, kwargs, output))

    hooks = [pipe.transformer.register_forward_pre_hook(stop, with_kwargs=True)]
    for (model, _), of_encoder in zip(parts, reads, strict=True):
        hooks.append(model.register_forward_hook(note(of_encoder), with_kwargs=True))
    with pytest.raises(Stop):
        run(pipe, loop, prompt)
    for hook in hooks:
        hook.remove()
    texts = [given[argument] for argument in (CAUSAL | BIDIRECTIONAL)[name]]
    texts = [text[0] if text[0].ndim == 3 and name == "HiDreamImage" else text for text in texts]  # its first layer
    conditional = 0 if name == "ZImage" else -1
    return reads, [tokenizer for _, tokenizer in parts], [text[conditional] for text in texts]


def words_of(name: str, prompt: str) -> dict[str, list[int]]:
    reads, tokenizers, texts = text_of(name, prompt)
    encoded = told_by_rows(reads, tokenizers, [[text] for text in texts], [[prompt]])
    found: dict[str, list[int]] = {}
    for part in encoded:
        for word, positions in part.words(0):
            found.setdefault(word, []).extend(positions)
    return found


def changed(name: str) -> list[int]:
    """Places in each part of the text, one after another, where it begins to differ between the two prompts."""
    first, second = (text_of(name, prompt)[2] for prompt in (FIRST, SECOND))
    starts = [sum(len(part) for part in first[:i]) for i in range(len(first))]
    places = []
    for start, (one, other) in zip(starts, zip(first, second, strict=True), strict=True):
        differ = (one != other).flatten(1).any(1).nonzero().flatten().tolist()
        places += [start + differ[0]] if differ else []
    return places


@pytest.mark.parametrize("name", CAUSAL | BIDIRECTIONAL)
def test_words_stand_where_the_text_has_them(name):
    """From the cat on, rows are others than with a dog; before it, they are alike, but where an encoder looks ahead (T5)."""
    found, other = words_of(name, FIRST), words_of(name, SECOND)
    assert list(found) == FIRST.split()
    assert found["cat"] == other["dog"]
    if name == "HiDreamImage":
        assert found["cat"][1:] == changed(name)[1:]
    elif name in CAUSAL:
        assert found["cat"] == changed(name)
    order = [positions for word, positions in found.items()]
    assert all(len(positions) == len(order[0]) for positions in order)
    assert order == [[p + i for p in order[0]] for i in range(len(order))]


@pytest.mark.parametrize("name", ["ZImage", "Lumina2", "HunyuanVideo"])
@pytest.mark.parametrize("prompt", ["user assistant", "a man's dog, 猫"])
def test_words_of_the_template_in_a_prompt(name, prompt):
    """The prompt's own ones are found, which stand behind the template's."""
    found, cat = words_of(name, prompt), words_of(name, FIRST)
    first = next(iter(found.values()))
    assert first[0] - cat["a"][0] in (0, 1)  # a mark of a space may stand alone before the word
    assert "".join(found) == prompt.replace(" ", "")
