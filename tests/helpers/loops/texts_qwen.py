"""Tiny byte-level BPE tokenizers with chat templates, and tiny Qwen2.5-VL, Qwen3, Qwen3-VL and Mistral 3 encoders.

Every word of the pipelines' templates and of WORDS is one token, so that a template has as many tokens as with the real
vocabulary, which the pipelines rely on; any other word falls apart into bytes or pieces.
"""

import json
import re
from functools import cache

import tokenizers
import transformers
from tokenizers import decoders, models, pre_tokenizers, trainers
from transformers.models.qwen2.tokenization_qwen2 import PRETOKENIZE_REGEX

from tests.helpers.tiny import WORDS


WIDTH = 16  # of every encoder here
LAYERS = 2
_SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>", "<|image_pad|>"]
_SPECIAL += ["<|video_pad|>", "<think>", "</think>"]
_TEMPLATES = (  # what the pipelines write around a prompt, each word once
    "system user assistant\n\n Describe the image by detailing color, shape, size, texture, quantity, text, spatial "
    "relationships of the objects and background: key features input image ( color), then explain how user's text "
    "instruction should alter or modify the image. Generate a new image that meets requirements while maintaining "
    "consistency with original where appropriate. Picture 1: Comprehend analyze provided prompt. You are an AI "
    "that reasons about image descriptions. give structured responses focusing on object attribution actions without "
    "speculation. As expert, first content attributes of (s). Based editing instructions, clearly precisely determine given "
    "ensuring only specified parts altered all other aspects remain consistent captioning generate descriptive suitable for"
)
CHAT = (  # ChatML, as Qwen's; a message's content is a string or parts
    "{% for message in messages %}<|im_start|>{{ message.role }}\n"
    "{% if message.content is string %}{{ message.content }}{% else %}{% for part in message.content %}"
    "{% if part.type == 'text' %}{{ part.text }}{% else %}<|vision_start|><|image_pad|><|vision_end|>{% endif %}"
    "{% endfor %}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n"
    "{% if enable_thinking is defined and not enable_thinking %}<think>\n\n</think>\n\n{% endif %}{% endif %}"
)
_MISTRAL_CHAT = (
    "<s>{% for message in messages %}{{ '[SYSTEM_PROMPT]' if message.role == 'system' else '[INST]' }}"
    "{% for part in message.content %}{% if part.type == 'text' %}{{ part.text }}{% else %}[IMG]{% endif %}{% endfor %}"
    "{{ '[/SYSTEM_PROMPT]' if message.role == 'system' else '[/INST]' }}{% endfor %}"
)
_SIZES = {"hidden_size": WIDTH, "intermediate_size": 24, "num_hidden_layers": LAYERS, "num_attention_heads": 2}
_SIZES |= {"num_key_value_heads": 1, "max_position_embeddings": 2048, "head_dim": 8, "use_cache": False}


# ---- tokenizers ------------------------------------------------------------------------------------------------------
def _pieces() -> pre_tokenizers.PreTokenizer:
    """What is never merged with its neighbours, in bytes."""
    split = pre_tokenizers.Split(tokenizers.Regex(PRETOKENIZE_REGEX), "isolated")
    return pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])


@cache
def _byte_level(first: tuple[str, ...] = ()) -> tuple[dict[str, int], list[tuple[str, str]]]:
    """Vocabulary and merges by which each known word is one token; `first` are the first ids."""
    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = _pieces()
    known = [*WORDS, *re.findall(r"\w+|[^\w\s]+", _TEMPLATES)]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=4000, initial_alphabet=alphabet, special_tokens=list(first), show_progress=False
    )
    tokenizer.train_from_iterator(["\n\n", "\n\n", "user's", *known, *(f" {word}" for word in known)], trainer)
    model = json.loads(tokenizer.to_str())["model"]
    return model["vocab"], [tuple(pair) for pair in model["merges"]]


def qwen_tokenizer() -> transformers.Qwen2Tokenizer:
    """A fresh one with Qwen's chat template: pads right with `<|endoftext|>`, has no start token."""
    vocab, merges = _byte_level()
    tokenizer = transformers.Qwen2Tokenizer(
        vocab=dict(vocab),
        merges=list(merges),
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        extra_special_tokens=_SPECIAL,
        model_max_length=2048,
    )
    tokenizer.chat_template = CHAT
    return tokenizer


def byte_level_tokenizer(special: list[str], **named: str) -> transformers.PreTrainedTokenizerFast:
    """A fresh tokenizer without a class of its own (Mistral's, Llama 3's): `special` are the first ids."""
    vocab, merges = _byte_level(tuple(special))
    tokenizer = tokenizers.Tokenizer(models.BPE(vocab=dict(vocab), merges=list(merges)))
    tokenizer.pre_tokenizer = _pieces()
    tokenizer.decoder = decoders.ByteLevel()
    rest = [token for token in special if token not in named.values()]
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, extra_special_tokens=rest, model_max_length=2048, **named
    )


# ---- encoders --------------------------------------------------------------------------------------------------------
def _tokens(tokenizer) -> dict[str, int]:
    names = {"image_token_id": "<|image_pad|>", "video_token_id": "<|video_pad|>"}
    names |= {"vision_start_token_id": "<|vision_start|>", "vision_end_token_id": "<|vision_end|>"}
    return {name: tokenizer.convert_tokens_to_ids(token) for name, token in names.items()}


