"""Which tokens become regions: words of several tokens, repeated words, truncation, several encoders, every prompt."""

import copy
from pathlib import Path

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from transformers import CLIPTokenizer, PreTrainedTokenizerFast

from eval.scenes.tiny_model import clip_tokenizer
from goca_guidance.denoisers import layouts
from goca_guidance.denoisers.words import Encoded, sentence
from goca_guidance.denoisers.words import words as words_of
from tests.families import BERT_TOKENS, FAMILIES, HUNYUAN_T5_TOKENS
from tests.tiny import WORDS


SHARED = Path(__file__).parents[2] / "shared" / "data"
LENGTH = 24
TOKENIZER = clip_tokenizer(WORDS, max_length=LENGTH)
T5 = FAMILIES["pixart-sigma"].components()["tokenizer"]
HUNYUAN = FAMILIES["hunyuan"].components()
BERT, BERT_T5 = HUNYUAN["tokenizer"], HUNYUAN["tokenizer_2"]
TOKENIZERS = {"clip": TOKENIZER, "t5": T5, "bert": BERT}


def ids(*prompts, tokenizer=TOKENIZER, length=LENGTH):
    arguments = {"padding": "max_length", "truncation": True, "max_length": length, "return_tensors": "pt"}
    return tokenizer(list(prompts), **arguments).input_ids


def clip(*prompts):
    return [Encoded(TOKENIZER, ids(*prompts))]


def t5(*prompts):
    return [Encoded(T5, ids(*prompts, tokenizer=T5))]


def both(*prompts):
    """HunyuanDiT's text: BERT's tokens, then T5's."""
    first = Encoded(BERT, ids(*prompts, tokenizer=BERT, length=BERT_TOKENS))
    return [first, Encoded(BERT_T5, ids(*prompts, tokenizer=BERT_T5, length=HUNYUAN_T5_TOKENS), BERT_TOKENS)]


def words(prompt, tokenizer=TOKENIZER):
    return words_of(tokenizer, ids(prompt, tokenizer=tokenizer)[0].tolist())


def test_words_and_their_tokens():
    """A listed word is one token, another is spelled; special tokens and padding belong to no word."""
    found = words("a cat, dogs")
    assert [w for w, _ in found] == ["a", "cat", ",", "dogs"]
    assert [p for _, p in found][:3] == [[1], [2], [3]]
    assert len(found[3][1]) > 1


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


# ---- words of each tokenizer -----------------------------------------------------------------------------------------
@pytest.mark.parametrize("kind", TOKENIZERS)
@pytest.mark.parametrize(
    ("prompt", "expected"),
    [
        ("a cat, a dog.", ["a", "cat", ",", "a", "dog", "."]),
        ("a zebra on grass", ["a", "zebra", "on", "grass"]),
        ("potted-plant!", ["potted", "-", "plant", "!"]),
        ("a 'cat' on", ["a", "'", "cat", "'", "on"]),
        ("''cat''", ["''", "cat", "''"]),
        ("cat's dog", ["cat", "'s", "dog"]),
        ("a\ncat\t dog", ["a", "cat", "dog"]),
        ("", []),
    ],
)
def test_every_tokenizer_reads_the_same_words(kind, prompt, expected):
    """Quotes stand alone. Only BERT takes an apostrophe from its word, and only CLIP leaves signs of a kind together."""
    if kind != "clip":
        expected = [part for word in expected for part in (word if word == "''" else [word])]
    if kind == "bert":
        expected = [part for word in expected for part in (word if word == "'s" else [word])]
    assert [word for word, _ in words(prompt, TOKENIZERS[kind])] == expected


def test_words_of_t5():
    """The mark opens a word; where it stands alone it belongs to the word behind it."""
    tokens_ = T5.convert_ids_to_tokens(ids("a dogs it's cat, dog", tokenizer=T5)[0])[:13]
    assert tokens_ == ["▁a", "▁dog", "s", "▁", "i", "t", "'", "s", "▁cat", ",", "▁dog", "</s>", "<pad>"]
    assert words("a dogs it's cat, dog", T5) == [
        ("a", [0]),
        ("dogs", [1, 2]),
        ("it", [3, 4, 5]),
        ("'s", [6, 7]),
        ("cat", [8]),
        (",", [9]),
        ("dog", [10]),
    ]
    assert words("cat ▁ dog ▁", T5)[:2] == [("cat", [0]), ("dog", [1, 2])]


def test_words_of_bert():
    """`##` continues a word; case and accents are gone."""
    assert words("A Dogs Bübchen", BERT) == [("a", [1]), ("dogs", [2, 3]), ("bubchen", list(range(4, 11)))]


@pytest.mark.parametrize(("kind", "unknown"), [("t5", "<unk>"), ("bert", "[UNK]")])
def test_letters_that_a_tokenizer_does_not_know(kind, unknown):
    """They are words too, or parts of them, and cut no word in two."""
    found = words("猫 cat", TOKENIZERS[kind])
    assert [word for word, _ in found] == [unknown, "cat"]
    assert [word for word, _ in words("naïve cat", T5)] == ["na<unk>ve", "cat"]


