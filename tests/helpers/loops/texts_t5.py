"""Tiny T5 and UMT5 encoders with their tokenizer."""

from typing import Any

import transformers

from tests.helpers.families import MAX_TOKENS, _t5


def t5(suffix: str = "", width: int = 32, max_length: int = MAX_TOKENS) -> dict[str, Any]:
    """Encoder and tokenizer: each of WORDS is one token, any other word is spelled; `</s>` ends a text."""
    return _t5(suffix, width, max_length)


def umt5(width: int = 32) -> dict[str, Any]:
    """UMT5 (Wan and its kin): T5 with a position bias in each layer; stock pipelines fill with zeros behind the text."""
    parts = t5(width=width)
    sizes = {"d_model": width, "d_ff": 37, "d_kv": 8, "num_heads": 4, "num_layers": 2}
    encoder = transformers.UMT5EncoderModel(transformers.UMT5Config(vocab_size=len(parts["tokenizer"]), **sizes))
    return parts | {"text_encoder": encoder}
