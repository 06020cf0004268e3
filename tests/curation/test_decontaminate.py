"""Evaluation texts are found in training records by shared n-grams, exactly."""

import json
import random

import numpy as np
import pytest

from jax_it.curation import decontaminate
from jax_it.curation.decontaminate import EvalText, build_index, search
from jax_it.curation.fields import texts_of
from jax_it.errors import UserError
from jax_it.metrics import characters
from tests.curation.datasets import jax_it, read, write

WORDS = [f"w{i}" for i in range(400)]


def sentence(rng, length, words=WORDS):
    return " ".join(rng.choices(words, k=length))


def by_brute_force(texts, records):
    """The two rules, n-gram by n-gram; no set here has enough texts for n-grams of a template."""
    grams = lambda words, n: [tuple(words[i : i + n]) for i in range(len(words) - n + 1)]  # noqa: E731
    found = []
    for fields in records:
        mine = [characters(text) for _, text in texts_of(fields)]
        any_13 = {gram for words in mine for gram in grams(words, 13)}
        any_8 = {gram for words in mine for gram in grams(words, 8)}
        hits = {}
        for number, item in enumerate(texts):
            words = characters(item.text)
            covered = set()
            for start, gram in enumerate(grams(words, 8)):
                covered.update(range(start, start + 8) if gram in any_8 else ())
            shared = any(gram in any_13 for gram in grams(words, 13))
            share = len(covered) / len(words) if words else 0
            if shared or share > 0.5:
                hits[number] = (shared, pytest.approx(share))
        found.append(hits)
    return found


