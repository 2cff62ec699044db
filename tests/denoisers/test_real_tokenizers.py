"""Which tokens become regions, with real tokenizers, for real COCO captions (`-s` prints them).

Compared with the tokenizers' own character offsets, which the library never asks for.
"""

import csv
import json
import re
from functools import cache

import pytest
import tokenizers
import torch
from hypothesis import HealthCheck, given, settings
from tokenizers import models, normalizers, pre_tokenizers, trainers
from transformers import AutoTokenizer, GemmaTokenizer

from goca_guidance.denoisers.layouts import class_layout, class_prompt, prompt_layout
from goca_guidance.denoisers.words import Encoded, sentence, words
from tests.helpers.places import shared
from tests.helpers.tokens import ODD_NAMES, named_as_alone, odd_names


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


# Words that a tagger (spaCy's en_core_web_sm 3.8, MIT) holds for determiners, pronouns, auxiliaries, adpositions, particles
# or conjunctions in most of their uses in the first 6,000 captions: a judge that knows nothing of our list.
TAGGED = frozenset(
    "a about above across after against all along alongside am amid among amongst an and another any are around as at atop be "
    "been before behind being below beneath beside besides between beyond both but by ca can did do does down during each "
    "either every everything for from has have he her herself him himself his how i if in into is it its itself like near no "
    "not of off on onto or out over past per she some someone something that the their them themselves there these they this "
    "through to toward towards under underneath up upon us was we what when where which while who whom will with within "
    "without would yet you your".split()
)


def test_no_function_word_is_a_region_in_captions(tokenizer, kind):
    """In at most one caption of a hundred (and `can`, which the tagger holds for an auxiliary, is mostly a trash can)."""
    texts, guided_by, count = captions(6000), [], 0
    for start in range(0, len(texts), 100):
        batch = texts[start : start + 100]
        ids = tokenizer(batch, padding=True, return_tensors="pt").input_ids
        for caption, labels in zip(
            batch, prompt_layout([Encoded(tokenizer, ids)], None, drop_stop_words=True).labels, strict=True
        ):
            wrong = [label for label in labels if label.lower() in TAGGED or not any(map(str.isalnum, label))]
            guided_by += [(wrong, caption)] if wrong else []
            count += len(labels)
    print(
        f"\n{kind}: {len(guided_by)} of {len(texts)} captions, {count / len(texts):.2f} regions in one;",
        guided_by[:20],
    )
    assert len(guided_by) <= len(texts) / 100
    assert count / len(texts) > 4  # of about ten words


# ---- class names -----------------------------------------------------------------------------------------------------
ODD = [*ODD_NAMES, "café", "“cat”"]
ONLY_CLIP = ["{braces}", "<tag>", "~", "猫", "🐱", "👩‍👧 (family)", "猫，狗", "naïve", "Čeština", "हिन्दी"]


def check_names(tokenizer, names):
    named_as_alone(tokenizer, names, tokenizer(class_prompt(names), return_tensors="pt").input_ids)


def test_odd_names_are_found(tokenizer, kind):
    for name in ODD + ONLY_CLIP * (kind == "clip"):
        check_names(tokenizer, [name, "cat"])
        check_names(tokenizer, ["cat", name])


@given(names=odd_names(ODD, "é"))
@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_names_are_found_or_refused(tokenizer, kind, names):
    """T5 does not know every sign: what it cannot read, or tell from another name, is refused."""
    refused = None
    try:
        check_names(tokenizer, names)
    except ValueError as error:
        refused = str(error)
    assert refused is None or (kind == "t5" and re.search("knows nothing of|are the same tokens", refused))


@pytest.mark.parametrize(
    ("names", "reason"),
    [
        (["猫", "狗"], "knows nothing of '猫'"),
        (["cat", "🐱"], "knows nothing of '🐱'"),
        (["猫 cat", "狗 cat"], "'猫 cat' and '狗 cat' are the same tokens"),
        (["ｃａｔ", "cat"], "are the same tokens"),
    ],
)
def test_names_that_t5_cannot_tell_apart_are_refused(names, reason):
    tokenizer = AutoTokenizer.from_pretrained(shared(f"model_trees/{TOKENIZERS['t5']}"))
    row = tokenizer([class_prompt(names)], return_tensors="pt").input_ids
    with pytest.raises(ValueError, match=reason):
        class_layout([Encoded(tokenizer, row)], [names])


