"""The words of a prompt and their tokens: of several tokens, repeated, truncated, of several encoders."""

import copy

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from transformers import CLIPTokenizer, PreTrainedTokenizerFast, T5Tokenizer

from goca_guidance.denoisers.words import bare, has_marks, sentence
from goca_guidance.denoisers.words import words as words_of
from tests.helpers.loops.texts_qwen import qwen2_5_vl_processor
from tests.helpers.places import shared
from tests.helpers.tiny import WORDS
from tests.helpers.tokens import BERT, T5, TOKENIZER, TOKENIZERS, both, ids


def words(prompt, tokenizer=TOKENIZER):
    return words_of(tokenizer, ids(prompt, tokenizer=tokenizer)[0].tolist())


def test_words_and_their_tokens():
    """A listed word is one token, another is spelled; special tokens and padding belong to no word."""
    found = words("a cat, dogs")
    assert [w for w, _ in found] == ["a", "cat", ",", "dogs"]
    assert [p for _, p in found][:3] == [[1], [2], [3]]
    assert len(found[3][1]) > 1


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


def test_what_has_no_marks_is_spelled_out():
    """One rule for every other tokenizer; see test_spelling.py."""
    stranger = PreTrainedTokenizerFast(tokenizer_object=TOKENIZER._tokenizer, bos_token=TOKENIZER.bos_token)
    assert not has_marks(stranger)
    assert words_of(stranger, ids("cat")[0].tolist()[:2], ["cat"]) == [("cat", [1])]


def test_the_tokenizer_of_a_processor():
    processor = qwen2_5_vl_processor()
    assert bare(processor) is processor.tokenizer
    assert bare(TOKENIZER) is TOKENIZER


def test_t5_words_without_spaces():
    """What the tokenizer holds together is a word (UMT5 knows Chinese), with a mark before it or none."""
    pieces = ["<pad>", "</s>", "<unk>", "▁", "a", "▁cat", "一只", "猫", "，", "c"]
    umt5 = T5Tokenizer(vocab=[(piece, -float(i)) for i, piece in enumerate(pieces)], extra_ids=0)
    tokens = ["▁", "一只", "猫", "，", "猫", "c", "a", "▁cat", "</s>"]
    found = words_of(umt5, umt5.convert_tokens_to_ids(tokens))
    assert found == [("一只", [0, 1]), ("猫", [2]), ("，", [3]), ("猫", [4]), ("ca", [5, 6]), ("cat", [7])]


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


def test_real_clip_tokenizer():
    real = CLIPTokenizer.from_pretrained(shared("model_trees/stable-diffusion-v1-5/tokenizer"))
    row = real("A tennis-player's potted plants, near naïve giraffes!", return_tensors="pt").input_ids
    found = [w for w, _ in words_of(real, row[0].tolist())]
    assert found[:2] == ["a", "tennis"]
    assert {"potted", "plants", "giraffes"} <= set(found)
