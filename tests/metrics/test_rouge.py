"""ROUGE is rouge-score's, on words and on characters."""

import itertools
from collections import Counter
from statistics import fmean

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rouge_score import rouge_scorer

from jax_it import metrics
from jax_it.metrics import rouge
from jax_it.metrics.rouge import CHARACTERS, WORDS
from tests.metrics.texts import PREDICTIONS, RAGGED, REFERENCES


@pytest.mark.parametrize(
    "references", [[texts[:1] for texts in REFERENCES], REFERENCES, RAGGED], ids=["one", "two", "ragged"]
)
def test_rouge_is_the_mean_of_rouge_scores_best_reference(references):
    scores = metrics.score(WORDS, PREDICTIONS, references)
    scorer = rouge_scorer.RougeScorer(list(WORDS), use_stemmer=True)
    for name in WORDS:
        best = [
            max(scorer.score(text, prediction)[name].fmeasure for text in texts)
            for prediction, texts in zip(PREDICTIONS, references, strict=True)
        ]
        assert scores[name] == pytest.approx(100 * fmean(best), abs=1e-9)
        assert metrics.METRICS[name](PREDICTIONS, references) == scores[name]


def test_rouge_stems_words_and_counts_by_hand():
    # dog cat run against dog cat sleep: 2 of 3 words and 1 of 2 pairs.
    scores = metrics.score(["rouge1", "rouge2", "rougeL"], ["dogs cats running"], [["dog cat sleeps"]])
    assert scores == pytest.approx({"rouge1": 200 / 3, "rouge2": 50, "rougeL": 200 / 3})


def test_rouge_l_sum_takes_lines_for_sentences():
    scores = metrics.score(["rougeL", "rougeLsum"], ["one two\nfive six"], [["five six\none two"]])
    assert scores == pytest.approx({"rougeL": 50, "rougeLsum": 100})


TOKENS = st.lists(st.sampled_from(["a", "b", "c1", "d"]), min_size=1, max_size=7)


@settings(max_examples=30, deadline=None)
@given(TOKENS, TOKENS)
def test_rouge_l_is_the_longest_common_subsequence_by_brute_force(predicted, expected):
    def subsequences(tokens):
        return {chosen for n in range(len(tokens) + 1) for chosen in itertools.combinations(tokens, n)}

    longest = max(map(len, subsequences(predicted) & subsequences(expected)))
    got = metrics.score(["rougeL"], [" ".join(predicted)], [[" ".join(expected)]])["rougeL"]
    assert got == pytest.approx(200 * longest / (len(predicted) + len(expected)))


def test_several_rouge_types_are_scored_in_one_pass(monkeypatch):
    passes = []

    class Counting(rouge_scorer.RougeScorer):
        def __init__(self, types, **arguments):
            passes.append(types)
            super().__init__(types, **arguments)

    monkeypatch.setattr(rouge_scorer, "RougeScorer", Counting)
    names = ["rougeLsum", "rouge2_chars", "bleu", "rouge1", "rougeL", "rougeL_chars"]
    assert list(metrics.score(names, PREDICTIONS, REFERENCES)) == names
    assert passes == [["rougeLsum", "rouge1", "rougeL"], ["rouge2", "rougeL"]]


# The two examples of the small test data of rouge-score's repository.
PUBLISHED = (
    [
        "rFDJCRtion Ht-LM EKtDXkME,yz'RBr q'wer wrojNbN wL,b .a-'XdQggyFl jB-RPP'iyOIcUxi",
        "n cw-WeFyu vC MoBL Xdn g wkvcEiGvKtion BDFhrpMer pstion sbKao Q m qier LMmed HqqLFXe,XPY,J XsurkMeo ,ed "
        "nB'wH'bWVHjWFEer tQ.saefZwJtKrTlixYpMMNJtion UCAPwNHeYVjD",
    ],
    [
        [
            "ZfbCUIUuePaiLVUlCaUXxkpu XPeWing tUHfPMuZ',-Xd Y BrUgVJing M-HV.-DgdDaY.rFDJCRing Ht-LM "
            "EKBDXkME,yz'RBr q'wtion wIojNbN wL,b .a-'XdQggyFl jB-RPP'iyOIcUxer tKM L"
        ],
        [
            "KsJdPByEtAor fE-Qg Dpdbring cw-WeFyu vC MoBL Xdn g wkvcEiGvKtion BDFhrpMtion psing sbKao Q m qiing "
            "LMmer HqqLFXe,XPY,J XsurkMer ,ed nB'wH'bWVHjWFEing tQ.saefZwJtKrTlixYpMMsJing UCAPwNHeYVjDing c T "
            "BUySKtion gMPfJpwGw p'NvxAoping eu pBwMBKV'I DNxqelhu,PHPxDEq,mtion SN"
        ],
    ],
)