# ---- any tokenizer ---------------------------------------------------------------------------------------------------
QWEN = (  # Qwen-Image's template: 34 tokens before the prompt
    "<|im_start|>system\nDescribe the image by detailing the color, shape, size, texture, quantity, text, spatial "
    "relationships of the objects and background:<|im_end|>\n<|im_start|>user\n{}<|im_end|>\n<|im_start|>assistant\n"
)
READ = {  # by tokenizer: where it lies, what stands around the prompt
    "clip": ("model_trees/stable-diffusion-v1-5/tokenizer", "{}"),
    "t5": ("model_trees/FLUX.1-dev/tokenizer_2", "{}"),
    "qwen3": ("tokenizers/qwen3", QWEN),
    "llama3": ("tokenizers/llama3_1", "{}"),
    "sentencepiece": (None, "You are an assistant designed to generate images. <Prompt Start> {}"),
}
TEN = {  # by prompt: its words by most tokenizers, and by those that differ
    "a cat on grass": ("a cat on grass", {}),
    "一只猫坐在草地上，旁边有狗": (
        "一只 猫 坐在 草 地上 ， 旁边 有 狗",
        {
            "clip": "一只猫坐在草地上 ， 旁边有狗",
            "t5": "<unk> , <unk>",
            "llama3": "一 只 猫 坐在 草 地 上 ， 旁 边 有 狗",
            "sentencepiece": "一只 猫坐在 草地上 ， 旁 边 有 狗",
        },
    ),
    "a 🐱 and 👩\u200d👧!": (
        "a 🐱 and 👩\u200d👧 !",
        {"clip": "a 🐱 and 👩\u200d👧!", "t5": "a <unk> and <unk> <unk> !"},
    ),
    "“a red” 'cat' \"dog\"": ("“ a red ” ' cat ' \" dog \"", {}),
    "(cat:1.3), [dog]": (
        "( cat : 1 . 3 ), [ dog ]",
        {"t5": "( cat : 1.3 ), [ dog ]", "sentencepiece": "( cat : 1 . 3 ) , [ dog ]"},
    ),
    "a man's dogs' surfboard, don't": (
        "a man's dogs ' surfboard , don't",
        {kind: "a man 's dogs ' surfboard , don 't" for kind in ("clip", "t5")},
    ),
    "user assistant": ("user assistant", {}),
    "T-shirt 3.5 C++ snake_case": (
        "T - shirt 3 . 5 C ++ snake_case",
        {
            "clip": "t - shirt 3 . 5 c ++ snake _ case",
            "t5": "T - shirt 3.5 C ++ snake _ case",
            "sentencepiece": "T - shirt 3 . 5 C + + snake_case",
        },
    ),
    "naïve café हिन्दी": (
        "naïve café हिन्दी",
        {"clip": "naïve café ह ि न ् द ी", "t5": "na<unk>ve café <unk>"},
    ),
    "a red cat, " * 40: ("a red cat , " * 40, {"clip": "a red cat , " * 18 + "a red cat"}),
}


def trained_sentencepiece():
    """A small byte-pair vocabulary with sentencepiece's marks, and bytes for what it does not know."""
    learner = tokenizers.Tokenizer(models.BPE(unk_token="<unk>"))
    learner.normalizer = normalizers.Replace(" ", "▁")
    learner.pre_tokenizer = pre_tokenizers.Split("▁", "merged_with_next")
    texts = ["a cat on grass and dogs", "a man's surfboard", "user assistant", "猫 狗 一只 坐在"]
    texts = [*(text for text in texts for _ in range(9)), *["一只猫坐在草地上"] * 2]
    learner.train_from_iterator(texts, trainers.BpeTrainer(vocab_size=300, show_progress=False))
    model = json.loads(learner.to_str())["model"]
    pieces = ["<pad>", "<eos>", "<bos>", "<unk>", *(f"<0x{i:02X}>" for i in range(256)), *model["vocab"]]
    merges = [tuple(pair) for pair in model["merges"]]
    return GemmaTokenizer(vocab={piece: i for i, piece in enumerate(dict.fromkeys(pieces))}, merges=merges)


@cache
def read_by(kind):
    path, _ = READ[kind]
    return trained_sentencepiece() if path is None else AutoTokenizer.from_pretrained(shared(path))


@pytest.mark.parametrize("kind", READ)
def test_words_of_ten_prompts(kind):
    """Printed with `-s`: as they are, with their tokens."""
    tokenizer, template = read_by(kind), READ[kind][1]
    length = 77 if kind == "clip" else 512
    for prompt, (most, others) in TEN.items():
        row, empty = (
            tokenizer(template.format(text), truncation=True, max_length=length).input_ids for text in (prompt, "")
        )
        found = words(tokenizer, row, [prompt], [empty])
        print(f"{kind:14}{len(found):4} ", " ".join(f"{word}{positions}" for word, positions in found[:16]))
        assert [word for word, _ in found] == others.get(kind, most).split()
        if kind == "qwen3":
            assert found[0][1][0] == 34


@pytest.mark.parametrize("kind", ["qwen3", "llama3"])
def test_words_of_captions_by_any_tokenizer(kind):
    """As they stand there, split by a regular expression; each from tokens that spell it."""
    tokenizer, template = read_by(kind), READ[kind][1]
    empty = tokenizer(template.format("")).input_ids
    for caption in captions(300):
        row = tokenizer(template.format(caption)).input_ids
        found = words(tokenizer, row, [caption], [empty])
        plain = re.findall(r"\w+(?:['’]\w+)*|[^\w\s]", caption)
        assert "".join(word for word, _ in found) == "".join(plain)
        assert [word for word, _ in found if word[0].isalnum()] == [word for word in plain if word[0].isalnum()]
        for word, positions in found:
            assert word in tokenizer.decode([row[p] for p in positions], clean_up_tokenization_spaces=False)
