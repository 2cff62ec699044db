"""Which of what the encoders read is the prompt: told from the texts and the lengths, or not at all."""

import pytest
import torch

from goca_guidance.denoisers.readings import Asked, told_apart
from goca_guidance.denoisers.words import sentence
from tests.helpers.tokens import LENGTH, T5, TOKENIZER, ids


POSITIVE, NEGATIVE = "a cat on grass", "dog"
LONG = "a red cat on the grass and a dog and a bus on the sky and a photo of a potted plant , a dog on grass"
ASKED = Asked([[POSITIVE]], [[NEGATIVE]], trusted=False)


def words_of(found, image=0):
    return [" ".join(word for word, _ in sentence(encoded, image)) if encoded else None for encoded in found]


def told(*reads, length=LENGTH, prompts=1, asked=ASKED, whole=True, tokenizer=TOKENIZER):
    found = told_apart([list(reads)], [tokenizer], length, whole, prompts, asked)
    return found if found is None else words_of(found)


def chunks(text, size=LENGTH):
    """Rows of `size` tokens, each with a start and an end of its own."""
    tokens, start, end = (
        TOKENIZER(text, add_special_tokens=False).input_ids,
        TOKENIZER.bos_token_id,
        TOKENIZER.eos_token_id,
    )
    parts = [tokens[i : i + size - 2] for i in range(0, max(len(tokens), 1), size - 2)]
    return [torch.tensor([[start, *part, end] + [end] * (size - 2 - len(part))]) for part in parts]


@pytest.mark.parametrize("asked", [ASKED, None, Asked([["other"]], [["words"]], trusted=True)])
def test_the_prompt_and_then_the_negative_prompt(asked):
    assert told(ids(POSITIVE), ids(NEGATIVE), asked=asked) == [POSITIVE, NEGATIVE]
    assert told(ids(POSITIVE), asked=asked) == [POSITIVE, None]


def test_the_texts_tell_the_order():
    assert told(ids(NEGATIVE), ids(POSITIVE)) == [POSITIVE, NEGATIVE]
    assert told(ids(NEGATIVE, POSITIVE)) == [POSITIVE, NEGATIVE]
    assert told(ids(POSITIVE, NEGATIVE)) == [POSITIVE, NEGATIVE]


def test_one_negative_prompt_serves_every_prompt():
    """Flux reads it once, in either order."""
    asked = Asked([[POSITIVE, "a bus"]], [[NEGATIVE] * 2], trusted=False)
    both = ids(POSITIVE, "a bus")
    for reads in [(both, ids(NEGATIVE)), (ids(NEGATIVE), both)]:
        found = told_apart([list(reads)], [TOKENIZER], LENGTH, True, 2, asked)
        assert [words_of(found, image) for image in (0, 1)] == [[POSITIVE, NEGATIVE], ["a bus", NEGATIVE]]


def test_chunks_are_joined():
    """With the positions of all, and a word that comes again is another region."""
    first, second = chunks(LONG)
    asked = Asked([[LONG]], [[""]], trusted=False)
    empty = chunks("")[0]
    orders = [(first, second, empty, empty), (empty, empty, first, second), (first, empty, second, empty)]
    orders += [(torch.cat([first, second]),), (torch.cat([empty, first]), torch.cat([empty, second]))]
    orders.append((torch.cat([first, second, empty, empty]),))
    for reads in orders:
        (encoded,), _ = told_apart([list(reads)], [TOKENIZER], 2 * LENGTH, True, 1, asked)
        found = sentence([encoded], 0)
        assert " ".join(word for word, _ in found) == LONG
        assert [at for word, at in found if word == "dog"] == [
            [LONG.split().index("dog") + 1],
            [LONG.split().index("dog", 9) + 3],
        ]
    assert told(first, second, length=2 * LENGTH, asked=asked) == [LONG, None]


@pytest.mark.parametrize("prompts", [2, 3])
def test_chunks_of_several_prompts(prompts):
    texts = [LONG, " ".join(reversed(LONG.split())), "a bus " * 14][:prompts]
    asked = Asked([texts], [[NEGATIVE] * prompts], trusted=False)
    rows = torch.stack([torch.cat(chunks(text)) for text in texts])  # image, chunk
    negative = torch.cat([chunks(NEGATIVE)[0], chunks("")[0]]).expand_as(rows)
    for reads in [
        (*rows, *negative),
        (*rows.transpose(0, 1), *negative.transpose(0, 1)),
        (torch.cat([negative, rows], 0).flatten(0, 1),),
    ]:
        found = told_apart([list(reads)], [TOKENIZER], 2 * LENGTH, True, prompts, asked)
        assert [words_of(found, image) for image in range(prompts)] == [[text.strip(), NEGATIVE] for text in texts]


def test_what_cannot_be_told_is_not():
    first, second = chunks(LONG)
    assert told(first, second, length=2 * LENGTH) is None  # another text than was asked for
    assert told(first, second, length=2 * LENGTH, asked=None) is None
    assert (
        told(first, second, length=2 * LENGTH - 2, asked=Asked([[LONG]], [[""]], False)) is None
    )  # cut in the middle
    assert told(ids(POSITIVE), length=LENGTH + 16) is None  # something else is among the text
    assert told(ids(POSITIVE), ids("a bus"), ids(NEGATIVE)) is None
    assert told(ids(POSITIVE), ids("a bus")) is None  # an enhanced prompt, and no negative one?
    assert told(ids("a bus"), ids("sky")) is None
    assert told(ids(NEGATIVE)) is None  # the prompt's embeddings were kept from another call
    assert told(ids(POSITIVE), ids(NEGATIVE)[:, :-2]) is None
    assert told(ids(POSITIVE, POSITIVE), ids(NEGATIVE)) is None


def test_a_prompt_that_was_changed_on_its_way_stands_before_the_negative_one():
    assert told(ids("a photo of a cat"), ids(NEGATIVE)) == ["a photo of a cat", NEGATIVE]


def test_what_the_encoder_cuts_is_the_prompt():
    assert told(ids(LONG), ids(NEGATIVE), asked=Asked([[LONG]], [[NEGATIVE]], False))[1] == NEGATIVE
    for tokenizer in (TOKENIZER, T5):
        long, short = (ids(text, tokenizer=tokenizer, length=8) for text in (LONG, NEGATIVE))
        asked = Asked([[LONG]], [[NEGATIVE]], trusted=False)
        assert told(short, long, asked=asked, length=8, tokenizer=tokenizer)[1] == NEGATIVE


def test_encoders_side_by_side_in_the_text():
    """One of them may not be loaded: then its part is unknown."""
    reads = [[ids(POSITIVE), ids(NEGATIVE)], [ids(POSITIVE, tokenizer=T5), ids(NEGATIVE, tokenizer=T5)]]
    for whole, length in ((True, 2 * LENGTH), (False, 2 * LENGTH), (False, 3 * LENGTH)):
        positive, negative = told_apart(reads, [TOKENIZER, T5], length, whole, 1, ASKED)
        assert [part.start for part in positive] == [0, LENGTH]
        assert words_of((positive, negative)) == [POSITIVE, NEGATIVE]
    assert told_apart(reads, [TOKENIZER, T5], 3 * LENGTH, True, 1, ASKED) is None
