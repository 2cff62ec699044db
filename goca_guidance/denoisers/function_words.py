"""English function words: what forms no region, as it shows no thing (GoCA, per-pixel rescaling: content tokens).

The closed classes of English grammar, named as Universal Dependencies does. General stop-word lists serve worse: they lack
`behind` and `near`, and hold `back`, `side`, `five` and `computer`. What more often is a thing or its look in captions is not
here: half, back, second, round, mine, well, opposite.
"""

import re
import unicodedata

from goca_guidance.denoisers.words import Words


FUNCTION_WORDS = frozenset(
    # DET
    "a an the some any no every each all both either neither another such many much few several more most less least other "
    "this that these those what which whose my your his her its our their "
    # PRON
    "i me myself you yours yourself yourselves he him himself she hers herself it itself we us ours ourselves they them "
    "theirs themselves oneself who whom whoever whatever whichever others there someone somebody something anyone anybody "
    "anything everyone everybody everything nobody nothing none "
    # AUX
    "am is are was were be been being has have had do does did will would shall should could may might must ought cannot "
    "dont doesnt didnt isnt arent wasnt werent hasnt havent hadnt cant couldnt wont wouldnt shouldnt "
    # ADP, and particles of verbs
    "aboard about above across after against along alongside amid amidst among amongst around as astride at atop before "
    "behind below beneath beside besides between beyond by despite down during except for from in including infront inside "
    "into like near next of off on onto out outside over past per through throughout thru to toward towards under "
    "underneath unlike until unto up upon versus via vs with within without away apart aside forth "
    # CCONJ, SCONJ
    "and or but nor yet if because although though unless since than whether while whilst whereas lest when whenever where "
    "wherever how why "
    # PART, and adverbs that only weigh
    "not n't very so too just also only".split()
)
CLITICS = frozenset("s t m d n re ve ll".split())  # behind an apostrophe: cat's, don't, I'm, they'd, rock 'n' roll
NEGATED = frozenset(  # before 't
    "ain aren can couldn didn doesn don hadn hasn haven isn mightn mustn n needn shan shouldn wasn weren won wouldn".split()
)
BEFORE_CAN = frozenset("i you he she it we they who which that there".split())  # elsewhere it is mostly a trash can
WEIGHT = re.compile(r":\d*\.?\d+[)\]]\W*")  # (cat:1.2), [cat:0.5]: how some programs write what a word weighs


def content_words(found: Words) -> Words:
    """The words that may show a thing: neither function words nor signs."""
    texts = _texts(found)
    return [found[i] for i in _spoken(texts) if not _is_function_word(texts, i)]


def spoken_words(found: Words) -> Words:
    """Words that are no signs. A weight, as in "(cat:1.2)", is a sign; an emoji is a word, where the tokenizer knows it."""
    return [found[i] for i in _spoken(_texts(found))]


def _texts(found):
    return [word.lower().replace("’", "'").replace("<unk>", "") for word, _ in found]  # T5 knows no brace or tilde


def _spoken(texts):
    weights = _weights(texts)
    return [i for i, text in enumerate(texts) if i not in weights and not is_sign(text)]


def is_sign(text: str) -> bool:
    """No letter, no digit, no emoji."""
    return not any(letter.isalnum() or _is_emoji(letter) for letter in text)


def _is_emoji(letter):
    return ("\u2600" <= letter < "\u2800" or letter >= "\U0001f000") and unicodedata.category(letter) == "So"


def _is_function_word(texts, i):
    word, before, (after, last) = texts[i], texts[i - 1] if i else "", (*texts[i + 1 : i + 3], "", "")[:2]
    is_clitic = word.lstrip("'") in CLITICS and (word.startswith("'") or before == "'")
    is_negated = word in NEGATED and (after == "'t" or (after == "'" and last == "t"))
    own, _, clitic = word.partition("'")  # of one word, as most tokenizers have it: it's, don't
    is_contracted = clitic in CLITICS and (own in FUNCTION_WORDS or own in NEGATED)
    is_modal = word == "can" and (before in BEFORE_CAN or after in ("be", "not"))
    return word in FUNCTION_WORDS or is_clitic or is_negated or is_contracted or is_modal


def _weights(texts) -> set[int]:
    """Numbers of the words that lie wholly within a weight."""
    ends = [len("".join(texts[:i])) for i in range(len(texts) + 1)]
    spans = [match.span() for match in WEIGHT.finditer("".join(texts))]
    return {i for i in range(len(texts)) for a, b in spans if a <= ends[i] and ends[i + 1] <= b}
