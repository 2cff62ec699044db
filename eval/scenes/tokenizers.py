"""Tokenizers made from a list of words, each of which is one token; any other text falls back to letters."""

import string
from collections.abc import Iterable

from transformers import CLIPTokenizer, T5Tokenizer
from transformers.convert_slow_tokenizer import bytes_to_unicode

from eval.scenes.scene import CAPTION_WORDS, CLASSES


CHARACTERS = string.ascii_letters + string.digits + ".,!?'-"


def caption_words() -> list[str]:
    """The words of every caption: class names split at spaces, and the glue between them."""
    return sorted({word for name in CLASSES for word in name.split()} | set(CAPTION_WORDS))


def clip_tokenizer(words: Iterable[str], max_length: int) -> CLIPTokenizer:
    """A CLIP tokenizer whose byte-pair merges build the words from left to right."""
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


def t5_tokenizer(words: Iterable[str], max_length: int) -> T5Tokenizer:
    """A T5 tokenizer (unigrams) of the words."""
    vocab = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -2.0)]
    vocab += [(f"▁{word}", -3.0) for word in words] + [(character, -8.0) for character in CHARACTERS]
    return T5Tokenizer(vocab=vocab, extra_ids=0, model_max_length=max_length)
