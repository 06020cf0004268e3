"""Find personal data in text: e-mail addresses, phone and card numbers, IBANs, keys and tokens.

What has a checksum is checked (cards, IBANs), and phone numbers must be ones that the country's numbering plan allows.
"""

import re
from collections.abc import Callable, Iterator
from typing import NamedTuple


class Found(NamedTuple):
    kind: str  # of KINDS
    start: int  # in characters
    stop: int


_EMAIL = re.compile(
    r"(?<![\w.+%-])[\w+%-][\w.+%-]{0,63}@(?:[^\W_](?:[\w-]{0,61}[^\W_])?\.){1,8}[^\W\d_]{2,24}(?![\w@])"
)
_DIGITS = re.compile(r"(?<![\w.,])\d(?:[ -]?\d){12,18}(?![\w]|[.,]\d)")
# The first digits of Visa, Mastercard, American Express, Discover, Diners Club, JCB, UnionPay and Maestro.
_CARD = re.compile(
    r"4|5[1-5]|2(?:2[2-9]|[3-6]|7[01]|720)|3[47]|6(?:011|4[4-9]|5)|3(?:0[0-5]|[689])|35|62|50|5[6-9]|6[37]"
)
_CARD_LENGTHS = {"4": (13, 16, 19), "34": (15,), "37": (15,), "30": (14,), "36": (14,), "38": (14,)}
_IBAN = re.compile(r"(?<![A-Za-z0-9])[A-Z]{2}\d{2}(?: ?[A-Z0-9]{4}){2,7}(?: ?[A-Z0-9]{1,3})?(?![A-Za-z0-9])")
_PHONE = re.compile(r"\d(?:[^\w\n]{0,3}\d){6}")  # seven digits that only punctuation and spaces separate
# The published forms of keys: what issues them, and their fixed prefix.
_KEYS = {
    "OpenAI, Anthropic and others": r"sk-(?:[a-z]+[a-z0-9]*-)*[A-Za-z0-9_-]{20,}",
    "GitHub": r"gh[pousr]_[A-Za-z0-9]{36,}|github_pat_[A-Za-z0-9_]{22,}",
    "GitLab": r"glpat-[A-Za-z0-9_-]{20,}",
    "AWS": r"(?:AKIA|ASIA)[A-Z0-9]{16}",
    "Google": r"AIza[A-Za-z0-9_-]{35}|ya29\.[A-Za-z0-9_-]{20,}|GOCSPX-[A-Za-z0-9_-]{28}",
    "Slack": r"xox[abprse]-[A-Za-z0-9-]{10,}|xapp-\d-[A-Za-z0-9-]{10,}",
    "Hugging Face": r"hf_[A-Za-z0-9]{30,}",
    "Stripe": r"(?:sk|rk|pk)_(?:live|test)_[A-Za-z0-9]{16,}|whsec_[A-Za-z0-9]{24,}",
    "SendGrid": r"SG\.[A-Za-z0-9_-]{16,}\.[A-Za-z0-9_-]{16,}",
    "Twilio": r"SK[0-9a-f]{32}",
    "npm": r"npm_[A-Za-z0-9]{36}",
    "PyPI": r"pypi-[A-Za-z0-9_-]{50,}",
    "DigitalOcean": r"do[por]_v1_[0-9a-f]{64}",
    "Shopify": r"shp(?:at|ca|pa|ss)_[0-9a-fA-F]{32}",
    "Weights & Biases and others": r"(?<=api_key=)[0-9a-f]{40}",
    "JSON Web Tokens": r"eyJ[A-Za-z0-9_-]{8,}\.eyJ[A-Za-z0-9_-]{8,}\.[A-Za-z0-9_-]{8,}",
}
_PRIVATE = (
    r"-----BEGIN [A-Z ]{0,30}PRIVATE KEY(?: BLOCK)?-----[^-]{0,20000}"
    r"(?:-----END [A-Z ]{0,30}PRIVATE KEY(?: BLOCK)?-----)?"
)
_KEY = re.compile(rf"(?<![A-Za-z0-9_-])(?:{'|'.join(_KEYS.values())})(?![A-Za-z0-9_])|{_PRIVATE}")
_URL_PASSWORD = re.compile(r"(?<=://)[^\s:/@]{1,100}:[^\s:/@]{1,100}(?=@)")


def _emails(text: str, region: str) -> Iterator[tuple[int, int]]:
    if "@" in text:
        yield from (match.span() for match in _EMAIL.finditer(text))


def _cards(text: str, region: str) -> Iterator[tuple[int, int]]:
    from stdnum import luhn

    for match in _DIGITS.finditer(text):
        digits = re.sub(r"\D", "", match[0])
        lengths = _CARD_LENGTHS.get(digits[:2]) or _CARD_LENGTHS.get(digits[:1]) or range(16, 20)
        if _CARD.match(digits) and len(digits) in lengths and len(set(digits)) > 1 and luhn.is_valid(digits):
            yield match.span()


def _ibans(text: str, region: str) -> Iterator[tuple[int, int]]:
    from stdnum import iban

    for match in _IBAN.finditer(text):
        # What follows may look like one more group of it: "… 3000 BANK".
        groups = [(stop.start(), match[0][: stop.start()]) for stop in re.finditer(r"(?= )|$", match[0])]
        for length, candidate in reversed(groups):
            if iban.is_valid(candidate, check_country=False):
                yield match.start(), match.start() + length
                break


def _phones(text: str, region: str) -> Iterator[tuple[int, int]]:
    if not _PHONE.search(text):
        return
    import phonenumbers

    matcher = phonenumbers.PhoneNumberMatcher(text, region or None, max_tries=1000)
    for match in matcher:
        yield match.start, match.end


def _keys(text: str, region: str) -> Iterator[tuple[int, int]]:
    yield from (match.span() for match in _KEY.finditer(text))
    if "://" in text:
        yield from (match.span() for match in _URL_PASSWORD.finditer(text))


# In the order in which they are looked for: a span that an earlier kind took is not searched by a later one.
KINDS: dict[str, Callable[[str, str], Iterator[tuple[int, int]]]] = {
    "key": _keys,
    "email": _emails,
    "iban": _ibans,
    "card": _cards,
    "phone": _phones,
}


def find(text: str, kinds: tuple[str, ...] = tuple(KINDS), region: str = "US") -> list[Found]:
    """Return the personal data in a text, without overlaps, in order.

    `region` is the country (ISO 3166) whose phone numbers are found without their country code; with "" only numbers
    that begin with + are.
    """
    found: list[Found] = []
    for kind in KINDS:
        if kind in kinds:
            spans = [Found(kind, start, stop) for start, stop in KINDS[kind](text, region)]
            found += [
                one for one in spans if all(one.stop <= other.start or other.stop <= one.start for other in found)
            ]
    return sorted(found, key=lambda one: one.start)


def redact(text: str, found: list[Found]) -> str:
    """Return the text with each of them replaced by its kind: [EMAIL], [PHONE], …"""
    for one in reversed(found):
        text = f"{text[: one.start]}[{one.kind.upper()}]{text[one.stop :]}"
    return text
