"""Exact matches, SQuAD's F1 and final numbers are as defined."""

import re
import string
import unicodedata
from decimal import Decimal
from statistics import fmean

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jax_it import metrics


@pytest.mark.parametrize(
    "prediction, references, expected",
    [
        (" Paris\n", ["paris", "Paris"], 1),
        ("paris", ["Paris"], 0),
        ("Paris.", ["Paris"], 0),
        ("", [" "], 1),
        ("", ["Paris"], 0),
    ],
)
def test_exact_match_ignores_white_space_at_the_ends_alone(prediction, references, expected):
    assert metrics.score(["exact_match"], [prediction], [references]) == {"exact_match": 100 * expected}


@pytest.mark.parametrize(
    "text, number",
    [
        ("She makes 9 * 2 = $<<9*2=18>>18 a day.\n#### 18", "18"),
        ("So 3 apples.\n#### 4 apples for 5 people", "4"),  # the first after the mark
        ("#### 1\n#### 2", "2"),  # the last mark
        ("It is 7. ####", "7"),  # nothing follows the mark
        ("It is 7. #### none", "7"),
        ("First 3, then 18.", "18"),
        ("#### $1,234,567.50", "1234567.5"),
        ("#### 70,000", "70000"),
        ("#### 1,00,000", "100000"),  # lakhs
        ("a pair 1,2", "2"),
        ("either 10, 20", "20"),
        ("1,2345", "2345"),
        ("#### 20%", "20"),
        ("#### -5", "-5"),
        ("#### −5", "-5"),
        ("-$5", "-5"),
        ("$-5", "-5"),
        ("x=-5", "-5"),
        ("答案是-5。", "-5"),
        ("3-5", "5"),
        ("(2)-5", "5"),
        ("10 - 5", "5"),
        ("COVID-19", "19"),
        ("costs $.50", "0.5"),
        ("The answer is...18...", "18"),
        ("The answer is **18**.", "18"),
        ("\\boxed{18}", "18"),
        ("答案是１８。", "18"),  # full width
        ("#### 0.1000000000000000055511151231257827", "0.1000000000000000055511151231257827"),
        ("9" * 5000, "9" * 5000),
        ("none", None),
        ("", None),
        ("####", None),
        ("$ - , . %", None),
    ],
)
def test_the_final_number_is_the_one_after_the_mark_or_the_last(text, number):
    assert metrics.find_final_number(text) == (None if number is None else Decimal(number))


@pytest.mark.parametrize(
    "prediction, references, expected",
    [
        ("I think it is 18 dollars.", ["9 * 2 = 18\n#### 18"], 1),
        ("#### 18.00", ["#### 18"], 1),
        ("#### $1,000.", ["#### 1000"], 1),
        ("50", ["#### 50%"], 1),
        ("-0", ["0"], 1),
        ("0.1", ["0.1000000000000000055511151231257827"], 0),  # equal as floats
        ("#### 19", ["#### 18"], 0),
        ("#### -18", ["#### 18"], 0),
        ("18", ["17", "18"], 1),
        ("eighteen", ["#### 18"], 0),
        ("18", ["eighteen"], 0),
        ("eighteen", ["eighteen"], 0),
        ("18", ["eighteen", "18"], 1),
        ("", [""], 0),
    ],
)
def test_final_numbers_are_compared_as_exact_decimals(prediction, references, expected):
    assert metrics.score(["final_number"], [prediction], [references]) == {"final_number": 100 * expected}


@pytest.mark.parametrize(
    "prediction, references, expected",
    [
        ("The cat sat.", ["a CAT, sat"], 1),
        ("cat cat sat", ["cat sat on mats"], 4 / 7),  # 2 words shared, of 3 and 4
        ("dog", ["cat", "big dog"], 2 / 3),
        ("dog", ["cat"], 0),
        ("another theme", ["nother me"], 0),  # articles are whole words
        ("", [""], 1),
        ("the", ["!"], 1),
        ("", ["cat"], 0),
        ("cat", ["the"], 0),
        ("", ["cat", ""], 1),
    ],
)
def test_token_f1_compares_words_as_squad_does(prediction, references, expected):
    assert metrics.score(["token_f1"], [prediction], [references])["token_f1"] == pytest.approx(100 * expected)


def squad_words(text):
    """SQuAD's normalization, character by character."""
    kept = "".join(character for character in text.lower() if character not in string.punctuation)
    for article in ("a", "an", "the"):
        kept = re.sub(rf"(?<!\w){article}(?!\w)", " ", kept)
    return kept.split()


