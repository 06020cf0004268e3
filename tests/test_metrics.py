"""ROUGE, BLEU and chrF are those of rouge-score and sacrebleu, on the same text; the rest is as defined."""

import itertools
import math
import subprocess
import sys
from collections import Counter
from decimal import Decimal
from statistics import fmean

import pytest
import sacrebleu
from hypothesis import given, settings
from hypothesis import strategies as st
from rouge_score import rouge_scorer

from jax_it import metrics
from jax_it.errors import UserError

PREDICTIONS = [
    "The dog bit the man.",
    "It wasn't surprising.",
    "The man had just bitten him.",
    "",
    "Dogs running\nCats asleep",
]
REFERENCES = [
    ["The dog bit the man.", "The dog had bit the man."],
    ["It was not unexpected.", "No one was surprised."],
    ["The man bit him first.", "The man had bitten the dog."],
    ["Nothing was said.", "Silence."],
    ["A cat sleeps\nThe dog runs", "The dogs run"],
]
RAGGED = [
    REFERENCES[0],
    REFERENCES[1][:1],
    [*REFERENCES[2], "He was bitten by the man."],
    REFERENCES[3][1:],
    REFERENCES[4],
]

# The example of sacrebleu's own documentation.
DOCUMENTED = (PREDICTIONS[:3], REFERENCES[:3])


@pytest.mark.parametrize(
    "references", [[texts[:1] for texts in REFERENCES], REFERENCES, RAGGED], ids=["one", "two", "ragged"]
)
def test_rouge_is_the_mean_of_rouge_scores_best_reference(references):
    scores = metrics.score(metrics.ROUGE, PREDICTIONS, references)
    scorer = rouge_scorer.RougeScorer(list(metrics.ROUGE), use_stemmer=True)
    for name in metrics.ROUGE:
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


def test_characters_are_single_in_scripts_without_spaces_and_words_in_the_rest():
    assert metrics.characters("我喜欢Python 3, 你呢？") == [*"我喜欢", "python", "3", *"你呢"]
    assert metrics.characters("１２００元，ＡＢＣ。") == ["1200", "元", "abc"]  # full width
    assert metrics.characters("カタカナﾃｽﾄとかな、ー") == [*"カタカナテストとかなー"]
    assert metrics.characters("한국어를 배워요") == [*"한국어를배워요"]
    assert metrics.characters("ที่นี่") == ["ที่", "นี่"]  # marks stay on their letter
    assert metrics.characters("हिन्दी में Ünïcode") == ["हिन्दी", "में", "ünïcode"]
    assert metrics.characters("日本Tokyo東京2020年") == ["日", "本", "tokyo", "東", "京", "2020", "年"]
    assert metrics.characters("don't snake_case ½") == ["don", "t", "snake", "case", "1", "2"]
    assert metrics.characters(" \n…！\u0301") == []


def test_rouge_of_characters_counts_by_hand():
    # 猫坐在垫子上 against 猫躺在垫上: 4 characters of 6 and 5 shared, in order; of 5 and 4 pairs only 在垫.
    scores = metrics.score(metrics.ROUGE_CHARS, ["猫坐在垫子上。"], [["猫躺在垫上"]])
    assert scores == pytest.approx({"rouge1_chars": 800 / 11, "rouge2_chars": 200 / 9, "rougeL_chars": 800 / 11})
    # 上海 Beijing 3 against beijing 3 上海: all 4 tokens shared, 2 of 3 pairs, 2 in order.
    scores = metrics.score(metrics.ROUGE_CHARS, ["上海 Beijing 3"], [["beijing 3, 上海"]])
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
    scores = metrics.score(metrics.ROUGE_CHARS, predictions, references)
    for name in metrics.ROUGE_CHARS:
        best = [max(brute(name, tokens(p), tokens(parts)) for parts in several) for p, several in examples]
        assert scores[name] == pytest.approx(100 * fmean(best))
        assert metrics.METRICS[name](predictions, references) == scores[name]


CHINESE = (
    ["国家主席今天访问了3个城市，并发表讲话。", "他喜欢用Python编程。", ""],
    [["国家主席今天访问了三个城市，并发表了讲话。", "主席今天访问了3个城市。"], ["他喜欢用Python写程序。"], ["好。"]],
)


def test_bleu_of_chinese_is_sacrebleus_with_its_tokenizer_zh():
    predictions, references = CHINESE
    streams = [[texts[0] for texts in references], [references[0][1], None, None]]
    expected = sacrebleu.corpus_bleu(predictions, streams, tokenize="zh").score
    assert expected > 30
    assert metrics.score(["bleu_zh"], predictions, references)["bleu_zh"] == pytest.approx(expected, abs=1e-9)
    assert metrics.score(["bleu"], predictions, references)["bleu"] < 10


