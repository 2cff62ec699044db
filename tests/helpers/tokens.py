"""Tiny tokenizers of each kind, and what they make of prompts."""

import string

import transformers
from hypothesis import strategies as st

from eval.scenes.tokenizers import clip_tokenizer
from goca_guidance.denoisers.layouts import class_layout
from goca_guidance.denoisers.words import Encoded
from tests.helpers.families import BERT_TOKENS, FAMILIES, HUNYUAN_T5_TOKENS
from tests.helpers.tiny import WORDS


SIGNS = string.punctuation + "“”‘’…—·，。"
LENGTH = 24
TOKENIZER = clip_tokenizer(WORDS, max_length=LENGTH)
T5 = FAMILIES["pixart-sigma"].components()["tokenizer"]
HUNYUAN = FAMILIES["hunyuan"].components()
BERT, BERT_T5 = HUNYUAN["tokenizer"], HUNYUAN["tokenizer_2"]
TOKENIZERS = {"clip": TOKENIZER, "t5": T5, "bert": BERT}


def knowing_signs(tokenizer):
    """One that reads signs too, of which the families' know few."""
    pieces = [*tokenizer.get_vocab(), *SIGNS, *(f"##{sign}" for sign in SIGNS)]
    if tokenizer is BERT:
        return transformers.BertTokenizer(vocab={piece: i for i, piece in enumerate(dict.fromkeys(pieces))})
    if tokenizer is T5:
        first = sorted(T5.get_vocab(), key=T5.get_vocab().get)
        scores = {piece: -8.0 if len(piece) == 1 else -3.0 for piece in [*first, *SIGNS]}
        return transformers.T5Tokenizer(vocab=list((scores | {"▁": -2.0}).items()), extra_ids=0)
    return tokenizer  # CLIP's reads bytes


READERS = {kind: knowing_signs(tokenizer) for kind, tokenizer in TOKENIZERS.items()}


# ---- odd names of classes --------------------------------------------------------------------------------------------
ODD_NAMES = [  # that every tokenizer which knows signs can read
    *(
        "bow (weapon)",
        "C++",
        "T-shirt",
        "U.S.",
        "rock 'n' roll",
        "dogs'",
        "cat's",
        '12" record',
        "plane 2",
        "R2-D2",
        "a/b",
    ),
    *("[brackets]", "No. 1", "50%", "A&W", "#1", "a.b.c.", "snake_", "it’s", "what?!", "-", "3.5", "x:1"),
]


def odd_names(known, letters: str):
    """Lists of names: known ones, and any text of signs and a few letters."""
    text = st.text(f"()[]{{}}<>'\"’“-/+.#&!?:;@*_$%=~^0129abcxz {letters}", min_size=1, max_size=8)
    name = st.one_of(st.sampled_from(known), text).filter(str.strip)
    return st.lists(name, min_size=1, max_size=5, unique_by=lambda name: " ".join(name.lower().split()))


def named_as_alone(tokenizer, names, row):
    """Each name's region holds what the tokenizer makes of the name alone; `row` is the prompt of all, [1 n]."""
    layout = class_layout([Encoded(tokenizer, row)], [names])
    assert layout.labels == (tuple(names),)
    for region, name in enumerate(names):
        read = row[0, layout.columns[0][layout.groups[0, :, region] > 0]].tolist()
        alone = tokenizer(name, add_special_tokens=False).input_ids
        assert len(read) >= len(alone) > 0
        assert read == alone * (len(read) // len(alone)), name


# ---- prompts ---------------------------------------------------------------------------------------------------------
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
