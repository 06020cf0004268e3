"""Records are kept by their texts and by a model's scores of them."""

import json

import pytest

from jax_it import cli


def jax_it(*words):
    with pytest.raises(SystemExit) as left:
        cli.main(["data", "filter", "--num-workers", "1", *words])
    return left.value.code or 0


def rows(file):
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]


RECORDS = [
    {"prompt": "Write to anna@example.com about the garden in spring, please.", "completion": "Dear Anna, hello!"},
    {"prompt": "Wie heißt die Hauptstadt von Frankreich, und wie viele Menschen leben dort?", "completion": "Paris."},
    {"prompt": "What does the word fuck mean in this old sentence of the play?", "completion": "It is rude."},
    {"prompt": "请用一句话介绍北京的历史和文化。", "completion": "北京是一座古老的城市。"},
    {
        "messages": [
            {"role": "user", "content": "Call +1 415 555 2671 now"},
            {"role": "assistant", "content": "As an AI, no."},
        ]
    },
]


@pytest.fixture
def kept(tmp_path):
    """A function from options to the numbers of the records that are kept, and the reasons of the others."""
    file = tmp_path / "in.jsonl"
    file.write_text("".join(json.dumps(record) + "\n" for record in RECORDS))

    def run(*words):
        output = tmp_path / "out.jsonl"
        assert jax_it(str(file), "--output", str(output), *words) == 0
        dropped = rows(tmp_path / "out.jsonl.dropped.jsonl")
        numbers = sorted(set(range(5)) - {row["line"] - 1 for row in dropped})
        assert len(rows(output)) == len(numbers)
        return numbers, [row["reason"] for row in dropped]

    return run


def test_lengths_are_those_of_the_chosen_text(kept):
    assert kept("--min-words", "4", "--on", "completion") == ([3, 4], ["fewer than 4 words"] * 3)
    assert kept("--max-characters", "40", "--on", "prompt") == ([3, 4], ["more than 40 characters"] * 3)


def test_languages_and_patterns(kept):
    assert kept("--languages", "de", "zh", "--on", "prompt")[0] == [1, 3]
    assert kept("--exclude", "^As an AI", "--on", "completion") == ([0, 1, 2, 3], ["the pattern of --exclude is in it"])
    assert kept("--match", r"\p{Han}")[0] == [3]


def test_personal_data_and_unsafe_words_are_dropped_or_replaced(kept, tmp_path):
    words = ["--personal-data", "all", "--unsafe"]
    assert kept(*words) == ([1, 3], ["personal data", "unsafe words", "personal data"])
    assert kept("--personal-data", "email")[0] == [1, 2, 3, 4]
    assert kept(*words, "--redact") == ([0, 1, 2, 3, 4], [])
    changed = rows(tmp_path / "out.jsonl")
    assert changed[0]["prompt"] == "Write to [EMAIL] about the garden in spring, please."
    assert changed[2]["prompt"] == "What does the word [UNSAFE] mean in this old sentence of the play?"
    assert changed[4]["messages"][0]["content"] == "Call [PHONE] now" and changed[1] == RECORDS[1]
    manifest = json.loads((tmp_path / "out.jsonl.manifest.json").read_text())
    assert manifest["changed"] == {"email": 1, "phone": 1, "unsafe": 1}
    mine = tmp_path / "words.txt"
    mine.write_text("# mine\ngarden in spring\n北京\n")
    assert kept("--unsafe", "--unsafe-words", str(mine))[0] == [1, 2, 4]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "no rule is given"),
        (["--match", "(a"], "--match: '(a' is not a regular expression"),
        (["--min-words", "5", "--max-words", "3"], "--min-words 5 is more than --max-words 3"),
        (["--min-words", "-1"], "--min-words: -1 is not a number from 0"),
        (["--min-tokens", "5"], "need --tokenizer"),
        (["--max-loss", "5"], "scores need --model"),
        (["--min-words", "1", "--model", "m"], "scores need --model"),
        (["--keep-scores"], "--keep-scores needs --model or --classifier"),
        (["--min-words", "1", "--classifier-prompt", "x.jinja"], "--classifier-prompt is for --classifier"),
        (["--classifier", "m", "--max-unsafe-probability", "0"], "--max-unsafe-probability: 0.0 is not above 0"),
        (["--classifier", "m", "--classifier-labels", "unsafe"], "--classifier-labels: give two or more"),
        (["--classifier", "m", "--classifier-prompt", "no.jinja"], "--classifier-prompt: no.jinja cannot be read"),
        (["--classifier", "no-such-folder/x"], "no-such-folder/x"),
        (["--languages", "xx"], "--languages: xx: not among"),
        (["--personal-data", "name"], "--personal-data: name: choose all, or"),
        (["--personal-data", "all", "--phone-region", "QQ"], "--phone-region: QQ is not a country's code"),
        (["--redact", "--min-words", "2"], "--redact replaces what --personal-data or --unsafe find"),
        (["--match", "(a|aa)+$", "--on", "prompt"], "takes more than 1 s on this text; simplify it"),
    ],
)
def test_bad_settings_are_refused_in_one_line(tmp_path, capsys, words, message):
    file, output = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    file.write_text(json.dumps({"prompt": "a" * 40 + "!", "completion": "b"}) + "\n")
    assert jax_it(str(file), "--output", str(output), *words) == 2
    assert message in capsys.readouterr().err and not output.exists()
