"""Texts of scripts that put no spaces between words, cut so that they can be counted."""

import re
import unicodedata
from collections.abc import Sequence

import regex

from jax_it.metrics.metric import References

_WITHOUT_SPACES = (
    "\u3005-\u3007\u3021-\u3029\u3038-\u303b\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003ffff"  # Han
    "\u3041-\u30ff\u31f0-\u31ff\u3105-\u312f\u31a0-\u31bf"  # kana and bopomofo
    "\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff"  # Thai, Lao, Burmese, Khmer
)
# Korean has spaces, but they bound a word with all its endings: 학교, 학교가 and 학교에서 would be three words that
# share nothing. Syllables can be compared without a dictionary.
_HANGUL = "\u1100-\u11ff\ua960-\ua97f\uac00-\ud7ff"
_ALONE = re.compile(f"[{_WITHOUT_SPACES}{_HANGUL}]")
_UNSPACED = re.compile(f"[{_WITHOUT_SPACES}]")
_LATIN = re.compile("[A-Za-z]")


# A character of these scripts with its marks, or a word of any other.
_TOKEN = regex.compile(
    rf"[{_WITHOUT_SPACES}{_HANGUL}&&[\p{{L}}\p{{N}}]]\p{{M}}*"
    rf"|[\p{{L}}\p{{N}}--[{_WITHOUT_SPACES}{_HANGUL}]][\p{{M}}[\p{{L}}\p{{N}}--[{_WITHOUT_SPACES}{_HANGUL}]]]*",
    regex.V1,
)
# Latin letters and symbols, without marks: there `re` finds the same words, and four times as fast.
_PLAIN, _WORD = re.compile("[\0-\u02ff\u2000-\u20cf\u2100-\u2bff]*"), re.compile(r"[^\W_]+")


def characters(text: str) -> list[str]:
    """Return each character of Chinese, Japanese, Korean, Thai, Lao, Burmese and Khmer, and whole words of the rest.

    Words are runs of letters and digits, in lower case; marks stay on their letter, and all else is
    dropped. Unicode's compatibility forms count as what they stand for (NFKC): full width is half width.
    """
    text = unicodedata.normalize("NFKC", text).lower()
    return (_WORD if _PLAIN.fullmatch(text) else _TOKEN).findall(text)


def spaced(text: str) -> str:
    """Return the text (NFKC) with spaces around each character of the scripts that `characters` takes one by one.

    A mark stays on its letter. Nothing is dropped and case is kept.
    """
    pieces: list[str] = []
    before = False  # the last letter stands alone
    for character in unicodedata.normalize("NFKC", text):
        if unicodedata.category(character)[0] != "M":
            alone = bool(_ALONE.match(character))
            if alone or before:
                pieces.append(" ")
            before = alone
        pieces.append(character)
    return "".join(pieces)


# Of each metric that counts words, those that count text without them.
_INSTEAD = {
    "rouge1": "rouge1_chars", "rouge2": "rouge2_chars", "rougeL": "rougeL_chars", "rougeLsum": "rougeL_chars",
    "rougeLsum_sentences": "rougeL_chars",
    "bleu": "bleu_zh, bleu_ja or bleu_char", "ter": "ter_chars", "token_f1": "squad_f1_chars",
    "squad_f1": "squad_f1_chars", "squad_exact_match": "squad_exact_match_chars",
}  # fmt: skip


def advice(names: Sequence[str], references: References) -> str:
    """Return one line on those of the metrics that cannot count most of the references' letters; empty where all can.

    ROUGE's words are of a-z and 0-9 alone. The others' words stand between spaces.
    """
    text = "".join(text for several in references for text in several)
    letters = sum(map(str.isalpha, text))
    lines = []
    for counted, of_rouge, script in (
        (letters - len(_LATIN.findall(text)), True, "letters other than a-z"),
        (len(_UNSPACED.findall(text)), False, "scripts without spaces between words"),
    ):
        found = [name for name in names if name in _INSTEAD and name.startswith("rouge") == of_rouge]
        if found and 2 * counted > letters:
            instead = ", ".join(dict.fromkeys(_INSTEAD[name] for name in found))
            lines.append(f"most references are in {script}, which {', '.join(found)} cannot count; use {instead}")
    return "; ".join(lines)
