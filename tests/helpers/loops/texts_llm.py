"""Tiny text encoders and tokenizers that several loops share: Gemma 2, Llama 3, GLM-4, ChatGLM, and T5's relatives.

Each of WORDS is one token of every tokenizer; other text is letters or bytes. Templates and padding are the real ones'.
"""

import io
import tempfile
from collections.abc import Iterable
from functools import cache
from pathlib import Path

import sentencepiece
import tokenizers
import torch
import transformers
from diffusers.pipelines.kolors.text_encoder import ChatGLMConfig, ChatGLMModel
from diffusers.pipelines.kolors.tokenizer import ChatGLMTokenizer
from transformers.convert_slow_tokenizer import bytes_to_unicode

from tests.helpers.tiny import WORDS


WIDTH = 16
SMALL = {"hidden_size": WIDTH, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
BYTES = [f"<0x{i:02X}>" for i in range(256)]
LETTERS = [chr(i) for i in range(33, 127)]


# ---- sentencepiece, a mark before each word ---------------------------------------------------------------------------
def _chains(words: Iterable[str], prefix: str) -> list[tuple[str, str]]:
    """Merges that build each word from left to right; words that open with the same letters share them."""
    spelled = [prefix + word for word in words]
    return list(dict.fromkeys((word[:i], word[i]) for word in spelled for i in range(1, len(word))))


def _sentencepiece(special: list[str]) -> dict:
    """Vocabulary and merges; words behind the mark come first, so that no other merge tears them."""
    merges = _chains(WORDS, "▁") + _chains(WORDS, "")
    tokens = [*special, *BYTES, "▁", *LETTERS, *(a + b for a, b in merges)]
    return {"vocab": {token: i for i, token in enumerate(dict.fromkeys(tokens))}, "merges": merges}


def gemma_tokenizer(max_length: int) -> transformers.GemmaTokenizer:
    """`<bos>` and the text; padding on the left unless a pipeline says otherwise."""
    special = ["<pad>", "<eos>", "<bos>", "<unk>", "<mask>"]
    return transformers.GemmaTokenizer(
        **_sentencepiece(special), add_bos_token=True, padding_side="left", model_max_length=max_length
    )


def gemma2(max_length: int = 64, width: int = WIDTH) -> dict:
    tokenizer = gemma_tokenizer(max_length)
    config = transformers.Gemma2Config(
        vocab_size=len(tokenizer), num_key_value_heads=1, head_dim=8, **SMALL | {"hidden_size": width}
    )
    return {"text_encoder": transformers.Gemma2Model(config), "tokenizer": tokenizer}


def t5gemma(max_length: int = 24, width: int = WIDTH) -> dict:
    """PRX's: the encoder of T5Gemma alone, and Gemma's tokenizer with padding on the right."""
    tokenizer = gemma_tokenizer(max_length)
    tokenizer.padding_side = "right"
    module = {"vocab_size": len(tokenizer), "num_key_value_heads": 1, "head_dim": 8, **SMALL, "hidden_size": width}
    config = transformers.T5GemmaConfig(encoder=module, decoder=module, is_encoder_decoder=False)
    encoder = transformers.models.t5gemma.modeling_t5gemma.T5GemmaEncoder(config.encoder)
    return {"text_encoder": encoder, "tokenizer": tokenizer}


def umt5(max_length: int = 24, width: int = 32) -> dict:
    """AuraFlow's: the encoder of a T5 whose tokenizer is Llama's, ended as T5's."""
    tokenizer = transformers.LlamaTokenizer(
        **_sentencepiece(["<pad>", "<s>", "</s>", "<unk>"]),
        pad_token="<pad>",
        add_bos_token=False,
        add_eos_token=True,
        padding_side="right",
        model_max_length=max_length,
    )
    sizes = {"d_model": width, "d_ff": 37, "d_kv": 8, "num_heads": 4, "num_layers": 2}
    encoder = transformers.UMT5EncoderModel(transformers.UMT5Config(vocab_size=len(tokenizer), **sizes))
    return {"text_encoder": encoder, "tokenizer": tokenizer}


# ---- bytes, a mark for each space ------------------------------------------------------------------------------------
def _byte_level(special: list[str], opening: list[str]) -> tokenizers.Tokenizer:
    """A tokenizer of bytes that puts `opening` before each text."""
    merges = _chains(WORDS, "Ġ") + _chains(WORDS, "")
    tokens = [*bytes_to_unicode().values(), *(a + b for a, b in merges)]
    model = tokenizers.models.BPE({token: i for i, token in enumerate(dict.fromkeys(tokens))}, merges)
    tokenizer = tokenizers.Tokenizer(model)
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    tokenizer.add_special_tokens(special)
    numbers = [(token, tokenizer.token_to_id(token)) for token in opening]
    tokenizer.post_processor = tokenizers.processors.TemplateProcessing(
        single=" ".join([*opening, "$A"]), special_tokens=numbers
    )
    return tokenizer


def llama3(suffix: str = "", max_length: int = 24, **changes) -> dict:
    """Llama 3.1's: `<|begin_of_text|>` and the text, padding on the right."""
    special = ["<|begin_of_text|>", "<|end_of_text|>", "<|eot_id|>"]
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=_byte_level(special, special[:1]),
        bos_token=special[0],
        eos_token=special[2],
        padding_side="right",
        model_max_length=max_length,
    )
    config = transformers.LlamaConfig(
        vocab_size=len(tokenizer), num_key_value_heads=1, attn_implementation="eager", **SMALL | changes
    )
    return {f"text_encoder{suffix}": transformers.LlamaForCausalLM(config), f"tokenizer{suffix}": tokenizer}