def test_bleu_of_chinese_counts_characters_by_hand():
    # 我爱北京天安门 for 我爱南京天安门: 6 of 7 characters, 4 of 6 pairs, 2 of 5 triples (京天安, 天安门) and 1 of 4.
    expected = 100 * (6 / 7 * 4 / 6 * 2 / 5 * 1 / 4) ** 0.25
    assert metrics.score(["bleu_zh"], ["我爱北京天安门"], [["我爱南京天安门"]])["bleu_zh"] == pytest.approx(expected)


@pytest.mark.parametrize("name, expected", [("bleu", 48.530827), ("chrf", 59.73)])
def test_bleu_and_chrf_are_the_numbers_in_sacrebleus_documentation(name, expected):
    assert metrics.score([name], *DOCUMENTED)[name] == pytest.approx(expected, abs=5e-3)


def test_bleu_with_a_missing_reference_is_the_number_in_sacrebleus_documentation():
    predictions, references = DOCUMENTED
    ragged = [references[0][1:], *references[1:]]
    assert metrics.score(["bleu"], predictions, ragged)["bleu"] == pytest.approx(29.44, abs=5e-3)


@pytest.mark.parametrize("name", ["bleu", "chrf"])
def test_references_may_differ_in_number(name):
    # Repeating a reference changes neither BLEU nor chrF, so a rectangle of repetitions is the same corpus.
    most = max(map(len, RAGGED))
    repeated = [[texts[min(i, len(texts) - 1)] for texts in RAGGED] for i in range(most)]
    expected = {"bleu": sacrebleu.corpus_bleu, "chrf": sacrebleu.corpus_chrf}[name](PREDICTIONS, repeated).score
    assert metrics.score([name], PREDICTIONS, RAGGED)[name] == pytest.approx(expected, abs=1e-9)
    first = [texts[:1] for texts in RAGGED]
    assert metrics.score([name], PREDICTIONS, first)[name] != pytest.approx(expected, abs=1e-3)


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


def test_scores_of_examples_are_averaged():
    scores = metrics.score(["exact_match", "token_f1"], ["a b", "c d"], [["b"], ["c d"]])
    assert scores == {"exact_match": 50, "token_f1": 100}


@settings(max_examples=30, deadline=None)
@given(
    st.lists(
        st.tuples(st.text(max_size=12), st.lists(st.text(max_size=12), min_size=1, max_size=3)), min_size=1, max_size=3
    )
)
def test_every_score_of_any_text_is_from_0_to_100(examples):
    scores = metrics.score(list(metrics.METRICS), [text for text, _ in examples], [texts for _, texts in examples])
    assert list(scores) == list(metrics.METRICS)
    for value in scores.values():
        assert type(value) is float and math.isfinite(value) and 0 <= value <= 100 + 1e-9


@pytest.mark.parametrize("name", sorted(metrics.METRICS))
def test_a_perfect_prediction_scores_100(name):
    text = "The quick brown fox jumps over 13 lazy dogs."
    assert metrics.score([name], [text], [["Something else.", text]])[name] == pytest.approx(100)


@pytest.mark.parametrize("name, close", [("rougel", "rougeL"), ("ROUGE-L", "rougeL"), ("F1", None), ("BLUE", "bleu")])
def test_an_unknown_metric_is_refused_with_the_closest_and_the_list(name, close):
    with pytest.raises(UserError) as error:
        metrics.score(["bleu", name], PREDICTIONS, REFERENCES)
    message = str(error.value)
    assert repr(name) in message and "\n" not in message and all(known in message for known in metrics.METRICS)
    assert (f"did you mean {close!r}?" in message) if close else ("did you mean" not in message)


@pytest.mark.parametrize(
    "predictions, references, message",
    [
        ([], [], "no predictions"),
        (["a"], [["a"], ["b"]], "1 predictions and 2 lists"),
        (["a", "b"], [["a"], []], "example 1"),
        (["a"], ["a"], "example 0"),
    ],
)
@pytest.mark.parametrize("name", ["rougeL", "bleu", "exact_match"])
def test_examples_that_cannot_be_scored_are_refused(name, predictions, references, message):
    with pytest.raises(ValueError, match=message):
        metrics.score([name], predictions, references)


def test_importing_metrics_does_not_import_what_only_rouge_needs():
    code = "import sys, jax_it.metrics; sys.exit('nltk' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
