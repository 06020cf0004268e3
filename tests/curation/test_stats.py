"""The figures of `jax-it data stats`."""

import json
import re
from xml.etree import ElementTree

from jax_it.curation import stats
from jax_it.curation.settings import Stats
from tests.curation.datasets import data_of, jax_it, write

TALK = [
    {"role": "system", "content": "Be brief."}, {"role": "user", "content": "Can you write a poem?"},
    {"role": "assistant", "content": "No."}, {"role": "user", "content": "Why?"}, {"role": "assistant", "content": "x"},
]  # fmt: skip
ENGLISH = "What is the capital of the country, and how large is it?"
CHINESE = "请写一首关于秋天的诗，描写落叶。秋风吹落叶，远山入画来。"
RECORDS = [
    {"task": "colors", "prompt": "Say red, please.", "completion": "red"},
    {"task": "colors", "prompt": "Say red, please.", "completion": "red"},
    {"task": "<b>", "instruction": "Please list two colours", "output": "red, blue"},
    {"messages": TALK},
    {"prompt": "no completion"},
]


def figures(tmp_path, records, **settings):
    return stats.figures(Stats(**settings), data_of(write(tmp_path / "a.jsonl", records), folder=tmp_path))


def test_figures_are_those_of_the_records(tmp_path):
    found = figures(tmp_path, RECORDS)
    assert (found["records"], found["invalid"], found["duplicates"]) == (5, 1, 1)
    assert found["tasks"] == {"colors": 2, "<b>": 1}
    assert found["shapes"] == {"prompt_completion": 2, "alpaca": 1, "messages": 1}
    assert (found["turns"], found["with_system"]) == ({"2": 3, "4": 1}, 1)
    assert found["first_words"] == {"say": 2, "can": 1, "please": 1}
    assert found["verbs"] == {"say": 2, "list": 1, "write": 1}
    assert found["lengths"]["completion characters"] == {
        "min": 1, "median": 3, "mean": 4.0, "90%": 9, "99%": 9, "max": 9,
    }  # fmt: skip
    assert found["lengths"]["prompt words"]["median"] == 3
    asked = 2 * len("Say red, please.") + len("Please list two colours")
    said = 3 + 3 + len("red, blue") + len("No.") + 1
    rest = len("Be brief.") + len("Can you write a poem?") + len("Why?")
    assert found["supervised_share"] == said / (asked + said + rest)


def test_languages_are_told(tmp_path):
    found = figures(tmp_path, [{"prompt": text, "completion": ""} for text in (ENGLISH, CHINESE, ENGLISH, ENGLISH)])
    assert found["languages"] == {"en": 3, "zh": 1}


def test_the_sample_of_languages_is_the_same_however_the_records_are_read(tmp_path, monkeypatch):
    records = [{"prompt": f"{i}: {CHINESE if i % 3 else ENGLISH}", "completion": ""} for i in range(1200)]
    monkeypatch.setattr(stats, "LANGUAGE_SAMPLE", 100)
    found = figures(tmp_path, records)
    monkeypatch.setattr("jax_it.curation.input.CHUNK_RECORDS", 7)
    assert figures(tmp_path, records) == found
    assert found["languages_of"] == 100
    assert 50 <= found["languages"]["zh"] <= 80


def test_the_page_is_whole_and_names_no_outside_address(tmp_path, capsys):
    path = write(tmp_path / "a.jsonl", RECORDS)
    page, figures_file = tmp_path / "s.html", tmp_path / "s.json"
    assert jax_it("stats", path, "--html", str(page), "--json", str(figures_file)) == 0
    text = page.read_text()
    assert not re.search("https?:|src=|href=|<b>", text)
    for svg in re.findall("<svg.*?</svg>", text, re.DOTALL):
        ElementTree.fromstring(svg)
    assert text.count("<svg") == 10
    found = json.loads(figures_file.read_text())
    assert found["records"] == 5
    printed = capsys.readouterr().out
    assert "5 records, 1 invalid, 1 duplicates" in printed
    assert "50.0%  colors" in printed


def test_two_outputs_need_two_files(tmp_path, capsys):
    path, out = write(tmp_path / "a.jsonl", RECORDS), str(tmp_path / "out")
    assert jax_it("stats", path, "--html", out, "--json", out) == 2
    assert "--json and --html both name" in capsys.readouterr().err


def test_a_chinese_instruction_begins_with_two_characters(tmp_path):
    found = figures(tmp_path, [{"prompt": "解释为什么水对人类至关重要。", "completion": "x"}])
    assert found["first_words"] == {"解释": 1}
