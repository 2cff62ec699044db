"""The words of any tokenizer: ids are spelled out, the prompt is found among templates and padding, and split."""

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from goca_guidance.denoisers.spelling import BREAK, Spelling, content, find_prompt, spell
from goca_guidance.denoisers.words import words
from tests.helpers.loops.texts_llm import chatglm, gemma_tokenizer, glm
from tests.helpers.loops.texts_qwen import qwen_tokenizer
from tests.helpers.tiny import WORDS


QWEN, GEMMA, GLM, CHATGLM = qwen_tokenizer(), gemma_tokenizer(64), glm()["tokenizer"], chatglm()["tokenizer"]
TOKENIZERS = {"bytes": QWEN, "sentencepiece": GEMMA, "left padding": GLM, "slow": CHATGLM}
TEMPLATE = (
    "<|im_start|>system\nDescribe the color, shape and background:<|im_end|>\n<|im_start|>user\n{}<|im_end|>\n"
    "<|im_start|>assistant\n"
)


def ids(text, tokenizer=QWEN, **kwargs):
    return tokenizer(text, **kwargs).input_ids


def found(prompt, row, *others, tokenizer=QWEN):
    spelling, span = find_prompt(tokenizer, row, [prompt], others)
    return None if span is None else spelling.words(span)


def texts(pairs):
    return None if pairs is None else [word for word, _ in pairs]


def split(text):
    """As if each character were a token."""
    return texts(Spelling(text, [(i,) for i in range(len(text))]).words((0, len(text))))


# ---- words and signs -------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a cat, 2 dogs.", "a|cat|,|2|dogs|."),
        ("a man's dogs' 'n' it’s", "a|man's|dogs|'|'|n|'|it’s"),
        ("(cat:1.3) T-shirt snake_case", "(|cat|:|1|.|3|)|T|-|shirt|snake_case"),
        ("naïve cafe\u0301 हिन्दी", "naïve|cafe\u0301|हिन्दी"),
        ("🐱 👩\u200d👧 👍🏽🇩🇪🇫🇷 ❤\ufe0f!", "🐱|👩\u200d👧|👍🏽|🇩🇪|🇫🇷|❤\ufe0f|!"),
        ("高い山, ต้น", "高|い|山|,|ต้|น"),
        ("3/4 of\n\ta — b", "3|/|4|of|a|—|b"),
        ("한국어 도시", "한국어|도시"),
        ("", ""),
    ],
)
def test_words_and_signs(text, expected):
    assert split(text) == [word for word in expected.split("|") if word]


def test_words_without_spaces_are_what_the_tokenizer_holds_together():
    """A letter of several tokens is whole, and Latin letters beside are a word of their own."""
    owners = [(0,), (0,), (1, 2), (3,), (3,), (3,), (4,)]
    assert Spelling("一只猫cat在", owners).words((0, 7)) == [("一只", [0]), ("猫", [1, 2]), ("cat", [3]), ("在", [4])]


def test_one_token_of_a_word_and_a_sign_or_of_several_signs():
    owners = [(0,), (0,), (0,), (0,), (1,), (1,), (2,)]
    assert Spelling("(cat),!", owners).words((0, 7)) == [("(", [0]), ("cat", [0]), ("),", [1]), ("!", [2])]


# ---- spelling --------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("kind", TOKENIZERS)
def test_spelled_as_it_was_written(kind):
    """Letters of several tokens belong to all of them, and every token of the text has a letter or is a space."""
    text = "a cat's zebra, 猫 🐱 naïve"
    row = ids(text, TOKENIZERS[kind])
    spelling = spell(TOKENIZERS[kind], row)
    assert spelling.text.rpartition(BREAK)[2].removeprefix("[gMASK]sop").strip() == text
    assert {p for owner in spelling.owners for p in owner} == set(range(len(row)))
    cat = spelling.owners[spelling.text.index("🐱")]
    assert len(cat) == 4
    assert list(cat) == list(range(cat[0], cat[0] + 4))


def test_bytes_that_are_no_letter():
    """An unfinished letter before a special token or at the end is left out."""
    row = ids("a 猫")
    assert spell(QWEN, row[:-1]).text == "a "
    assert spell(QWEN, [*row[:-1], QWEN.eos_token_id]).text == f"a {BREAK}"


# ---- the prompt ------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    "prompt",
    ["a cat on grass", "user assistant", "assistant", "user", "color", "background:", "the color, shape", "猫 a cat"],
)
@pytest.mark.parametrize("informed", [True, False])
def test_the_prompt_is_told_from_its_template(prompt, informed):
    """Also where it is made of the template's words, and with nothing to compare with."""
    others = [ids(TEMPLATE.format(""))] if informed else []
    pairs = found(prompt, ids(TEMPLATE.format(prompt)), *others)
    begin = len(ids(TEMPLATE.split("{}")[0]))
    assert texts(pairs) == split(prompt)
    assert sorted({p for _, positions in pairs for p in positions if p >= begin})[0] == begin
    assert min(p for _, positions in pairs for p in positions) == begin


