"""Which tokens become regions, for words of several tokens, repeated words, truncation and every CLIP prompt."""

from pathlib import Path

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from eval.tiny_components import clip_tokenizer
from goca_guidance import tokens
from tests.tiny import WORDS


TOKENIZER = clip_tokenizer(WORDS, max_length=24)
SHARED = Path(__file__).parents[2] / "shared" / "data"


def ids(*prompts):
    return TOKENIZER(list(prompts), padding="max_length", truncation=True, return_tensors="pt").input_ids


def test_words_and_their_tokens():
    """A listed word is one token, another is spelled; special tokens and padding belong to no word."""
    found = tokens.words(TOKENIZER, ids("a cat, dogs")[0].tolist())
    assert [w for w, _ in found] == ["a", "cat", ",", "dogs"]
    assert [p for _, p in found][:3] == [[1], [2], [3]]
    assert len(found[3][1]) > 1


def test_prompt_layout_of_a_batch():
    layout = tokens.prompt_layout(TOKENIZER, ids("a cat on grass", "dog"))
    assert layout.labels == (("a", "cat", "on", "grass", "<sos>"), ("dog", "<sos>"))
    assert layout.columns[0].tolist() == [0, 1, 2, 3, 4]
    assert layout.content[0].tolist() == [False, True, True, True, True]
    assert layout.present.tolist() == [[True] * 5, [True, True, False, False, False]]


def test_stop_words_can_be_dropped():
    layout = tokens.prompt_layout(TOKENIZER, ids("a photo of a cat on the grass."), drop_stop_words=True)
    assert layout.labels == (("photo", "cat", "grass", "<sos>"),)
    only = tokens.prompt_layout(TOKENIZER, ids("on the"), drop_stop_words=True)
    assert only.labels == (("on", "the", "<sos>"),)


def test_empty_prompt():
    with pytest.raises(ValueError, match="at least one word"):
        tokens.prompt_layout(TOKENIZER, ids(""))


def test_classes_of_several_words_and_several_places():
    layout = tokens.class_layout(TOKENIZER, ids("cat, potted plant, cat"), ["cat", "potted plant"])
    assert layout.labels == (("cat", "potted plant"),)
    assert layout.columns[0].tolist() == [1, 3, 4, 6]
    assert torch.allclose(layout.groups[0].T, torch.tensor([[0.5, 0, 0, 0.5], [0, 0.5, 0.5, 0]]))
    assert layout.content.all()


def test_a_longer_name_keeps_its_words():
    layout = tokens.class_layout(TOKENIZER, ids("potted plant, plant"), ["plant", "potted plant"])
    columns = layout.columns[0]
    assert [columns[layout.groups[0, :, k] > 0].tolist() for k in (0, 1)] == [[4], [1, 2]]


def test_part_of_a_word_is_not_the_word():
    with pytest.raises(ValueError, match="'cat' among the words"):
        tokens.class_layout(TOKENIZER, ids("a catalog"), ["cat"])


@pytest.mark.parametrize("prompt", ["a dog", "a " * 40 + "cat"])
def test_missing_or_truncated_class(prompt):
    with pytest.raises(ValueError, match="encoder keeps 24 tokens"):
        tokens.class_layout(TOKENIZER, ids(prompt), ["cat"])


def test_every_token_is_a_region_for_the_scfg_baseline():
    layout = tokens.token_layout(TOKENIZER, ids("a cat"))
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
        tokens.named_layout(regions, 2, 24)


def test_repeat_follows_the_images_of_a_prompt():
    layout = tokens.prompt_layout(TOKENIZER, ids("a cat", "dog")).repeat(2)
    assert [names[0] for names in layout.labels] == ["a", "a", "dog", "dog"]
    assert layout.columns.shape[0] == 4


@given(st.text(max_size=60))
@example("a <|startoftext|> cat")  # spelled out, it is the special token, which belongs to no word
@example("a <|endoftext|> cat")  # the text ends there, as it does for the encoder
@settings(max_examples=150, deadline=None)
def test_words_cover_every_content_token_once(prompt):
    row = ids(prompt)[0].tolist()
    end = row.index(TOKENIZER.eos_token_id)
    covered = [p for _, positions in tokens.words(TOKENIZER, row) for p in positions]
    assert covered == [p for p in range(end) if row[p] != TOKENIZER.bos_token_id]


@given(
    st.lists(
        st.sampled_from(["cat", "dog", "bus", "potted plant", "zebra", "grass"]), min_size=1, max_size=4, unique=True
    )
)
@settings(max_examples=50, deadline=None)
def test_group_weights_average(names):
    layout = tokens.class_layout(TOKENIZER, ids(", ".join(names)), names)
    assert torch.allclose(layout.groups.sum(1), torch.ones(1, len(names)))


@pytest.mark.skipif(
    not SHARED.exists(), reason="needs ../shared/data/model_trees (local test data, not in this repository)"
)
def test_real_clip_tokenizer():
    from transformers import CLIPTokenizer

    real = CLIPTokenizer.from_pretrained(SHARED / "model_trees" / "stable-diffusion-v1-5" / "tokenizer")
    row = real("A tennis-player's potted plants, near naïve giraffes!", return_tensors="pt").input_ids
    found = [w for w, _ in tokens.words(real, row[0].tolist())]
    assert found[:2] == ["a", "tennis"]
    assert {"potted", "plants", "giraffes"} <= set(found)
