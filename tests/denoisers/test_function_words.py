"""What shows no thing: function words and signs, as each tokenizer cuts them, and no word that names a thing."""

import pytest

from eval.datasets.ade20k import ADE20K
from eval.datasets.coco import COCO_OBJECT, STUFF_171
from eval.datasets.pascal import CONTEXT
from goca_guidance.denoisers.function_words import content_words
from goca_guidance.denoisers.words import Encoded, sentence
from tests.helpers.tokens import READERS, TOKENIZERS, ids


@pytest.fixture(params=READERS)
def read(request):
    """A prompt's words, in lower case, as a tokenizer cuts them."""

    def read(prompt):
        tokenizer = READERS[request.param]
        return sentence([Encoded(tokenizer, ids(prompt, tokenizer=tokenizer, length=256))], 0)

    return read


def spellings(found):
    return [word.lower() for word, _ in found]


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
def test_function_words_show_no_thing(read, prompt, expected):
    assert spellings(content_words(read(prompt))) == expected.split()


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
def test_signs_show_no_thing(read, prompt):
    assert spellings(content_words(read(prompt))) == ["cat", "red"]


def test_numbers_that_weigh_nothing_are_words(read):
    assert spellings(content_words(read("2 cats: 3 red, at 1 (2)"))) == ["2", "cats", "3", "red", "1", "2"]


def test_a_prompt_without_content_keeps_what_it_has(read):
    assert spellings(content_words(read("(behind the!)"))) == ["behind", "the"]
    assert [*"".join(spellings(content_words(read("?!"))))] == ["?", "!"]
    assert content_words([]) == []


def test_an_emoji_is_a_word_where_it_is_known():
    """CLIP reads its bytes; T5 and BERT know none, and what they do not know is no word."""
    for kind, tokenizer in TOKENIZERS.items():
        encoded = [Encoded(tokenizer, ids("a 🐱 — on ❤ the grass ™", tokenizer=tokenizer, length=99))]
        expected = ["🐱", "❤", "grass"] if kind == "clip" else ["grass"]
        assert [word for word, _ in content_words(sentence(encoded, 0))] == expected


@pytest.mark.parametrize("names", [ADE20K, COCO_OBJECT, STUFF_171, CONTEXT])
def test_no_class_of_a_benchmark_loses_a_word(names):
    for name in names:
        found = [(word, [place]) for place, word in enumerate(name.split())]
        assert content_words(found) == [pair for pair in found if pair[0] != "of"]  # a chest of drawers
