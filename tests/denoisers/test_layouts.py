"""Which tokens become regions: words, classes of several words, named positions, sinks, several encoders."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from goca_guidance.denoisers import layouts
from goca_guidance.denoisers.words import Encoded
from tests.helpers.families import BERT_TOKENS, HUNYUAN_T5_TOKENS
from tests.helpers.tokens import LENGTH, ODD_NAMES, READERS, both, clip, ids, named_as_alone, odd_names, t5


def test_prompt_layout_of_a_batch():
    layout = layouts.prompt_layout(clip("a cat on grass", "dog"), "start")
    assert layout.labels == (("a", "cat", "on", "grass", "<sos>"), ("dog", "<sos>"))
    assert layout.columns[0].tolist() == [0, 1, 2, 3, 4]
    assert layout.content[0].tolist() == [False, True, True, True, True]
    assert layout.present.tolist() == [[True] * 5, [True, True, False, False, False]]


def test_stop_words_can_be_dropped():
    layout = layouts.prompt_layout(clip("a photo of a cat on the grass."), "start", drop_stop_words=True)
    assert layout.labels == (("photo", "cat", "grass", "<sos>"),)
    only = layouts.prompt_layout(clip("on the"), "start", drop_stop_words=True)
    assert only.labels == (("on", "the", "<sos>"),)


def test_empty_prompt():
    with pytest.raises(ValueError, match="at least one word"):
        layouts.prompt_layout(clip(""), "start")


def test_classes_of_several_words_and_several_places():
    layout = layouts.class_layout(clip("cat, potted plant, cat"), [["cat", "potted plant"]])
    assert layout.labels == (("cat", "potted plant"),)
    assert layout.columns[0].tolist() == [1, 3, 4, 6]
    assert torch.allclose(layout.groups[0].T, torch.tensor([[0.5, 0, 0, 0.5], [0, 0.5, 0.5, 0]]))
    assert layout.content.all()


def test_a_longer_name_keeps_its_words():
    layout = layouts.class_layout(clip("potted plant, plant"), [["plant", "potted plant"]])
    columns = layout.columns[0]
    assert [columns[layout.groups[0, :, k] > 0].tolist() for k in (0, 1)] == [[4], [1, 2]]


def test_phrases_of_one_name_and_names_of_each_image():
    layout = layouts.class_layout(
        clip("cat, potted plant, grass", "plant, dog"), [["cat, potted plant", "grass"], ["dog"]]
    )
    assert layout.labels == (("cat, potted plant", "grass"), ("dog",))
    read = [[layout.columns[b][layout.groups[b, :, k] > 0].tolist() for k in range(2)] for b in range(2)]
    assert read == [[[1, 3, 4], [6]], [[3], []]]
    assert torch.allclose(layout.groups.sum(1), torch.tensor([[1.0, 1], [1, 0]]))


def test_every_phrase_must_be_there():
    with pytest.raises(ValueError, match="'dog' among the words"):
        layouts.class_layout(clip("cat, grass"), [["cat, dog"]])


def test_part_of_a_word_is_not_the_word():
    with pytest.raises(ValueError, match="'cat' among the words"):
        layouts.class_layout(clip("a catalog"), [["cat"]])


@pytest.mark.parametrize("prompt", ["a dog", "a " * 40 + "cat"])
def test_missing_or_truncated_class(prompt):
    with pytest.raises(ValueError, match="encoder keeps 24 tokens"):
        layouts.class_layout(clip(prompt), [["cat"]])


def test_every_token_is_a_region_for_the_scfg_baseline():
    layout = layouts.token_layout(clip("a cat"), "start")
    assert layout.groups.shape == (1, 24, 24)
    assert torch.equal(layout.groups[0], torch.eye(24))


@pytest.mark.parametrize(
    ("regions", "message"),
    [
        ({"cat": [99]}, "positions from 0 to 23"),
        ({"cat": []}, "positions from 0 to 23"),
        ({}, "at least one region"),
        ([{"cat": [1]}], "one mapping or 2"),
    ],
)
def test_bad_named_regions(regions, message):
    with pytest.raises(ValueError, match=message):
        layouts.named_layout(regions, 2, LENGTH, "start")


def test_repeat_follows_the_images_of_a_prompt():
    layout = layouts.prompt_layout(clip("a cat", "dog"), "start").repeat(2)
    assert [names[0] for names in layout.labels] == ["a", "a", "dog", "dog"]
    assert layout.columns.shape[0] == 4


def test_layouts_over_two_encoders():
    layout = layouts.prompt_layout(both("a cat on grass", "a dog"), "start", drop_stop_words=True)
    assert layout.labels == (("cat", "grass", "<sos>"), ("dog", "<sos>"))
    assert layout.columns.tolist() == [[0, 2, 4, 78, 80], [0, 2, 78, 0, 0]]
    assert torch.allclose(layout.groups[0, :, 0], torch.tensor([0, 0.5, 0, 0.5, 0]))
    assert layout.content.tolist() == [[False, True, True, True, True], [False, True, True, False, False]]
    every = layouts.token_layout(both("a cat"), "start")
    assert torch.equal(every.columns[0], torch.arange(BERT_TOKENS + HUNYUAN_T5_TOKENS))
    assert every.labels[0][:3] == ("[CLS]", "a", "cat")
    assert every.labels[0][77:80] == ("▁a", "▁cat", "</s>")


def test_classes_over_two_encoders():
    """Where either of them reads the name; the parts of a name stand together in each."""
    layout = layouts.class_layout(
        both("a potted plant, Zebra", "zebra plant, potted plant"), [["zebra", "potted plant"]] * 2
    )
    names = [[layout.columns[b, layout.groups[b, :, k] > 0].tolist() for k in (0, 1)] for b in (0, 1)]
    assert names[0] == [[5, 6, 7, 8, 9, *range(81, 87)], [2, 3, 78, 79]]
    assert names[1] == [[1, 2, 3, 4, 5, *range(77, 83)], [8, 9, 85, 86]]
    assert torch.allclose(layout.groups.sum(1), torch.ones(2, 2))
    far = layouts.class_layout(both("a " * 80 + "cat"), [["cat"]])
    assert far.columns.tolist() == [[77 + 80]]
    with pytest.raises(ValueError, match=r"'dog' among the words.*encoder keeps 256 tokens"):
        layouts.class_layout(both("a cat"), [["dog"]])


# ---- sinks -----------------------------------------------------------------------------------------------------------
def test_the_start_token_is_a_region_and_no_content():
    layout = layouts.prompt_layout(clip("a cat", "dog"), "start")
    assert layout.sink.tolist() == [[0], [0]]
    assert [names[-1] for names in layout.labels] == ["<sos>", "<sos>"]


def test_the_end_token_is_no_region():
    """It stands where each prompt ends; for several encoders, where the last one's text does."""
    layout = layouts.prompt_layout(t5("a cat on grass", "dogs"), "end")
    assert layout.sink.tolist() == [[4], [2]]
    assert layout.labels == (("a", "cat", "on", "grass"), ("dogs",))
    assert layout.columns.tolist() == [[0, 1, 2, 3], [0, 1, 0, 0]]
    assert layout.content.tolist() == [[True] * 4, [True, True, False, False]]
    assert layouts.token_layout(t5("a cat"), "end").sink.tolist() == [[2]]
    assert layouts._sinks(both("a cat on grass", "dogs"), "end") == ([77 + 4, 77 + 2], False)
    assert layouts._sinks(both("a cat on grass", "dogs"), "start") == ([0, 0], True)
    assert layouts._sinks(t5("a " * 99), "end") == ([LENGTH - 1], False)


