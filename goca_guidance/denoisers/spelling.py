"""Words by any tokenizer: what it read is decoded token by token, the prompt is found in it, and split into words and signs.

Chat templates, system prompts, padding and what a pipeline adds before or behind the prompt are passed over in this way.
"""

import re
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from html import unescape
from itertools import takewhile
from typing import Any


Span = tuple[int, int]  # characters, from the first to behind the last
BREAK = "\0"  # in the text of a spelling: a special token
_UNFINISHED = "\ufffd"  # how a decoder writes bytes that are no character yet
_SHORTEST = 8  # characters of a cut prompt that are no coincidence; of a shorter prompt, half
_QUOTES = str.maketrans("‘’‚‛“”„‟`´", "''''\"\"\"\"''")


@dataclass(frozen=True)
class Spelling:
    """What a tokenizer read, as text; `owners` has for each character the positions of the tokens that made it."""

    text: str
    owners: list[tuple[int, ...]]

    def words(self, span: Span) -> list[tuple[str, list[int]]]:
        """The words and signs of a part of the text, in order, with the positions of their tokens.

        An apostrophe within a word belongs to it, and an emoji is one sign, however it is put together. In scripts without
        spaces between words (Chinese, Japanese, Thai), what the tokenizer holds together is a word. Signs of one token are
        one; what is a token's with a word has that token too.
        """
        found: list[tuple[str, list[int]]] = []
        for start, end in self._pieces(*span):
            text, tokens = self.text[start:end], sorted({p for owner in self.owners[start:end] for p in owner})
            if found and _is_sign(text) and _is_sign(found[-1][0]) and found[-1][1][-1] == tokens[0]:
                found[-1] = (found[-1][0] + text, sorted({*found[-1][1], *tokens}))
            else:
                found.append((text, tokens))
        return found

    def tokens(self, span: Span) -> tuple[int, int]:
        """The first token of a part of the text, and the one behind it that is no space; their number, where there is none."""
        start, end = span
        behind = next((i for i in range(end, len(self.text)) if not self.text[i].isspace()), None)
        count = self.owners[-1][-1] + 1 if self.owners else 0
        return self.owners[start][0] if start < end else count, count if behind is None else self.owners[behind][0]

    def _pieces(self, start: int, end: int):
        kinds = "".join(map(_kind, self.text[start:end]))
        for match in _PIECE.finditer(kinds):
            first, last = match.start() + start, match.end() + start
            borders = [i for i in range(first + 1, last) if self._is_border(i, kinds[i - start - 1], kinds[i - start])]
            yield from zip([first, *borders], [*borders, last], strict=True)

    def _is_border(self, i: int, before: str, kind: str) -> bool:
        """Between two tokens of a script without spaces."""
        return "c" in before + kind and kind != "m" and not set(self.owners[i - 1]) & set(self.owners[i])


# ---- ids to text -----------------------------------------------------------------------------------------------------
def spell(tokenizer: Any, ids: Sequence[int]) -> Spelling:
    """Decode ids one by one; a character of several tokens (UTF-8 in bytes) belongs to all of them. Below zero is no token."""
    special, text = _special_tokens(tokenizer), ""
    owners: list[tuple[int, ...]] = []
    held: list[int] = []
    for position, token in enumerate(ids):
        if token < 0:
            continue
        if token in special:
            held, piece = [position], BREAK
        else:
            held.append(position)
            piece = _decoded(tokenizer, [ids[p] for p in held])
            if piece.endswith(_UNFINISHED) and len(held) < 4:  # UTF-8 has at most four bytes
                continue
        text += piece
        owners += [tuple(held)] * len(piece)
        held = []
    return Spelling(text, owners)


def _decoded(tokenizer, ids: list[int]) -> str:
    """The text of some tokens; sentencepiece's mark of a space is one also where a text begins with it."""
    text = tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)
    first = tokenizer.convert_ids_to_tokens(ids[0])
    return f" {text}" if isinstance(first, str) and first.startswith("▁") and not text.startswith(" ") else text


