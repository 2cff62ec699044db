"""What shows no thing: function words and signs, as each tokenizer cuts them, and no word that names a thing."""

import pytest

from eval.datasets.ade20k import ADE20K
from eval.datasets.coco import COCO_OBJECT, STUFF_171
from eval.datasets.pascal import CONTEXT
from goca_guidance.denoisers.function_words import content_words
from goca_guidance.denoisers.layouts import prompt_layout
from goca_guidance.denoisers.words import Encoded
from tests.helpers.tokens import READERS, TOKENIZERS, ids, t5


@pytest.fixture(params=[("clip",), ("t5",), ("bert",), ("bert", "t5")], ids="-".join)
def regions(request):
    """Labels, in lower case, of a prompt's regions; several tokenizers as they stand one after another (HunyuanDiT)."""

    def regions(prompt):
        encoded = []
        for tokenizer in map(READERS.get, request.param):
            encoded.append(Encoded(tokenizer, ids(prompt, tokenizer=tokenizer, length=256), 256 * len(encoded)))
        return [label.lower() for label in prompt_layout(encoded, None, drop_stop_words=True).labels[0]]

    return regions


@pytest.mark.parametrize(
    ("prompt", "expected"),
    [
        ("a cat behind a bus", "cat bus"),
        ("A CAT BEHIND THE BUS", "cat bus"),
        ("a dog running down and out, through or across it, while she sits up", "dog running sits"),
        ("the dog that is not in there", "dog"),
        ("cats don't, dogs can't, he won't; it isn't", "cats dogs"),
        ("there's a cat, I'm red, they're big, we've dogs, you'll see, he'd run", "cat red big dogs see run"),
        ("mac 'n' cheese", "mac cheese"),
        ("a trash can by a can of paint, a can't", "trash can can paint"),
        ("a cat that can jump can be seen, dogs can not", "cat jump seen dogs"),
        ("his down jacket", "jacket"),
        ("cat-like", "cat"),
    ],
)
def test_function_words_show_no_thing(regions, prompt, expected):
    assert regions(prompt) == expected.split()


@pytest.mark.parametrize(
    "prompt",
    [
        "((cat)), red",
        "-- cat -- red!!",
        "“cat”, ‘red’… — ·",
        "cat，red。",
        "(cat:1.2), [red:.5]",
        "(cat:1.25) (red:2)",
        '"cat" & red +++ $ % # @ ~',
        "cat; red?!",
    ],
)
def test_signs_show_no_thing(regions, prompt):
    assert regions(prompt) == ["cat", "red"]


def test_numbers_that_weigh_nothing_are_words(regions):
    assert regions("2 cats: 3 red, at 1 (2)") == ["2", "cats", "3", "red", "1", "2"]


def test_a_sign_that_t5_does_not_know_hides_no_function_word():
    layout = prompt_layout(t5("cat ~behind~ {the} (dog)"), None, drop_stop_words=True)
    assert layout.labels == (("cat", "<unk>dog<unk>"),)


def test_a_prompt_without_content_keeps_what_it_has(regions):
    assert regions("(behind the!)") == ["behind", "the"]
    assert [*"".join(regions("?!"))] == ["?", "!"]


def test_an_emoji_is_a_word_where_it_is_known():
    """CLIP reads its bytes; T5 and BERT know none, and what they do not know is no word."""
    for kind, tokenizer in TOKENIZERS.items():
        encoded = [Encoded(tokenizer, ids("a 🐱 — on ❤ the grass ™", tokenizer=tokenizer, length=99))]
        expected = ("🐱", "❤", "grass") if kind == "clip" else ("grass",)
        assert prompt_layout(encoded, None, drop_stop_words=True).labels == (expected,)


@pytest.mark.parametrize("names", [ADE20K, COCO_OBJECT, STUFF_171, CONTEXT])
def test_no_class_of_a_benchmark_loses_a_word(names):
    for name in names:
        found = [(word, [place]) for place, word in enumerate(name.split())]
        assert content_words(found) == [pair for pair in found if pair[0] != "of"]  # a chest of drawers