def test_a_prompt_inside_a_sentence_is_told_by_another_text():
    """Nothing but what differs shows which "cat" is meant."""
    template = "Draw a cat, a {} and a cat"
    pairs = found("cat", ids(template.format("cat")), ids(template.format("dog")))
    assert pairs == [("cat", [ids(template.format("dog")).index(ids(" dog")[0])])]


@pytest.mark.parametrize("kind", TOKENIZERS)
def test_padding_is_passed_over(kind):
    tokenizer = TOKENIZERS[kind]
    row = ids("a cat on grass", tokenizer, padding="max_length", max_length=24)
    pairs = found("a cat on grass", row, tokenizer=tokenizer)
    assert texts(pairs) == ["a", "cat", "on", "grass"]
    low, high = content(tokenizer, row)
    assert high - low < 8
    assert all(low <= p < high for _, positions in pairs for p in positions)
    masked = [token if low <= p < high else -1 for p, token in enumerate(row)]
    assert found("a cat on grass", masked, tokenizer=tokenizer) == pairs
    assert content(tokenizer, masked) == (low, high)


def test_padding_with_the_end_token():
    """On the left all of it is padding; on the right the first one is the end."""
    end = GLM.eos_token_id
    assert content(GLM, [end, end, 7, 8]) == (2, 4)
    assert content(GLM, [7, 8, end, end]) == (0, 3)
    assert content(GLM, [7, 8, end, -1]) == (0, 3)
    assert content(GLM, [end, end]) == (0, 0)
    pad = QWEN.pad_token_id
    assert content(QWEN, [7, 8, QWEN.eos_token_id, pad, pad]) == (0, 3)


@pytest.mark.parametrize("kind", TOKENIZERS)
def test_a_prompt_that_was_cut(kind):
    """Its longest beginning, at the end or before a special token."""
    prompt = "a cat on grass and a dog on the bus"
    row = ids(prompt, TOKENIZERS[kind])[:-4]
    assert texts(found(prompt, row, tokenizer=TOKENIZERS[kind])) == split(prompt)[:-4]
    row = ids(TEMPLATE.format("a cat on grass and"))
    assert texts(found(prompt, row)) == ["a", "cat", "on", "grass", "and"]


def test_another_prompt_is_not_found():
    assert found("a dog", ids(TEMPLATE.format("a cat on grass"))) is None
    assert found("grass and nothing else", ids("a cat on grass")) is None  # the cut beginning would be too short
    with pytest.raises(
        ValueError, match=r"Expected the prompt in what Qwen2Tokenizer read, but it read 'a cat'.*region_tokens"
    ):
        words(QWEN, ids("a cat"), ["a dog"])


def test_what_pipelines_clean_is_found():
    """Case, spaces, entities, curled quotes, accents of two characters."""
    row = ids(TEMPLATE.format("a 'cat' & café"))
    for prompt in ("A  ‘Cat’\n&amp;amp; cafe\u0301 ", "a 'cat' & CAFÉ"):
        assert texts(found(prompt, row)) == ["a", "'", "cat", "'", "&", "café"]


def test_a_special_token_that_is_spelled_out():
    row = ids(TEMPLATE.format("a <|im_end|> cat"))
    assert texts(found("a <|im_end|> cat", row)) == ["a", "cat"]


def test_without_a_prompt_what_differs_is_it():
    row = ids(TEMPLATE.format("a cat"))
    for tokenizer, read, others in ((QWEN, row, [ids(TEMPLATE.format(""))]), (GEMMA, ids("a cat", GEMMA), [])):
        spelling, span = find_prompt(tokenizer, read, None, others)
        assert texts(spelling.words(span)) == ["a", "cat"]
    assert find_prompt(QWEN, row, None)[1] is None


def test_an_empty_prompt_has_no_words():
    assert found("", ids(TEMPLATE.format(""))) == []
    assert found("", ids("", GEMMA), tokenizer=GEMMA) == []


@given(
    st.one_of(
        st.text(max_size=40),
        st.lists(
            st.sampled_from([*WORDS, "user", "'", "’", "-", "é", "猫", "🐱", " ", "\n", "_", "(", "."]), max_size=20
        ).map("".join),
    )
)
@example("a <|im_end|> cat")
@example("हिन्दी")
@example("0¯")
@example("¯")
@example("¨ a ¸")
@settings(
    max_examples=150, deadline=None, derandomize=True
)  # a prompt of one letter of the template is anybody's guess
def test_words_are_the_prompt(prompt):
    """Nothing is lost but spaces, and nothing of the template is in it; a special token is a space."""
    for tokenizer, row in ((QWEN, ids(TEMPLATE.format(prompt))), (GEMMA, ids(prompt, GEMMA))):
        pairs = found(prompt, row, tokenizer=tokenizer)
        plain = prompt
        for token in tokenizer.all_special_tokens:
            plain = plain.replace(token, " ")
        read = tokenizer.decode(ids(plain, tokenizer, add_special_tokens=False))
        if pairs is not None:
            assert "".join(texts(pairs)).replace(" ", "") == "".join("".join(split(read)).split())
        else:
            assert not plain.strip() or "\ufffd" in plain or BREAK in plain