def test_rouge_of_rouge_scores_test_data_is_known():
    # Without stemming rouge1 would be 50.58. Words of up to 3 letters are not stemmed, as in the Perl script.
    scores = metrics.score(["rouge1", "rouge2", "rougeL"], *PUBLISHED)
    assert scores == pytest.approx({"rouge1": 52.0520, "rouge2": 37.6940, "rougeL": 52.0520}, abs=1e-4)


def test_rouge_of_characters_counts_by_hand():
    # 猫坐在垫子上 against 猫躺在垫上: 4 characters of 6 and 5 shared, in order; of 5 and 4 pairs only 在垫.
    scores = metrics.score(CHARACTERS, ["猫坐在垫子上。"], [["猫躺在垫上"]])
    assert scores == pytest.approx({"rouge1_chars": 800 / 11, "rouge2_chars": 200 / 9, "rougeL_chars": 800 / 11})
    # 上海 Beijing 3 against beijing 3 上海: all 4 tokens shared, 2 of 3 pairs, 2 in order.
    scores = metrics.score(CHARACTERS, ["上海 Beijing 3"], [["beijing 3, 上海"]])
    assert scores == pytest.approx({"rouge1_chars": 100, "rouge2_chars": 200 / 3, "rougeL_chars": 50})
    assert metrics.score(["rouge1", "rougeL"], ["猫坐在垫子上"], [["猫坐在垫子上"]]) == {"rouge1": 0, "rougeL": 0}


MIXED = st.lists(st.sampled_from([*"天地人。", "word", "Word", "7"]), max_size=7)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(MIXED, st.lists(MIXED, min_size=1, max_size=3)), min_size=1, max_size=3))
def test_rouge_of_characters_is_that_by_brute_force(examples):
    def tokens(parts):
        return [part.lower() for part in parts if part != "。"]

    def f_measure(shared, predicted, expected):
        return 2 * shared / (predicted + expected) if shared else 0.0

    def ngrams(parts, n):
        return Counter(tuple(parts[i : i + n]) for i in range(len(parts) - n + 1))

    def subsequences(parts):
        return {chosen for n in range(len(parts) + 1) for chosen in itertools.combinations(parts, n)}

    def brute(name, predicted, expected):
        if name == "rougeL_chars":
            longest = max(map(len, subsequences(predicted) & subsequences(expected)))
            return f_measure(longest, len(predicted), len(expected))
        n = int(name[5])
        first, second = ngrams(predicted, n), ngrams(expected, n)
        return f_measure((first & second).total(), first.total(), second.total())

    predictions = [" ".join(predicted) for predicted, _ in examples]
    references = [[" ".join(parts) for parts in several] for _, several in examples]
    scores = metrics.score(CHARACTERS, predictions, references)
    for name in CHARACTERS:
        best = [max(brute(name, tokens(p), tokens(parts)) for parts in several) for p, several in examples]
        assert scores[name] == pytest.approx(100 * fmean(best))
        assert metrics.METRICS[name](predictions, references) == scores[name]


def test_sentences_of_one_line_score_as_the_lines_of_published_summaries():
    lines = "Mr. Smith sat on a mat .\nIt rained ."
    said = "It rained on a mat. Mr. Smith sat."  # by a model without a line break
    scores = metrics.score(["rougeLsum", "rougeLsum_sentences"], [said], [[lines]])
    (wanted,) = metrics.score(["rougeLsum"], ["It rained on a mat.\nMr. Smith sat."], [[lines]]).values()
    assert scores["rougeLsum_sentences"] == pytest.approx(wanted) and scores["rougeLsum"] < wanted - 10


@pytest.mark.parametrize(
    "text, sentences",
    [
        ("One. Two! Three? 4 men left.", ["One.", "Two!", "Three?", "4 men left."]),
        ('He said "no." "Why?" (She left.) Then nothing.', ['He said "no."', '"Why?"', "(She left.)", "Then nothing."]),
        ("Dr. J. K. Rowling met Mrs. May at 5.30 a.m. in St. Ives.", None),
        ("e.g. this, version 2. of it, and so on", None),
    ],
)
def test_a_sentence_ends_before_a_capital_but_not_after_a_title_or_an_initial(text, sentences):
    assert rouge._lines(text).split("\n") == (sentences or [text])