@pytest.mark.parametrize("seed", range(3))
def test_what_is_found_is_what_a_comparison_of_all_n_grams_finds(seed):
    rng = random.Random(seed)
    few = WORDS[:2]  # so that n-grams occur by chance, several times in a text too
    texts = [EvalText("test", f"line {i}", "q", sentence(rng, rng.randrange(5, 30), few)) for i in range(9)]
    texts += [EvalText("test", f"line {i}", "q", sentence(rng, rng.randrange(0, 40))) for i in range(9, 30)]
    records = []
    for _ in range(60):
        words = sentence(rng, rng.randrange(0, 30), rng.choice([few, WORDS])).split()
        copied = rng.choice(texts).text.split()
        start = rng.randrange(len(copied) + 1)
        words[len(words) // 2 : len(words) // 2] = copied[start : start + rng.randrange(5, 25)]
        records.append({"prompt": " ".join(words).upper() + "!", "messages": [{"content": sentence(rng, 9, few)}]})
    found = search(build_index(texts), records)
    expected = by_brute_force(texts, records)
    assert [{match.text: (bool(match.ngram), match.covered) for match in each} for each in found] == expected
    assert sum(map(len, expected)) > 20


def test_planted_contaminations_are_all_found_and_nothing_else():
    rng = random.Random(0)
    texts = [EvalText("test", f"line {i}", "q", sentence(rng, 20)) for i in range(200)]
    index = build_index(texts)
    planted = {i: rng.randrange(200) for i in range(0, 1000, 10)}
    records = []
    for i in range(1000):
        words = sentence(rng, 60).split()
        if i in planted:
            copied = texts[planted[i]].text.title().split()
            words[30:30] = copied[:13] if i % 20 else [*copied[:9], "other", *copied[10:]]
        records.append({"text": ", ".join(words)})
    found = {i: [match.text for match in each] for i, each in enumerate(search(index, records)) if each}
    assert found == {i: [text] for i, text in planted.items()}


def test_chinese_text_without_spaces_is_compared_by_characters():
    index = build_index([EvalText("test", "line 1", "q", "请问北京到上海的高速铁路全长多少公里？")])
    (match,), (), (few,) = search(
        index,
        [
            {"q": "问题：请问，北京到上海的高速铁路全长多少公里"},
            {"q": "请问广州到深圳的高速公路有多少公里？"},
            {"q": "北京到上海的高速铁路全长是"},
        ],
    )
    assert match.covered == 1 and match.ngram == " ".join("请问北京到上海的高速铁路全")
    assert few.rules() == "8-grams cover 67%"


def test_the_words_of_a_template_neither_match_nor_count():
    rng = random.Random(0)
    template = "Answer the following question about the passage above and explain your reasoning in full: "
    texts = [EvalText("test", f"line {i}", "q", template + sentence(rng, 10)) for i in range(40)]
    index = build_index(texts)
    records = [{"a": template + sentence(rng, 10)}, {"a": texts[3].text.removeprefix(template)}, {"a": texts[4].text}]
    nothing, own, whole = search(index, records)
    assert not nothing
    assert [(match.text, match.ngram, match.covered) for match in own] == [(3, "", 1.0)]
    assert [(match.text, match.covered) for match in whole] == [(4, 1.0)] and whole[0].ngram
    # Copies of one text are not a template.
    copies = build_index([EvalText("test", f"line {i}", "q", texts[0].text) for i in range(40)])
    assert len(search(copies, [{"a": texts[0].text}])[0]) == 40


def test_two_n_grams_with_one_hash_are_told_apart(monkeypatch):
    monkeypatch.setattr(decontaminate, "_hash", lambda words, starts, length: np.zeros(len(starts), np.uint64))
    rng = random.Random(0)
    texts = [EvalText("test", f"line {i}", "q", sentence(rng, 20)) for i in range(5)]
    found = search(build_index(texts), [{"q": texts[2].text}, {"q": sentence(rng, 30, texts[1].text.split())}])
    assert [[match.text for match in each] for each in found] == [[2], []]


def test_the_report_names_each_item_that_is_hit_and_where():
    rng = random.Random(0)
    texts = [EvalText("test", f"line {i // 2}", "qa"[i % 2], sentence(rng, 20 if i < 4 else 7)) for i in range(6)]
    index = build_index(texts)
    records = [{"p": texts[2].text}, {"p": "nothing"}, {"p": texts[2].text[:60]}]
    places = [f"train, line {i}" for i in range(3)]
    found = decontaminate.report(index, zip(places, search(index, records), strict=True))
    assert {name: found["test"][name] for name in ("items", "hit", "too_short")} == {
        "items": 3,
        "hit": 1,
        "too_short": 1,
    }
    (hit,) = found["test"]["hits"]
    assert (hit["item"], hit["field"], hit["records"]) == ("line 1", "q", 2)
    assert [item["record"] for item in hit["found_in"]] == ["train, line 0", "train, line 2"]
    assert hit["found_in"][0]["ngram"] == " ".join(texts[2].text.split()[:13])


def test_evaluation_texts_are_read_from_files_and_from_recipes(tmp_path):
    (tmp_path / "test.jsonl").write_text(json.dumps({"q": "one", "choices": ["two", {"text": "three"}], "n": 4}) + "\n")
    found = decontaminate.read([str(tmp_path / "test.jsonl")])
    assert [(item.field, item.text) for item in found] == [
        ("q", "one"),
        ("choices.0", "two"),
        ("choices.1.text", "three"),
    ]
    assert [item.text for item in decontaminate.read([str(tmp_path / "test.jsonl")], ["choices"])] == ["two", "three"]
    recipe = f"configs/benchmarks/humaneval.py:{tmp_path / 'test.jsonl'}"
    assert [item.text for item in decontaminate.read([recipe])] == ["one", "two", "three"]
    with pytest.raises(UserError, match="the task mmlu reads its data itself; name its data set"):
        decontaminate.read(["configs/benchmarks/lm_eval.py:mmlu"])
    with pytest.raises(UserError, match="have no text in the fields answer"):
        decontaminate.read([str(tmp_path / "test.jsonl")], ["answer"])


def test_the_command_drops_or_marks_what_it_finds_for_any_number_of_workers(tmp_path):
    rng = random.Random(0)
    questions = [sentence(rng, 20) for _ in range(50)]
    test = write(tmp_path / "test.jsonl", [{"question": question, "answer": "no"} for question in questions])
    records = [{"prompt": sentence(rng, 20), "completion": "x"} for _ in range(3000)]
    for number in (7, 1234, 2999):
        records[number]["prompt"] += " " + questions[number % 50]
    train = write(tmp_path / "train.jsonl", records)
    outputs = []
    for number in ("1", "2"):
        output = tmp_path / f"{number}.jsonl"
        assert jax_it("decontaminate", train, "--against", test, "--num-workers", number, "--output", str(output)) == 0
        outputs.append((output.read_bytes(), (tmp_path / f"{number}.jsonl.dropped.jsonl").read_bytes()))
    assert outputs[0] == outputs[1]
    assert [(row["line"], row["contaminated_by"][0]["item"]) for row in read(tmp_path / "1.jsonl.dropped.jsonl")] == [
        (8, f"{test}, line 8"),
        (1235, f"{test}, line 35"),
        (3000, f"{test}, line 50"),
    ]
    marked = tmp_path / "marked.jsonl"
    assert (
        jax_it("decontaminate", train, "--against", test, "--mark", "--num-workers", "1", "--output", str(marked)) == 0
    )
    found = [row.get("contaminated_by") for row in read(marked)]
    assert len(found) == 3000 and sum(map(bool, found)) == 3
    assert found[7] == [
        {"set": "test", "item": f"{test}, line 8", "field": "question", "rule": "13-gram and 8-grams cover 100%"}
    ]
    report = json.loads((tmp_path / "marked.jsonl.manifest.json").read_text())["report"]
    assert (report["test"]["items"], report["test"]["hit"]) == (50, 3)
    assert jax_it("decontaminate", train) == 2