def test_no_sink():
    layout = layouts.prompt_layout(clip("a cat", "dog"), None)
    assert layout.sink.shape == (2, 0)
    assert layout.labels == (("a", "cat"), ("dog",))
    assert layouts.class_layout(clip("a cat"), [["cat"]]).sink.shape == (1, 0)


def test_named_regions_and_their_sink():
    """The start token is always at hand; the end token is named, or read off the prompt."""
    named = {"cat": [2], "grass": [4, 5]}
    start = layouts.named_layout(named, 1, LENGTH, "start")
    assert start.labels == (("cat", "grass", "<sos>"),)
    assert start.sink.tolist() == [[0]]
    end = layouts.named_layout([named | {"</s>": [7]}, {"dog": [1], "</s>": [3]}], 2, LENGTH, "end")
    assert end.labels == (("cat", "grass"), ("dog",))
    assert end.sink.tolist() == [[7], [3]]
    assert end.columns.tolist() == [[2, 4, 5], [1, 0, 0]]
    assert layouts.named_layout(named, 1, LENGTH, "end", t5("a cat on grass")).sink.tolist() == [[4]]
    with pytest.raises(ValueError, match=r'name the prompt\'s end token too.*"</s>": \[7\]'):
        layouts.named_layout(named, 1, LENGTH, "end")


