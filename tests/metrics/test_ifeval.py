"""IFEval: what its checks find in texts made by hand, and how prompts and instructions are counted."""

import json

import pytest

from jax_it import metrics
from jax_it.errors import UserError
from jax_it.metrics import ifeval

for package in ("lm_eval", "immutabledict", "langdetect", "nltk"):
    pytest.importorskip(package, reason="pip install 'jax-it[ifeval]'")

NAMES = ["prompt_strict", "instruction_strict", "prompt_loose", "instruction_loose"]

# A text that follows each of the instructions, and one that does not.
CASES = [
    ("keywords:existence", {"keywords": ["sky", "blue"]}, "The sky is blue.", "The sky is grey."),
    ("keywords:frequency", {"keyword": "sky", "frequency": 2, "relation": "at least"}, "Sky, oh sky!", "The sky."),
    ("keywords:forbidden_words", {"forbidden_words": ["sky"]}, "A skylark sang.", "The sky is blue."),
    ("keywords:letter_frequency", {"letter": "e", "let_frequency": 2, "let_relation": "less than"}, "One.", "Eleven."),
    ("language:response_language", {"language": "de"}, "Der Himmel ist heute blau.", "The sky is blue today."),
    ("length_constraints:number_sentences", {"num_sentences": 2, "relation": "less than"}, "Dr. Who came.", "Yes. No."),
    ("length_constraints:number_words", {"num_words": 3, "relation": "at least"}, "One two three.", "One two."),
    ("length_constraints:number_paragraphs", {"num_paragraphs": 2}, "One.\n***\nTwo.", "One.\n\nTwo."),
    (
        "length_constraints:nth_paragraph_first_word",
        {"num_paragraphs": 2, "nth_paragraph": 2, "first_word": "two"},
        "One.\n\nTwo.",
        "Two.\n\nOne.",
    ),
    ("detectable_content:number_placeholders", {"num_placeholders": 2}, "[name] at [place]", "[name] here"),
    ("detectable_content:postscript", {"postscript_marker": "P.S."}, "Bye.\nP.S. Write!", "Bye."),
    ("detectable_format:number_bullet_lists", {"num_bullets": 2}, "* one\n* two", "* one"),
    ("detectable_format:constrained_response", {}, "My answer is yes.", "Yes."),
    ("detectable_format:number_highlighted_sections", {"num_highlights": 2}, "*one* and *two*", "*one* and two"),
    (
        "detectable_format:multiple_sections",
        {"section_spliter": "Section", "num_sections": 2},
        "Section 1\nA.\nSection 2\nB.",
        "Section 1\nA.",
    ),
    ("detectable_format:json_format", {}, '```json\n{"a": 1}\n```', "a: 1"),
    ("detectable_format:title", {}, "<<Skies>>\nThey are blue.", "Skies\nThey are blue."),
    ("combination:two_responses", {}, "One.******Two.", "One."),
    ("combination:repeat_prompt", {"prompt_to_repeat": "Why?"}, "Why? Because.", "Because."),
    ("startend:end_checker", {"end_phrase": "That is all."}, "Blue. That is all.", "That is all. Blue."),
    ("startend:quotation", {}, '"Blue."', "Blue."),
    ("change_case:capital_word_frequency", {"capital_frequency": 2, "capital_relation": "at least"}, "A B", "a B"),
    ("change_case:english_capital", {}, "THE SKY IS BLUE AND IT IS NICE TODAY.", "The sky is blue today."),
    ("change_case:english_lowercase", {}, "the sky is blue and it is nice today.", "The sky is blue today."),
    ("punctuation:no_comma", {}, "Blue and grey.", "Blue, and grey."),
]  # fmt: skip


@pytest.fixture(autouse=True)
def small_data(tmp_path_factory, monkeypatch):
    """NLTK's data, of which an English with one abbreviation is enough here; nothing is downloaded."""
    import nltk

    folder = tmp_path_factory.mktemp("nltk")
    english = folder / "tokenizers" / "punkt_tab" / "english"
    english.mkdir(parents=True)
    (english / "abbrev_types.txt").write_text("dr")
    for name in ("collocations.tab", "sent_starters.txt", "ortho_context.tab"):
        (english / name).write_text("")
    monkeypatch.setattr(nltk.data, "path", [str(folder)])
    monkeypatch.setattr(nltk, "download", lambda *_, **__: False)
    ifeval._checks.cache_clear()


def reference(*instructions):
    names, settings = zip(*instructions, strict=True)
    return [json.dumps({"instruction_id_list": names, "kwargs": settings})]


def score(texts, references):
    names = [f"ifeval.{name}" for name in NAMES]
    return [metrics.score(names, texts, references)[name] for name in names]


@pytest.mark.parametrize("name, settings, follows, ignores", CASES, ids=[case[0] for case in CASES])
def test_an_instruction_is_followed_by_one_text_and_not_by_the_other(name, settings, follows, ignores):
    # The rows of the hub's data set hold every setting, most of them null.
    settings = {"num_words": None, "language": None, "keywords": None} | settings
    assert score([follows], [reference((name, settings))]) == [100] * 4
    assert score([ignores], [reference((name, settings))]) == [0] * 4


def test_the_cases_are_all_instructions_of_the_data_set():
    assert {name for name, *_ in CASES} == set(ifeval._checks())


COMMA, TITLE, LOWER = (
    ("punctuation:no_comma", {}),
    ("detectable_format:title", {}),
    ("change_case:english_lowercase", {}),
)
WORDS = ("length_constraints:number_words", {"num_words": 4, "relation": "less than"})