def glm(max_length: int = 64, width: int = WIDTH) -> dict:
    """GLM-4's: `[gMASK]<sop>` and the text, padding on the left."""
    special = ["<|endoftext|>", "[gMASK]", "<sop>", "<|user|>"]
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=_byte_level(special, special[1:3]),
        eos_token=special[0],
        pad_token=special[0],
        padding_side="left",
        model_max_length=max_length,
    )
    config = transformers.GlmConfig(
        vocab_size=len(tokenizer), pad_token_id=0, num_key_value_heads=1, head_dim=8, **SMALL | {"hidden_size": width}
    )
    return {"text_encoder": transformers.GlmModel(config), "tokenizer": tokenizer}


# ---- ChatGLM ---------------------------------------------------------------------------------------------------------
@cache
def _chatglm_pieces() -> bytes:
    """A sentencepiece model that knows WORDS: the slow tokenizer reads no other form."""
    made = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter([" ".join(WORDS)] * 9 + LETTERS),
        model_writer=made,
        model_type="bpe",
        vocab_size=500,
        hard_vocab_limit=False,
        byte_fallback=True,
        split_by_unicode_script=False,
        minloglevel=2,
    )
    return made.getvalue()


def chatglm(max_length: int = 24, width: int = 32) -> dict:
    """Kolors': `[gMASK]sop` and the text, padding on the left."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "tokenizer.model"
        path.write_bytes(_chatglm_pieces())
        tokenizer = ChatGLMTokenizer(str(path), model_max_length=max_length)
    config = ChatGLMConfig(
        num_layers=2,
        padded_vocab_size=tokenizer.vocab_size,
        hidden_size=width,
        ffn_hidden_size=24,
        kv_channels=8,
        num_attention_heads=width // 8,
        seq_length=max_length,
        multi_query_attention=True,
        multi_query_group_num=1,
        apply_query_key_layer_scaling=False,
        add_bias_linear=False,
        add_qkv_bias=True,
        rmsnorm=True,
        post_layer_norm=True,
        original_rope=True,
    )
    encoder = ChatGLMModel(config, empty_init=False)
    for module in encoder.modules():
        if type(module).__name__ == "RMSNorm":  # made of uninitialised memory
            torch.nn.init.ones_(module.weight)
    return {"text_encoder": encoder, "tokenizer": tokenizer}