def _special_tokens(tokenizer) -> dict[int, str]:
    added = getattr(tokenizer, "added_tokens_decoder", {})
    named = dict(zip(tokenizer.all_special_ids, tokenizer.all_special_tokens, strict=True))
    return named | {number: str(token) for number, token in added.items() if token.special}


# ---- the prompt in the text ------------------------------------------------------------------------------------------
def find_prompt(
    tokenizer: Any, ids: Sequence[int], prompts: Sequence[str] | None, others: Sequence[Sequence[int]] = ()
) -> tuple[Spelling, Span | None]:
    """What was read, and where the user's prompt stands in it; None where it does not.

    Where the encoder cut it, its beginning is found. Case, accents, spaces and forms of quotes do not count: pipelines clean.

    Args:
        prompts: the texts that it may be, or None: what the other texts have not.
        others: what the same encoder read besides, in the same template. The prompt holds all that differs: so a prompt of
            words that stand in the template too is told from it.
    """
    spelling, special = spell(tokenizer, ids), _special_tokens(tokenizer)
    differs = _differing(tokenizer, ids, others)
    if prompts is None:
        return spelling, _between(spelling, differs) if differs else _alone(spelling.text)
    text, places = _plain(spelling.text)
    for whole in (True, False):
        for prompt in dict.fromkeys(each for given in prompts for each in (given, unescape(unescape(given)))):
            for token in special.values():
                prompt = prompt.replace(token, BREAK)
            found = _find(text, _plain(prompt)[0], whole)
            if best := _best(spelling, [(places[a], places[b - 1] + 1) for a, b in found], differs):
                marks = takewhile(_is_mark, spelling.text[best[1] :])
                return spelling, (best[0], best[1] + len(list(marks)))
    return spelling, (0, 0) if not all(prompts) else None


def _plain(text: str) -> tuple[str, list[int]]:
    """A text for comparison, and for each of its characters the place in `text`."""
    plain, places = "", []
    for place, letter in enumerate(text):
        letters = unicodedata.normalize("NFKD", letter.translate(_QUOTES)).casefold()
        kept = "".join(each for each in letters if each == BREAK or not (each.isspace() or _is_mark(each)))
        if not kept and not (letter.isspace() or _is_mark(letter)):
            kept = letter  # a sign that is an accent on a space, as a macron by itself
        plain += kept
        places += [place] * len(kept)
    return plain, places