def test_prompts_and_instructions_are_counted_apart():
    texts = ["<<a>> b", "a, b", "a b"]
    references = [reference(COMMA, TITLE), reference(COMMA), reference(COMMA, WORDS, TITLE)]
    found = score(texts, references)
    assert found[0] == pytest.approx(100 / 3)  # prompts: all of the first's instructions are followed
    assert found[1] == pytest.approx(100 * 4 / 6)  # instructions: 2 of 2, 0 of 1 and 2 of 3
    assert metrics.score(["ifeval"], texts, references)["ifeval"] == pytest.approx((found[0] + found[1]) / 2)


def test_the_loose_accuracy_forgives_a_first_line_a_last_line_and_asterisks():
    text = "Sure, here it is:\n*one two three*\nI hope this helps, a lot."
    assert score([text], [reference(COMMA, WORDS)]) == [0, 0, 100, 100]
    assert ifeval.variants("a*\nb\nc") == ["a*\nb\nc", "a\nb\nc", "b\nc", "b\nc", "a*\nb", "a\nb", "b", "b"]
    assert ifeval.variants("a") == ["a", "a", "", "", "", "", "", ""]


def test_each_instruction_may_be_followed_by_another_variant_of_the_text():
    """As the paper's program counts: the first text without its first line, and the other without its last."""
    end = ("startend:end_checker", {"end_phrase": "bye"})
    start = ("combination:repeat_prompt", {"prompt_to_repeat": "two"})
    assert score(["one\ntwo bye\nthree"], [reference(end, start)]) == [0, 0, 100, 100]


def test_the_four_accuracies_are_those_that_lm_eval_counts():
    from lm_eval.tasks.ifeval import utils

    opening, closing = "Sure, here it is:\n", "\nI hope this helps."
    followed = [text for _, _, text, _ in CASES]
    texts = [
        *followed, *(opening + text for text in followed), *(text + closing for text in followed), "", *followed[1:],
    ]  # fmt: skip
    pairs = [(name, settings) for name, settings, *_ in CASES]
    rows = [pairs[i % len(pairs) :][:3] or pairs[:1] for i in range(len(texts))]
    counted = [
        utils.process_results(
            {"key": i, "prompt": "", "instruction_id_list": [n for n, _ in row], "kwargs": [s for _, s in row]}, [text]
        )
        for i, (row, text) in enumerate(zip(rows, texts, strict=True))
    ]
    expected = []
    for way in ("strict", "loose"):
        expected.append(sum(found[f"prompt_level_{way}_acc"] for found in counted) / len(counted))
        expected.append(utils.agg_inst_level_acc([found[f"inst_level_{way}_acc"] for found in counted]))
    assert score(texts, [reference(*row) for row in rows]) == pytest.approx([100 * value for value in expected])
    assert len(set(expected)) == 4


def test_an_empty_text_follows_nothing():
    assert score(["", " \n"], [reference(COMMA), reference(COMMA)]) == [0] * 4


def test_the_same_text_has_the_same_score_however_often_it_is_asked():
    texts, references = ["ok das war's"] * 5, [reference(("language:response_language", {"language": "de"}))] * 5
    first = score(texts, references)
    for _ in range(5):
        ifeval._follow.cache_clear()
        assert score(texts, references) == first
    assert first[0] in (0, 100)


def test_a_bootstrap_draws_prompts_and_weighs_them_by_their_instructions():
    texts, references = ["a b", "a, b"], [reference(COMMA, WORDS), reference(COMMA)]
    found = metrics.measure(["ifeval.instruction_strict"], texts, references, {"all": [0, 1], "one": [0]})
    assert found.metrics["all"]["ifeval.instruction_strict"] == pytest.approx(200 / 3)
    assert found.intervals["all"]["ifeval.instruction_strict"] == (0, 100)
    assert found.metrics["one"]["ifeval.instruction_strict"] == 100


@pytest.mark.parametrize(
    "given, message",
    [
        ("yes", "the reference of example 1 is not the JSON of instruction_id_list and kwargs"),
        ("[]", "is not the JSON of"),
        ('{"instruction_id_list": [], "kwargs": []}', "is not the JSON of"),
        ('{"instruction_id_list": ["punctuation:no_comma"], "kwargs": []}', "is not the JSON of"),
        ('{"instruction_id_list": ["punctuation:no_commas"], "kwargs": [{}]}', "not known: 'punctuation:no_commas'"),
        ('{"instruction_id_list": ["punctuation:no_comma"], "kwargs": [{"x": 1}]}', "settings that punctuation:no_"),
    ],
)  # fmt: skip
def test_a_reference_that_is_none_is_named_and_spoils_no_other_metric(given, message):
    texts, references = ["a", "b"], [reference(COMMA), [given]]
    with pytest.raises(UserError) as error:
        metrics.score(["ifeval"], texts, references)
    assert message in str(error.value) and "\n" not in str(error.value)
    found = metrics.measure(["ifeval", "exact_match"], texts, references, {"all": [0, 1]})
    assert message in found.errors["all"]["ifeval"] and found.metrics["all"] == {"exact_match": 0}


def test_what_is_missing_is_said_before_a_run_starts(monkeypatch, tmp_path):
    import builtins

    import nltk

    monkeypatch.setattr(nltk.data, "path", [str(tmp_path)])
    ifeval._checks.cache_clear()
    with pytest.raises(UserError, match=r"needs NLTK's data punkt_tab, .* set NLTK_DATA=FOLDER here$"):
        metrics.check(["ifeval.prompt_loose"])
    real = builtins.__import__

    def without(name, *rest):
        if name == "langdetect":
            raise ModuleNotFoundError("No module named 'langdetect'", name="langdetect")
        return real(name, *rest)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(UserError, match=r"^metric 'ifeval' needs langdetect: pip install 'jax-it\[ifeval\]'$"):
        metrics.check(["ifeval"])
    metrics.check(["exact_match"])