@pytest.mark.parametrize("kind", TOKENIZERS)
def test_vectors_of_a_textual_inversion_are_one_word(kind):
    """As diffusers names them; the next one of the same name is a word of its own."""
    tokenizer = copy.deepcopy(TOKENIZERS[kind])
    tokenizer.add_tokens(["<toy>", "<toy>_1", "<toy>_2", "<toy>_10", "<hat>_1", "<tox>"])
    first = int(kind != "t5")

    def found(prompt):
        return [(word, [p - first for p in positions]) for word, positions in words(prompt, tokenizer)]

    several = found("a <toy> <toy>_1 <toy>_2 <toy>_10 on grass")
    assert several == [("a", [0]), ("<toy>", [1, 2, 3, 4]), ("on", [5]), ("grass", [6])]
    assert found("<toy> <toy>_1 <toy> <toy>_1") == [("<toy>", [0, 1]), ("<toy>", [2, 3])]
    assert found("<toy> <hat>_1 <tox>") == [("<toy>", [0]), ("<hat>_1", [1]), ("<tox>", [2])]
    assert found("<toy> cat <toy>_1") == [("<toy>", [0]), ("cat", [1]), ("<toy>_1", [2])]


def test_an_unknown_tokenizer_is_refused():
    stranger = PreTrainedTokenizerFast(tokenizer_object=TOKENIZER._tokenizer)
    with pytest.raises(ValueError, match=r"Expected a CLIP, T5 or BERT tokenizer.*pass `region_tokens`"):
        words_of(stranger, [1, 2])


def prompts(*special):
    """Any text, and text that is made of what the rules look at."""
    pieces = [*WORDS, *special, "▁", "##", "</w>", "'", "’", "''", "-", "_1", "é", "猫", "x", " ", "  ", "\n"]
    return st.one_of(st.text(max_size=60), st.lists(st.sampled_from(pieces), max_size=20).map("".join))


@given(prompts("<|startoftext|>", "<|endoftext|>"))
@example("a <|startoftext|> cat")  # spelled out, it is the special token, which belongs to no word
@example("a <|endoftext|> cat")  # the text ends there, as it does for the encoder
@settings(max_examples=150, deadline=None)
def test_words_cover_every_content_token_once(prompt):
    row = ids(prompt)[0].tolist()
    end = row.index(TOKENIZER.eos_token_id)
    covered = [p for _, positions in words_of(TOKENIZER, row) for p in positions]
    assert covered == [p for p in range(end) if row[p] != TOKENIZER.bos_token_id]


@given(prompts("<pad>", "<unk>", "</s>"))
@example("a <pad> cat")
@example("a </s> cat")
@example("cat ▁ <pad> ▁ dog ▁▁")
@settings(max_examples=300, deadline=None)
def test_words_of_t5_cover_every_content_token_once(prompt):
    """All but a lone mark with no word behind it."""
    row = T5.convert_ids_to_tokens(ids(prompt, tokenizer=T5)[0])
    content = row[: row.index("</s>")]
    behind = [next((t for t in content[p:] if t != "▁"), "<pad>") for p in range(len(content))]
    covered = [p for _, positions in words(prompt, T5) for p in positions]
    assert covered == [p for p in range(len(content)) if behind[p] != "<pad>"]


@given(prompts("[CLS]", "[SEP]", "[PAD]", "[UNK]", "[MASK]"))
@example("a [CLS] cat [PAD]")
@example("a [SEP] cat")
@settings(max_examples=300, deadline=None)
def test_words_of_bert_cover_every_content_token_once(prompt):
    row = BERT.convert_ids_to_tokens(ids(prompt, tokenizer=BERT)[0])
    covered = [p for _, positions in words(prompt, BERT) for p in positions]
    assert covered == [p for p in range(row.index("[SEP]")) if row[p] not in ("[CLS]", "[PAD]")]


# ---- several encoders ------------------------------------------------------------------------------------------------
def test_a_word_is_what_every_encoder_read_of_it():
    """By its spelling, whatever the case, and its occurrence; a word that one encoder spells alone stands behind."""
    found = sentence(both("A cat, a Dogs it's cat"), 0)
    assert found == [
        ("a", [1, 77, 78]),
        ("cat", [2, 79]),
        (",", [3, 80]),
        ("a", [4, 81]),
        ("dogs", [5, 6, *range(82, 87)]),
        ("it", [7, 8, 87, 88, 89]),
        ("'", [9]),
        ("s", [10]),
        ("cat", [11, 92]),
        ("'s", [90, 91]),
    ]


def test_a_word_beyond_the_first_encoder_is_the_seconds():
    """BERT keeps 77 tokens, T5 256."""
    found = sentence(both("a " * 80 + "cat"), 0)
    assert found[0] == ("a", [1, 77])
    assert found[74] == ("a", [75, 77 + 74])
    assert found[75] == ("a", [77 + 75])
    assert found[-1] == ("cat", [77 + 80])
    assert len(found) == 81


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
    assert layouts._sinks(both("a cat on grass", "dogs"), "end") == [77 + 4, 77 + 2]
    assert layouts._sinks(both("a cat on grass", "dogs"), "start") == [0, 0]
    assert layouts._sinks(t5("a " * 99), "end") == [LENGTH - 1]


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


@pytest.mark.skipif(
    not SHARED.exists(), reason="needs ../shared/data/model_trees (local test data, not in this repository)"
)
def test_real_clip_tokenizer():
    real = CLIPTokenizer.from_pretrained(SHARED / "model_trees" / "stable-diffusion-v1-5" / "tokenizer")
    row = real("A tennis-player's potted plants, near naïve giraffes!", return_tensors="pt").input_ids
    found = [w for w, _ in words_of(real, row[0].tolist())]
    assert found[:2] == ["a", "tennis"]
    assert {"potted", "plants", "giraffes"} <= set(found)