def qwen3(layers: int = LAYERS, causal: bool = True) -> transformers.PreTrainedModel:
    """Qwen3: of Z-Image, Flux.2 klein, Ovis-Image."""
    config = transformers.Qwen3Config(**_SIZES | {"num_hidden_layers": layers}, vocab_size=len(qwen_tokenizer()))
    return (transformers.Qwen3ForCausalLM if causal else transformers.Qwen3Model)(config)


def qwen2_5_vl() -> transformers.Qwen2_5_VLForConditionalGeneration:
    """Qwen2.5-VL: of Qwen-Image, LongCat-Image, HunyuanImage 2.1, HunyuanVideo 1.5, Kandinsky 5, Cosmos 2.5."""
    tokenizer, sizes = qwen_tokenizer(), {k: v for k, v in _SIZES.items() if k != "head_dim"}
    ids = {"eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id, "bos_token_id": None}
    rope = {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 10000.0}
    text = {**sizes, "vocab_size": len(tokenizer), "rope_parameters": rope, **ids}
    vision = {"depth": 1, "hidden_size": WIDTH, "intermediate_size": 24, "num_heads": 2, "out_hidden_size": WIDTH}
    vision |= {"fullatt_block_indexes": [0], "patch_size": 14}
    config = transformers.Qwen2_5_VLConfig(text_config=text, vision_config=vision, **_tokens(tokenizer))
    return transformers.Qwen2_5_VLForConditionalGeneration(config)


def qwen2_5_vl_processor() -> transformers.Qwen2_5_VLProcessor:
    """Each 28 x 28 pixels are a token; pictures are shrunk to 8 tokens at most."""
    limits = {"size": {"shortest_edge": 28 * 28, "longest_edge": 8 * 28 * 28}}
    return transformers.Qwen2_5_VLProcessor(
        transformers.Qwen2VLImageProcessor(**limits),
        qwen_tokenizer(),
        transformers.Qwen2VLVideoProcessor(),
        chat_template=CHAT,
    )


def qwen3_vl(layers: int = LAYERS, causal: bool = True) -> transformers.PreTrainedModel:
    """Qwen3-VL: of Qwen-Image 2.1, Krea 2, FIBO 2."""
    tokenizer = qwen_tokenizer()
    rope = {"rope_type": "default", "mrope_section": [2, 1, 1], "mrope_interleaved": True, "rope_theta": 10000.0}
    text = {**_SIZES, "num_hidden_layers": layers, "vocab_size": len(tokenizer), "rope_parameters": rope}
    vision = {"depth": 1, "hidden_size": WIDTH, "intermediate_size": 24, "num_heads": 2, "out_hidden_size": WIDTH}
    vision |= {"deepstack_visual_indexes": [0], "num_position_embeddings": 16}
    config = transformers.Qwen3VLConfig(text_config=text, vision_config=vision, **_tokens(tokenizer))
    return (transformers.Qwen3VLForConditionalGeneration if causal else transformers.Qwen3VLModel)(config)


def qwen3_vl_processor() -> transformers.Qwen3VLProcessor:
    """Each 32 x 32 pixels are a token; pictures are shrunk to 8 tokens at most."""
    pictures = transformers.Qwen2VLImageProcessor(
        patch_size=16, size={"shortest_edge": 32 * 32, "longest_edge": 8 * 32 * 32}
    )
    videos = transformers.Qwen3VLVideoProcessor()
    return transformers.Qwen3VLProcessor(pictures, qwen_tokenizer(), videos, chat_template=CHAT)


def mistral3(layers: int = LAYERS) -> transformers.Mistral3ForConditionalGeneration:
    """Mistral Small 3: of Flux.2 dev, ERNIE-Image."""
    processor = mistral3_processor()
    text = {"model_type": "mistral", **_SIZES, "num_hidden_layers": layers, "vocab_size": len(processor.tokenizer)}
    text |= {"sliding_window": None}
    vision = {"model_type": "pixtral", "hidden_size": WIDTH, "intermediate_size": 24, "num_hidden_layers": 1}
    vision |= {"num_attention_heads": 2, "head_dim": 8, "image_size": 56, "patch_size": 14}
    config = transformers.Mistral3Config(
        text_config=text, vision_config=vision, image_token_id=processor.image_token_id
    )
    return transformers.Mistral3ForConditionalGeneration(config)


def mistral3_processor() -> transformers.PixtralProcessor:
    """Mistral's chat template without spaces around a turn; it pads left, as Mistral's own does."""
    special = ["<unk>", "<s>", "</s>", "[INST]", "[/INST]", "[SYSTEM_PROMPT]", "[/SYSTEM_PROMPT]", "<pad>"]
    special += ["[IMG]", "[IMG_BREAK]", "[IMG_END]"]
    tokenizer = byte_level_tokenizer(
        special, bos_token="<s>", eos_token="</s>", unk_token="<unk>", pad_token="<pad>", padding_side="left"
    )
    tokenizer.chat_template = _MISTRAL_CHAT
    pictures = transformers.PixtralImageProcessor(patch_size=14, size={"longest_edge": 56})
    return transformers.PixtralProcessor(pictures, tokenizer, patch_size=14, chat_template=_MISTRAL_CHAT)