def squad_f1(predicted, expected):
    left, shared = list(expected), 0
    for word in predicted:
        if word in left:
            left.remove(word)
            shared += 1
    if not predicted or not expected:
        return float(predicted == expected)
    precision, recall = shared / len(predicted), shared / len(expected)
    return 2 * precision * recall / (precision + recall) if shared else 0.0


def mlqa_words(text):
    """MLQA's normalization of Chinese: no articles, punctuation of all scripts out, Chinese characters are words."""
    text = "".join(
        character
        for character in text.lower()
        if character not in string.punctuation and not unicodedata.category(character).startswith("P")
    )
    return re.findall(r"[\u4e00-\u9fa5]|[^\s\u4e00-\u9fa5]+", text)


PIECES = ["the ", "The", "a ", "an\n", "cat", " cats ", "don't", "U.S.", "-", " ", ", ", "猫", "坐在", "。", "3"]
WORDS = st.lists(st.sampled_from(PIECES), max_size=7).map("".join)
EXAMPLES = st.lists(st.tuples(WORDS, st.lists(WORDS, min_size=1, max_size=3)), min_size=1, max_size=3)


@settings(max_examples=100, deadline=None)
@given(EXAMPLES)
def test_squads_scores_are_those_by_brute_force(examples):
    predictions, references = [text for text, _ in examples], [texts for _, texts in examples]
    names = ["squad_exact_match", "squad_f1", "token_f1", "squad_exact_match_chars", "squad_f1_chars"]
    scores = metrics.score(names, predictions, references)
    for words, ending in ((squad_words, ""), (mlqa_words, "_chars")):
        same = [max(float(words(p) == words(r)) for r in texts) for p, texts in examples]
        shared = [max(squad_f1(words(p), words(r)) for r in texts) for p, texts in examples]
        assert scores[f"squad_exact_match{ending}"] == pytest.approx(100 * fmean(same))
        assert scores[f"squad_f1{ending}"] == pytest.approx(100 * fmean(shared))
    assert scores["token_f1"] == scores["squad_f1"]


@pytest.mark.parametrize(
    "prediction, references, expected",
    [
        ("The Eiffel Tower!", ["Eiffel tower"], 1),
        ("eiffel  tower", ["an Eiffel\ttower."], 1),
        ("Tower Eiffel", ["Eiffel tower"], 0),
        ("U.S.", ["US"], 1),
        ("another", ["an other"], 0),
        ("1,000", ["1000"], 1),
        ("", ["the"], 1),
        ("no", ["yes", "No."], 1),
    ],
)
def test_squads_exact_match_leaves_out_case_punctuation_articles_and_white_space(prediction, references, expected):
    assert metrics.score(["squad_exact_match"], [prediction], [references]) == {"squad_exact_match": 100 * expected}


def test_squads_scores_of_characters_by_hand():
    # 北京大学 for 北京的大学: 4 characters of 4 and 5.
    scores = metrics.score(["squad_f1", "squad_f1_chars"], ["北京大学。"], [["北京的大学"]])
    assert scores == pytest.approx({"squad_f1": 0, "squad_f1_chars": 800 / 9})
    same = metrics.score(["squad_exact_match", "squad_exact_match_chars"], ["「北京 大学」。"], [["北京大学"]])
    assert same == {"squad_exact_match": 0, "squad_exact_match_chars": 100}
    assert metrics.score(["squad_f1_chars"], ["the cat"], [["cat"]])["squad_f1_chars"] == pytest.approx(200 / 3)


NUMBERS = st.one_of(
    st.integers(-(10**9), 10**9).map(str),
    st.integers(-(10**9), 10**9).map("{:,}".format),
    st.decimals(-10000, 10000, places=2, allow_nan=False).map("{:,.2f}".format),
    st.decimals(0, 1, places=3, allow_nan=False).map(str),
)


UNITS = st.sampled_from(["", ".", " dollars", " km/h", "%", "\n", " (approx. 3)", " apples."])


@settings(max_examples=200, deadline=None)
@given(NUMBERS, UNITS, st.text(max_size=9))
def test_final_numbers_are_those_that_gsm8ks_own_pattern_finds(number, unit, before):
    text = f"{before}7 + 5 = <<7+5=12>>12 so\n#### {number}{unit}"
    # GSM8K's own: commas dropped; what it compares as text is compared as a number here, a last full stop aside.
    found = re.search(r"#### (\-?[0-9\.\,]+)", text[text.rindex("####") :])[1].replace(",", "").rstrip(".")
    assert metrics.find_final_number(text) == Decimal(found)
