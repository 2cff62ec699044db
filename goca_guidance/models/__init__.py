"""The embedded model, beside this file: what it knows. Its card is tiny-sd/README.md."""

import re
from pathlib import Path


SCENE = Path(__file__).with_name("scene.png")  # a held-out scene; its names are in the file's "names" text
OBJECTS = (
    *("aeroplane", "bird", "boat", "bus", "car", "cat", "chair", "cow", "dog", "horse", "motorbike", "person"),
    *("potted plant", "sheep", "train", "tv monitor"),
)
GROUNDS = ("grass", "sand", "water", "sky", "brick", "snow", "road", "wood")
END = "</w>"  # of a piece that ends a word


def unknown_words(tokenizer, prompt: str) -> tuple[list[str], list[str]]:
    """Words of a prompt that the embedded model's tokenizer spells in letters, and all that it knows.

    Each word of its captions is one token, and no letter alone but "a".
    """
    whole = {word.removesuffix(END) for word in tokenizer.get_vocab() if word.endswith(END)}
    known = {word for word in whole if len(word) > 1 and word.isalpha()} | {"a"}
    words = re.findall(r"[^\W_]+", prompt.lower())
    return [word for word in dict.fromkeys(words) if word not in known], sorted(known)
