"""Which faults `jax-it data validate` finds, and what it mends."""

import pytest
import tokenizers
from transformers import PreTrainedTokenizerFast

from jax_it.curation import validate
from jax_it.data.records import Record
from tests.curation.datasets import jax_it, read, write

PAIR = {"prompt": "Say red.", "completion": "red"}
LETTERS = [(letter, -1.0) for letter in "▁abn"]


def kinds(fields: dict) -> list[tuple[str, str]]:
    return [(fault.field, fault.kind) for fault in validate.faults(Record(fields, "a.jsonl, line 1"), "auto")]


@pytest.mark.parametrize(
    "text",
    [
        "Tabs\tand\nlines\r\n.", "“Quotes” – and dashes — it’s fine…", "Ünïcödé naïve Lübeck", "细胞理论，和日心说。",
        "Русский текст", "ελληνικά", "😀👍🏽 emoji", "한국어", "ภาษาไทย", "x² ≤ 5 µm", "Ａ full width", "",
    ],
)  # fmt: skip
def test_good_text_has_no_fault(text):
    assert kinds({**PAIR, "note": text}) == []


@pytest.mark.parametrize(
    ("text", "kind"),
    [
        ("naÃ¯ve", "mojibake"), ("itâ€™s", "mojibake"), ("a\x07b", "control character"), ("a\x00", "control character"),
        ("a\x85b", "control character"), ("lost \ufffd", "replacement character"),
        ("\ud83d half", "half of a surrogate pair"),
    ],
)  # fmt: skip
def test_broken_text_is_found_in_whichever_field_it_is(text, kind):
    assert kinds({**PAIR, "notes": [{"by": "x", "said": text}]}) == [("notes.1.said", kind)]


def test_all_faults_of_a_record_are_found():
    assert kinds({"prompt": "\x07 naÃ¯ve", "completion": " "}) == [
        ("prompt", "mojibake"), ("prompt", "control character"), ("", "empty text"),
    ]  # fmt: skip
    assert kinds({"prompt": "  ", "completion": ""}) == [("", "empty text"), ("", "empty text")]
    talk = [{"role": "user", "content": "a"}, {"role": "user", "content": "b\x07"}]
    assert kinds({"messages": talk}) == [
        ("messages.2.content", "control character"), ("", "record that the template refuses"),
    ]  # fmt: skip


def test_faults_are_printed_with_their_places_and_the_exit_code_is_2(tmp_path, capsys):
    path = write(tmp_path / "a.jsonl", [PAIR, {"prompt": "a\x07", "completion": "b"}, {"prompt": "a"}])
    with open(path, "a") as file:
        file.write("not json\n")
    assert jax_it("validate", path) == 2
    printed = capsys.readouterr()
    assert printed.out.splitlines()[:3] == [
        f"{path}, line 2: prompt: control character U+0007 at character 2; remove it",
        f"{path}, line 3: field 'completion' is missing or null, which template 'auto' needs; its fields: prompt",
        f"{path}, line 4: not valid JSON (Expecting value: line 1 column 1 (char 0)); fix or remove the line",
    ]
    assert printed.err == "jax-it data: 3 of 4 records have faults; fix them, or write the others with --output\n"


def test_good_records_end_with_exit_code_0(tmp_path):
    assert jax_it("validate", write(tmp_path / "a.jsonl", [PAIR])) == 0


def test_fix_mends_what_is_broken_and_nothing_else(tmp_path):
    fine = "“Quotes”, ﬁ, Ａ, &amp;, e\u0301, …"
    records = [
        {"prompt": "naÃ¯ve\x07", "completion": fine},
        {"prompt": "\ud83d\ude00 ok", "completion": "b"},  # a pair, written as two halves
        {"prompt": "lost \ufffd", "completion": "c"},
    ]
    path = write(tmp_path / "a.jsonl", records[::2])
    with open(path, "a") as file:
        file.write('{"prompt": "\\ud83d ok", "completion": "b"}\n')
    output = tmp_path / "b.jsonl"
    assert jax_it("validate", path, "--fix", "--output", str(output)) == 0
    assert read(output) == [{"prompt": "naïve", "completion": fine}]
    reasons = [item["reason"] for item in read(tmp_path / "b.jsonl.dropped.jsonl")]
    assert reasons == ["replacement character"] * 2  # a lone half leaves a mark


def test_what_a_tokenizer_cuts_drops_or_does_not_know_is_a_fault_of_its_record(tmp_path, capsys):
    tokenizer = tokenizers.Tokenizer(tokenizers.models.Unigram([("<unk>", 0.0), ("</s>", 0.0), *LETTERS], 0))
    tokenizer.normalizer = tokenizers.normalizers.Replace("\u00ad", "")  # a soft hyphen
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Metaspace()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", eos_token="</s>").save_pretrained(tmp_path)
    pairs = [
        ("ab\nab", "b"), ("aéb漢é", "b"), ("ab", "\u00ad"), ("a" * 30, "b\u00adb\u00ad"), ("na\x07ï", "a"), ("a", "b"),
    ]  # fmt: skip
    path = write(tmp_path / "a.jsonl", [{"prompt": prompt, "completion": completion} for prompt, completion in pairs])
    words = ["validate", path, "--tokenizer", str(tmp_path), "--max-tokens", "30"]
    assert jax_it(*words) == 2
    remedy = "replace these, or use another tokenizer"
    lost = "completion: the tokenizer drops '\\xad' {} times; replace or remove these"
    printed = capsys.readouterr()
    assert [line for line in printed.out.splitlines() if line.startswith(path)] == [
        f"{path}, line 1: prompt: the tokenizer does not know '\\n' 1 times; {remedy}",
        f"{path}, line 2: prompt: the tokenizer does not know '\\xe9' 2 times, '\\u6f22' 1 times; {remedy}",
        f"{path}, line 3: {lost.format(1)}",
        f"{path}, line 3: completion: the tokenizer makes no token of it; fix or remove the record",
        f"{path}, line 4: {lost.format(2)}",
        f"{path}, line 4: 36 tokens are more than --max-tokens 30; shorten the record",
        f"{path}, line 5: prompt: control character U+0007 at character 3; remove it",
        f"{path}, line 5: prompt: the tokenizer does not know '\\x07' 1 times, '\\xef' 1 times; {remedy}",
    ]
    assert "too long 1 records of more than 30 tokens" in printed.out
    assert jax_it(*words, "--fix", "--output", str(tmp_path / "b.jsonl")) == 0
    assert [record["prompt"] for record in read(tmp_path / "b.jsonl")] == ["a"]
    faults = [fault["fault"] for fault in read(tmp_path / "b.jsonl.dropped.jsonl")[4]["faults"]]
    assert faults == [f"the tokenizer does not know '\\xef' 1 times; {remedy}"]


def test_white_space_that_a_tokenizer_changes_is_counted_and_no_fault(tmp_path, capsys):
    path = write(tmp_path / "a.jsonl", [{"prompt": "a\nb  c", "completion": "y"}])
    assert jax_it("validate", path, "--tokenizer", "bytes") == 0
    assert "lost     no character" in capsys.readouterr().out
