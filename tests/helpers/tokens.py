"""Tiny tokenizers of each kind, and what they make of prompts."""

from eval.scenes.tiny_model import clip_tokenizer
from goca_guidance.denoisers.words import Encoded
from tests.helpers.families import BERT_TOKENS, FAMILIES, HUNYUAN_T5_TOKENS
from tests.helpers.tiny import WORDS


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