@given(
    st.lists(
        st.sampled_from(["cat", "dog", "bus", "potted plant", "zebra", "grass"]), min_size=1, max_size=4, unique=True
    )
)
@settings(max_examples=50, deadline=None)
def test_group_weights_average(names):
    layout = layouts.class_layout(clip(", ".join(names)), [names])
    assert torch.allclose(layout.groups.sum(1), torch.ones(1, len(names)))


# ---- odd names -------------------------------------------------------------------------------------------------------
ODD = [*ODD_NAMES, "{braces}", "<tag>"]


def check_names(tokenizer, names):
    named_as_alone(tokenizer, names, ids(layouts.class_prompt(names), tokenizer=tokenizer, length=256))


@pytest.mark.parametrize("kind", READERS)
@pytest.mark.parametrize("name", ODD)
def test_odd_names_are_found(kind, name):
    check_names(READERS[kind], [name, "cat"])
    check_names(READERS[kind], ["cat", name])


@pytest.mark.parametrize("kind", READERS)
@given(odd_names(ODD, "|\\"))
@settings(max_examples=150, deadline=None)
def test_any_names_are_found(kind, names):
    check_names(READERS[kind], names)


def test_ordinary_names_are_joined_by_commas():
    names = ["cat", "potted plant", "person, hat", "a  dog", "café", "犬"]
    assert layouts.class_prompt(names) == ", ".join(names)
    assert layouts.class_prompt(["C++", "2", "x (y), z", "end."]) == "C++ , 2 , x (y) , z, end."


def test_names_in_a_prompt_where_a_sign_stands_with_the_comma():
    """The region has all of that run of signs."""
    layout = layouts.class_layout(clip("a C++, (cat), a dog."), [["C++", "(cat)", "dog"]])
    assert [layout.columns[0][layout.groups[0, :, k] > 0].tolist() for k in range(3)] == [
        [2, 3, 4, 5],
        [6, 7, 8, 9],
        [11],
    ]
    with pytest.raises(ValueError, match=r"'C\+\+' among the words"):
        layouts.class_layout(clip("a C+ , C"), [["C++"]])


# ---- what a tokenizer does not know, or cannot tell apart --------------------------------------------------------------
@pytest.mark.parametrize("name", ["猫", "猫 狗", "(猫)", "猫-犬!", "\u00a0", "\u200b"])
@pytest.mark.parametrize("kind", ["t5", "bert"])
def test_a_name_that_is_not_known_is_refused(kind, name):
    row = ids(layouts.class_prompt([name, "cat"]), tokenizer=READERS[kind])
    with pytest.raises(ValueError, match="knows nothing of"):
        layouts.class_layout([Encoded(READERS[kind], row)], [[name, "cat"]])


@pytest.mark.parametrize(
    ("kind", "names"),
    [
        ("bert", ["café", "cafe"]),
        ("t5", ["猫 cat", "狗 cat"]),
        ("t5", ["naïve", "naîve"]),
        ("clip", ["Ａ", "ａ"]),
        ("clip", ["cat, dog", "dog, cat"]),
        ("clip", ["cafe\u0301", "café"]),
    ],
)
def test_names_of_equal_tokens_are_refused(kind, names):
    row = ids(layouts.class_prompt([*names, "bus"]), tokenizer=READERS[kind])
    with pytest.raises(ValueError, match=f"{names[0]!r} and {names[1]!r} are the same tokens"):
        layouts.class_layout([Encoded(READERS[kind], row)], [[*names, "bus"]])


def test_a_name_that_one_encoder_knows_has_its_tokens():
    layout = layouts.class_layout(both("é, cat"), [["é", "cat"]])
    assert [layout.columns[0][layout.groups[0, :, k] > 0].tolist() for k in (0, 1)] == [[1], [3, 80]]


def test_unknown_words_form_no_region():
    layout = layouts.prompt_layout(t5("猫 cat 狗", "the 猫"), "end", drop_stop_words=True)
    assert layout.labels == (("cat",), ("the",))
    assert layouts.prompt_layout(t5("the 猫"), "end").labels == (("the",),)
    assert layouts.named_words(t5("猫 cat"), "end") == {"cat": [2], "</s>": [3]}
    with pytest.raises(ValueError, match=r"that the tokenizer knows.*but prompt 1 reads '<unk> <unk>'"):
        layouts.prompt_layout(t5("cat", "猫 狗"), "end")
