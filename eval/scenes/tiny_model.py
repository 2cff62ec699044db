"""Components of the embedded model: stock classes, tiny sizes, and a CLIP tokenizer made from a list of words."""

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer
from transformers.convert_slow_tokenizer import bytes_to_unicode

from eval.scenes.scene import CAPTION_WORDS, CLASSES


SIZE, LATENT, MAX_TOKENS = 64, 16, 32
SCHEDULE = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "num_train_timesteps": 1000}
EMBEDDING_STD = (
    0.5  # token embeddings start loud enough for attention to hear them (the default 0.02 does not localise)
)


def clip_tokenizer(words, max_length: int = MAX_TOKENS) -> CLIPTokenizer:
    """A CLIP tokenizer whose byte-pair merges make each of `words` one token; any other text falls back to letters."""
    alphabet = list(bytes_to_unicode().values())
    chains = {word: _merge_chain(word) for word in sorted(set(words))}
    tokens = alphabet + [c + "</w>" for c in alphabet] + [a + b for chain in chains.values() for a, b in chain]
    tokens += ["<|startoftext|>", "<|endoftext|>"]
    vocab = {token: i for i, token in enumerate(dict.fromkeys(tokens))}
    for _ in range(len(chains) + 1):
        merges = list(dict.fromkeys(pair for chain in chains.values() for pair in chain))
        tokenizer = CLIPTokenizer(vocab=vocab, merges=merges, model_max_length=max_length)
        broken = {word: chain for word, chain in chains.items() if len(tokenizer.tokenize(word)) > 1}
        if not broken:
            return tokenizer
        chains = broken | {word: chain for word, chain in chains.items() if word not in broken}  # they merge first now
    raise ValueError(f"Expected words whose merges can be ordered, but these always break others: {sorted(broken)}.")


def _merge_chain(word):
    """Merges that build a word from left to right: c0 c1 -> c0c1, c0c1 c2 -> c0c1c2, ..."""
    letters = [*word[:-1], word[-1] + "</w>"]
    return [("".join(letters[:i]), letters[i]) for i in range(1, len(letters))]


def caption_words() -> list[str]:
    """The words of every caption: class names split at spaces, and the glue between them."""
    return sorted({word for name in CLASSES for word in name.split()} | set(CAPTION_WORDS))


def build_vae() -> AutoencoderKL:
    """Convolutional autoencoder, factor 4, four latent channels."""
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        block_out_channels=(32, 64, 64),
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=8,
        sample_size=SIZE,
    )


def build_text_encoder(tokenizer: CLIPTokenizer) -> CLIPTextModel:
    """One CLIP text layer of width 64."""
    config = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=1,
        num_attention_heads=4,
        max_position_embeddings=tokenizer.model_max_length,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    encoder = CLIPTextModel(config)
    torch.nn.init.normal_(encoder.get_input_embeddings().weight, std=EMBEDDING_STD)
    return encoder


def build_unet() -> UNet2DConditionModel:
    """Cross- and self-attention at 16x16, 8x8 and 4x4, four heads."""
    return UNet2DConditionModel(
        sample_size=LATENT,
        layers_per_block=1,
        block_out_channels=(64, 128, 128),
        down_block_types=("CrossAttnDownBlock2D",) * 3,
        up_block_types=("CrossAttnUpBlock2D",) * 3,
        cross_attention_dim=64,
        attention_head_dim=4,
        norm_num_groups=16,
    )
