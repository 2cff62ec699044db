"""Which tokens become regions, with the real CLIP and T5 tokenizers, for ten real COCO captions (`-s` prints them).

Compared with the tokenizers' own character offsets, which the library never asks for.
"""

import csv

import pytest
import torch
from transformers import AutoTokenizer

from goca_guidance.denoisers.layouts import prompt_layout
from goca_guidance.denoisers.words import Encoded, sentence, words
from tests.helpers.places import shared


TOKENIZERS = {"clip": "stable-diffusion-v1-5/tokenizer", "t5": "FLUX.1-dev/tokenizer_2"}


def captions(count=10):
    with shared("coco30k/MS-COCO_val2014_30k_captions.csv").open(newline="") as file:
        rows = csv.DictReader(file)
        return [row["text"].strip() for row, _ in zip(rows, range(count), strict=False)]


@pytest.fixture(params=TOKENIZERS)
def kind(request):
    return request.param


@pytest.fixture
def tokenizer(kind):
    return AutoTokenizer.from_pretrained(shared(f"model_trees/{TOKENIZERS[kind]}"))


@pytest.mark.parametrize("number", range(10))
def test_every_word_is_its_own_text(tokenizer, number):
    """A word's tokens lie side by side in the caption, spell it, and together the words leave no letter out."""
    caption = captions()[number]
    read = tokenizer(caption, return_offsets_mapping=True)
    covered = set()
    for word, positions in words(tokenizer, read.input_ids):
        spans = [read.offset_mapping[p] for p in positions]
        start, end = min(a for a, _ in spans), max(b for _, b in spans)
        assert caption[start:end].strip().lower() == word.lower()
        assert not covered & set(range(start, end))
        covered |= set(range(start, end))
    assert {i for i, letter in enumerate(caption) if letter.isalnum()} <= covered


def test_regions_of_ten_captions(tokenizer, kind):
    """Content words only; CLIP's start token is the last region, T5 has none for its end token."""
    for caption in captions():
        ids = tokenizer([caption], return_tensors="pt").input_ids
        sink = {"clip": "start", "t5": "end"}[kind]
        layout = prompt_layout([Encoded(tokenizer, ids)], sink, drop_stop_words=True)
        known = [*sentence([Encoded(tokenizer, ids)], 0), ("<sos>", [0])]
        print(f"\n{kind}: {caption}")
        for k, label in enumerate(layout.labels[0]):
            positions = layout.columns[0][layout.groups[0, :, k] > 0].tolist()
            print(f"  {label:12} {positions} {tokenizer.convert_ids_to_tokens(ids[0][positions])}")
            assert (label, positions) in known
        labels = [label.lower() for label in layout.labels[0]]
        assert not {"a", "the", "of", "on", "."} & set(labels)
        assert (labels[-1] == "<sos>") == (kind == "clip")
        assert ids[0, layout.sink[0, 0]] == (tokenizer.bos_token_id if kind == "clip" else tokenizer.eos_token_id)
        assert torch.allclose(layout.groups[0].sum(0), torch.ones(len(labels)))