def _find(text: str, prompt: str, whole: bool) -> list[Span]:
    """Where a prompt stands, or the longest beginning of it before a special token or the end."""
    starts = [match.start() for match in re.finditer(f"(?={re.escape(prompt[:1])})", text)] if prompt else []
    if whole:
        return [(start, start + len(prompt)) for start in starts if text.startswith(prompt, start)]
    spans = [(start, start + _alike(text[start : start + len(prompt)], prompt)) for start in starts]
    shortest = min(_SHORTEST, (len(prompt) + 1) // 2)
    cut = [(a, b) for a, b in spans if text[b : b + 1] in ("", BREAK) and b - a >= shortest]
    return [span for span in cut if span[1] - span[0] == max(b - a for a, b in cut)]


def _best(spelling: Spelling, spans: list[Span], differs: Span | None) -> Span | None:
    """The span that holds all that differs, else one before a special token and not behind one, else the last one."""

    def rank(span: Span):
        start, end = span
        tokens = spelling.owners[start][0], spelling.owners[end - 1][-1]
        holds = differs is not None and tokens[0] <= differs[0] and differs[1] <= tokens[1] + 1
        before, behind = spelling.text[:start].rstrip(" "), spelling.text[end:].lstrip()
        return holds, behind[:1] in ("", BREAK), before[-1:] != BREAK, start

    return max(spans, key=rank, default=None)


def _differing(tokenizer, ids: Sequence[int], others: Sequence[Sequence[int]]) -> Span | None:
    """First and behind the last of the tokens that no other text has at its beginning or its end; None where all have all."""
    low, high = content(tokenizer, ids)
    text = list(ids[low:high])
    rest = [list(other[slice(*content(tokenizer, other))]) for other in others]
    rest = [other for other in rest if other and other != text]
    if not rest:
        return None
    first = low + min(_alike(text, other) for other in rest)
    last = high - min(_alike(text[::-1], other[::-1]) for other in rest)
    return first, max(first, last)


def content(tokenizer: Any, ids: Sequence[int]) -> Span:
    """Tokens that are no padding: from the first to behind the last. Where the end token pads, the first one is the end."""
    pad, ends = tokenizer.pad_token_id, tokenizer.pad_token_id == tokenizer.eos_token_id
    kept = [position for position, token in enumerate(ids) if token >= 0]
    low = next((i for i, position in enumerate(kept) if ids[position] != pad), len(kept))
    high = next((i for i in range(len(kept), low, -1) if ids[kept[i - 1]] != pad), low)
    high = min(high + (ends and high > low), len(kept))
    return (kept[low], kept[high - 1] + 1) if high > low else (0, 0)


def _between(spelling: Spelling, tokens: Span) -> Span:
    inside = [i for i, owner in enumerate(spelling.owners) if tokens[0] <= owner[0] and owner[-1] < tokens[1]]
    return (inside[0], inside[-1] + 1) if inside else (0, 0)


def _alone(text: str) -> Span | None:
    """The only text between special tokens; None where there are several."""
    found = [match.span() for match in re.finditer(f"[^{BREAK}]+", text) if match[0].strip()]
    return (found or [(0, 0)])[0] if len(found) < 2 else None


def _alike(first: Sequence, second: Sequence) -> int:
    """How many elements two sequences begin with alike."""
    return next(
        (i for i, (a, b) in enumerate(zip(first, second, strict=False)) if a != b), min(len(first), len(second))
    )


# ---- characters ------------------------------------------------------------------------------------------------------
UNSPACED = (  # scripts without spaces: Thai to Tibetan, Burmese, Khmer, kana, bopomofo, Han
    "\u0e00-\u0fff\u1000-\u109f\u1780-\u17ff\u3005-\u3007\u3040-\u312f\u31a0-\u31bf\u31f0-\u31ff\u3400-\u4dbf\u4e00-\u9fff"
    "\uf900-\ufaff\uff66-\uff9f\U00020000-\U0003ffff"
)
_WITHOUT_SPACES = re.compile(f"[{UNSPACED}]")
_PIECE = re.compile(r"[wc][wcm]*(?:'[wc][wcm]*)*|ff?|[xt][mt]*(?:zx[mt]*)*|[^ ]")  # kinds of characters


@cache
def _kind(letter: str) -> str:
    """w: of a word; c: of a script without spaces; m: a mark on what is before; ' : apostrophe; z, t, f: joiner, tone and half
    a flag, of emoji; space; x: a sign.
    """
    if _is_mark(letter):
        return "m"
    if letter.isalnum() or letter == "_":
        return "c" if is_unspaced(letter) else "w"
    if letter.isspace() or letter == BREAK:
        return " "
    if "\U0001f3fb" <= letter <= "\U0001f3ff":
        return "t"
    if "\U0001f1e6" <= letter <= "\U0001f1ff":
        return "f"
    return {"'": "'", "’": "'", "\u200d": "z"}.get(letter, "x")


def is_unspaced(letter: str) -> bool:
    """Whether a letter is of a script that has no spaces between words."""
    return _WITHOUT_SPACES.match(letter) is not None


def _is_mark(letter: str) -> bool:
    return unicodedata.category(letter)[0] == "M"


def _is_sign(text: str) -> bool:
    return not any(map(str.isalnum, text))
