import importlib.metadata
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest

from jax_it import data as chain
from jax_it import workers
from jax_it.config import Data, Source
from jax_it.data import sources, templates, tokenized
from jax_it.data import tokenizer_files as tokenizers
from jax_it.data.formats import Seq2SeqFormat
from jax_it.data.tokenized import Tokenized, tokenize
from jax_it.errors import UserError
from tests.data.letters import END, UNKNOWN, Letters, ids, pairs, write

FORMAT = Seq2SeqFormat(0, 0)
LENIENT = {"max_dropped": 1.0, "max_truncated": 1.0, "max_unknown": 1.0}


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    return tmp_path / "cache"


def read(item: Tokenized) -> list[tuple[list[int], list[int]]]:
    return [(item.example(i).source.tolist(), item.example(i).target.tolist()) for i in range(item.counts.examples)]


def run(path: str, cache: Path | str, tokenizer: Any = None, **settings: Any) -> Tokenized:
    given = {"max_source_length": 8, "max_target_length": 4, "cache_dir": str(cache), **LENIENT, **settings}
    (item,) = tokenize(Source(path), "config.data.train.0", Data(**given), tokenizer or Letters(), FORMAT)
    return item


def refusal(path: str, cache: Path | str, tokenizer: Any = None, **settings: Any) -> str:
    with pytest.raises(UserError) as caught:
        run(path, cache, tokenizer, **settings)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_limits_that_cannot_be_raised_are_not_offered(tmp_path, cache):
    path = write(tmp_path / "a.jsonl", pairs("a>", "b>"))
    message = "data set a: none of its 2 examples is left: 2 with an empty completion, 0 too long"
    assert refusal(path, cache, max_dropped=0.5) == refusal(path, cache, max_dropped=1.0) == message


def test_characters_that_the_tokenizer_drops_are_counted_and_blanks_alone_are_never_refused(tmp_path, cache):
    path = write(tmp_path / "a.jsonl", pairs("a\nb\n>c\nd", "e>f"))
    counts = run(path, cache).counts
    assert (counts.lost, counts.vanished, counts.characters) == ({"\n": 3}, {}, 9)
    it = tokenizers.train(["some words to train on"], 40)
    path = write(tmp_path / "b.jsonl", pairs("so\x02me\n  w>o", "r>\x02\x01d"))
    lost = {"\n": 1, "  ": 1, "\x01": 1, "\x02": 2}
    assert run(path, cache, it, max_unknown=0.215).counts.lost == lost
    assert refusal(path, cache, it, max_unknown=0.1) == (
        "data set b: 3 of 14 characters dropped by the tokenizer ('\\x02' 2 times, '\\x01' 1 times), 21.4%; fix the "
        "data, or allow it with config.data.max_unknown=0.215 or more"
    )


def marked(prompt: str, completion: str) -> tuple[list[int], list[int]]:
    return [*ids(prompt), END], [*ids(completion), END]


# Tokens


@pytest.mark.parametrize(
    "truncate, expected",
    [
        ("end", [("abc", "xy"), ("abcdefg", "xyz"), ("abcdefg", "xyz"), ("abcdefg", "x"), ("ab", "xyz"), ("", "x")]),
        ("start", [("abc", "xy"), ("abcdefg", "xyz"), ("bcdefgh", "xyz"), ("cdefghi", "x"), ("ab", "xyz"), ("", "x")]),
        ("drop", [("abc", "xy"), ("abcdefg", "xyz"), None, None, None, ("", "x")]),
    ],
)
def test_both_sides_end_with_their_mark_and_are_cut_as_the_config_says(tmp_path, cache, truncate, expected):
    records = pairs("abc>xy", "abcdefg>xyz", "abcdefgh>xyz", "abcdefghi>x", "ab>xyzw", ">x")
    item = run(write(tmp_path / "a.jsonl", records), cache, truncate=truncate)
    assert read(item) == [marked(*pair) if pair else ([], []) for pair in expected]
    assert item.source_lengths.tolist() == [len(pair[0]) + 1 if pair else 0 for pair in expected]
    assert item.target_lengths.tolist() == [len(pair[1]) + 1 if pair else 0 for pair in expected]
    assert item.example(0).source.dtype == item.example(0).target.dtype == np.int32


def test_refuse_names_the_first_line_that_does_not_fit(tmp_path, cache):
    path = write(tmp_path / "a.jsonl", pairs("abc>xy", "abcdefgh>x", "abcdefghi>x"))
    assert refusal(path, cache, truncate="error") == (
        f"{path}, line 2: 9 source and 2 target tokens exceed the limits of 8 and 4; raise "
        "config.data.max_source_length and max_target_length, or choose another config.data.truncate"
    )
    assert run(path, cache, truncate="error", max_source_length=10).counts.kept == 3


def test_everything_is_counted(tmp_path, cache):
    records = pairs("abc>xy", "ab>", "ab>  ", "abcdefgh>xyzw", "abcdefgh>x", "Ab>Xyzw", "A>")
    item = run(write(tmp_path / "a.jsonl", records), cache)
    counts = item.counts
    assert asdict(counts) == {
        "examples": 7,
        "invalid": 0,
        "reasons": [],
        "empty_completion": 3,
        "skipped": 0,
        "too_long": 0,
        "truncated": 3,
        "truncated_source": 2,
        "truncated_target": 2,
        "truncated_turns": 0,
        "source_tokens": 3 + 2 + 2 + 8 + 8 + 2 + 1 + 7,
        "target_tokens": 2 + 0 + 0 + 4 + 1 + 4 + 0 + 7,
        "unknown_tokens": 3,
        "unknown": {"A": 2, "X": 1},
        "characters": 39,
        "lost": {},
    }
    assert (counts.dropped, counts.kept) == (3, 4)
    assert read(item)[1] == read(item)[2] == read(item)[6] == ([], [])
    counts = run(write(tmp_path / "a.jsonl", records), cache, truncate="drop").counts
    assert (counts.empty_completion, counts.too_long, counts.truncated, counts.kept) == (3, 3, 0, 1)


def test_blanks_alone_are_no_completion_and_are_kept_within_one(tmp_path, cache):
    item = run(write(tmp_path / "a.jsonl", pairs("a> ", "a> b ", "a>\n\t")), cache)
    assert read(item) == [([], []), marked("a", " b "), ([], [])]


def test_an_example_counts_once_where_both_its_sides_are_cut(tmp_path, cache):
    path = write(tmp_path / "a.jsonl", pairs("abcdefgh>x", "a>xyzw", "a>x", "a>x"))
    assert run(path, cache).counts.truncated == 2
    assert "2 of 4 examples truncated" in refusal(path, cache, max_truncated=0.4)


def test_a_source_is_tokenized_under_each_of_its_templates(tmp_path, cache):
    path = write(tmp_path / "a.jsonl", [{"q": "ab", "a": "c"}, {"q": "b", "a": ""}])
    source = Source(path, template=("{{q}} ||| {{a}}", "{{a}} ||| {{q}}"))
    one, two = tokenize(source, "", Data(cache_dir=str(cache), **LENIENT), Letters(), FORMAT)
    assert read(one) == [marked("ab", "c"), ([], [])] and read(two) == [marked("c", "ab"), marked("", "b")]
    assert (one.template, two.template) == source.template
    assert tokenized.eligible([one]).tolist() == [0] and tokenized.eligible([two]).tolist() == [0, 1]
    assert tokenized.eligible([one, two]).tolist() == [0]


def test_many_records_keep_their_order_and_their_places(tmp_path, cache):
    records = [{"prompt": str(i), "completion": str(i % 7)} for i in range(2345)]
    item = run(write(tmp_path / "a.jsonl", records), cache)
    assert read(item) == [marked(str(i), str(i % 7)) for i in range(2345)]


def test_texts_for_training_a_tokenizer_are_those_of_all_sources_and_templates(tmp_path):
    path = write(tmp_path / "a.jsonl", [{"q": "ab", "a": "c"}])
    other = write(tmp_path / "b.jsonl", pairs("x>y"))
    items = (Source(path, template=("{{q}} ||| {{a}}", "Q ||| {{q}}")), Source(other))
    assert list(tokenized.prompts_and_completions(items, "")) == ["ab", "c", "Q", "ab", "x", "y"]


# Invalid records


def invalid(tmp_path: Path) -> str:
    """A file of six records, of which the second, fourth and fifth are invalid."""
    thread = [{"from": who, "value": "abc"} for who in ("gpt", "human", "gpt")]
    path = write(tmp_path / "a.jsonl", [*pairs("abc>xy", "b>y", "c>xz"), {"conversations": thread}, {"prompt": "a"}])
    lines = Path(path).read_text().splitlines()
    lines[1] = "{broken"
    Path(path).write_text("\n".join([*lines, *map(json.dumps, pairs("ab>z"))]))
    return path


def test_all_invalid_records_of_a_file_are_found_in_one_pass(tmp_path, cache):
    path = invalid(tmp_path)
    message = refusal(path, cache)
    assert message.startswith(f"data set a: 3 of 6 records are invalid: {path}, line 2: not valid JSON (")
    assert message.endswith("; fix them, or leave them out with config.data.on_invalid=drop")
    assert f"; {path}, line 4: the messages begin with the assistant, as many ShareGPT threads do; " in message
    assert f"; {path}, line 5: field 'completion' is missing or null, which template 'auto' needs; " in message
    assert folders(cache) == set()


def test_invalid_records_are_dropped_counted_and_listed_where_the_config_says_so(tmp_path, cache):
    path = invalid(tmp_path)
    item = run(path, cache, on_invalid="drop")
    assert (item.counts.examples, item.counts.invalid, item.counts.dropped, item.counts.kept) == (6, 3, 3, 3)
    assert [reason.split(": ")[0] for reason in item.counts.reasons] == [f"{path}, line {n}" for n in (2, 4, 5)]
    nothing = ([], [])  # an invalid record keeps its number
    assert read(item) == [marked("abc", "xy"), nothing, marked("c", "xz"), nothing, nothing, marked("ab", "z")]
    assert tokenized.eligible([item]).tolist() == [0, 2, 5]
    message = "data set a: 3 of 6 examples dropped (3 invalid, 0 with an empty completion, 0 too long), 50.0%"
    assert refusal(path, cache, on_invalid="drop", max_dropped=0.4).startswith(message)
    assert "data set a: 3 of 6 records are invalid" in refusal(path, cache), (
        "though they were dropped when the cache was made"
    )


def test_a_data_set_without_a_valid_record_says_why(tmp_path, cache):
    path = write(tmp_path / "a.jsonl", [{"question": "a", "answer": "b"}] * 30)
    assert refusal(path, cache).startswith("data set a: 30 of 30 records are invalid: ")
    assert "; 27 more; fix them" in refusal(path, cache)
    message = refusal(path, cache, on_invalid="drop", max_dropped=1.0)
    assert message.startswith(
        "data set a: none of its 30 examples is left: 30 invalid, 0 with an empty completion, 0 too long"
    )
    assert "its fields: question, answer; try a template such as '{{question}} ||| {{answer}}'" in message


def test_rows_of_tables_are_dropped_one_by_one(tmp_path, cache):
    (tmp_path / "a.csv").write_text("prompt,completion\nab,x\ncd\nef,y\n")
    item = run(str(tmp_path / "a.csv"), cache, on_invalid="drop")
    assert read(item) == [marked("ab", "x"), ([], []), marked("ef", "y")]
    assert item.counts.reasons == [f"{tmp_path}/a.csv, line 3: expected 2 columns; fix the line"]
    dates = pyarrow.array([0, 2**31 - 1], pyarrow.date32())
    table = pyarrow.table({"prompt": ["ab", "cd"], "completion": ["x", "y"], "when": dates})
    pyarrow.parquet.write_table(table, tmp_path / "b.parquet")
    item = run(str(tmp_path / "b.parquet"), cache, on_invalid="drop")
    assert read(item) == [marked("ab", "x"), ([], [])]
    assert item.counts.reasons[0].startswith(f"{tmp_path}/b.parquet, row 2, column 'when' cannot be read: ")


# Limits


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"max_dropped": 0.3}, "1 of 3 examples dropped (1 with an empty completion, 0 too long), 33.3%; fix the "
         "data, or allow it with config.data.max_dropped=0.334 or more"),
        ({"truncate": "drop", "max_dropped": 0.5}, "2 of 3 examples dropped (1 with an empty completion, 1 too long)"),
        ({"max_truncated": 0.3}, "1 of 3 examples truncated, 33.3%; fix the data, or allow it with config.data"),
        ({"max_unknown": 0.05}, "1 of 19 tokens unknown to the tokenizer ('A' 1 times), 5.3%; fix the data, or "
         "allow it with config.data.max_unknown=0.053 or more"),
    ],
)  # fmt: skip
def test_a_share_above_its_limit_is_refused_with_the_setting_that_allows_it(tmp_path, cache, settings, message):
    path = write(tmp_path / "a.jsonl", pairs("ab>", "Abcdefgh>x", "a>x"))
    for _ in range(2):  # also when it comes from the cache
        assert refusal(path, cache, **settings).startswith(f"data set a: {message}")


def test_the_share_that_a_refusal_names_is_enough(tmp_path, cache):
    path = write(tmp_path / "a.jsonl", pairs("a>", "a>", "ABC>x", "a>x", "a>x", "a>x", "a>x"))
    for limit in ("max_dropped", "max_unknown"):
        named = float(refusal(path, cache, **{limit: 0.0}).split(f"config.data.{limit}=")[1].split()[0])
        assert run(path, cache, **{limit: named}).counts.kept == 5


def test_a_data_set_of_which_nothing_is_left_is_refused_whatever_the_limits(tmp_path, cache):
    path = write(tmp_path / "a.jsonl", pairs("a>", "abcdefgh>x"))
    expected = "data set a: none of its 2 examples is left: 1 with an empty completion, 1 too long"
    assert refusal(path, cache, truncate="drop") == expected


# The cache


def folders(cache: Path) -> set[str]:
    return {path.name for path in cache.iterdir()}


def test_what_was_tokenized_once_is_read_from_the_cache(tmp_path, cache):
    path = write(tmp_path / "a.jsonl", pairs("abc>xy", "b>z"))
    tokenizer = Letters()
    first = run(path, cache, tokenizer)
    assert tokenizer.encoded == 4
    os.utime(path, (1, 1))
    renamed = shutil.copy(path, tmp_path / "b.jsonl")
    for again in (run(path, cache, tokenizer), run(str(renamed), cache, tokenizer)):
        assert read(again) == read(first) and again.counts == first.counts
    assert tokenizer.encoded == 4 and len(folders(cache)) == 1
    assert isinstance(first.source_tokens, np.memmap)


def test_limits_are_no_part_of_the_key(tmp_path, cache):
    path = write(tmp_path / "a.jsonl", pairs("abc>xy"))
    for settings in ({"max_dropped": 0.1}, {"max_unknown": 0.2}, {"seed": 5}, {"packing": False}):
        run(path, cache, **settings)
    assert len(folders(cache)) == 1


def test_whatever_decides_the_tokens_makes_another_cache(tmp_path, cache, monkeypatch):
    path = write(tmp_path / "a.jsonl", [{"prompt": "abc", "completion": "xy", "instruction": "abc", "output": "xy"}])
    run(path, cache)
    known = folders(cache)

    def renewed() -> bool:
        nonlocal known
        before, known = known, folders(cache)
        return len(known - before) == 1

    for settings in (
        {"max_source_length": 9}, {"max_target_length": 5}, {"truncate": "start"}, {"truncate": "drop"},
        {"tokenizer": Letters("others")},
    ):  # fmt: skip
        run(path, cache, **settings)
        assert renewed(), settings
    base = {"max_source_length": 8, "max_target_length": 4, "cache_dir": str(cache), **LENIENT}
    for source in (
        Source(path, template=("alpaca",)),
        Source(path, template=("{{prompt}} ||| x",)),
        Source(path, limit=1),
    ):
        tokenize(source, "", Data(**base), Letters(), FORMAT)
        assert renewed(), source
    monkeypatch.setattr(tokenized, "_code", lambda: "other code")
    run(path, cache)
    assert renewed()
    Path(path).write_text(Path(path).read_text().replace('"xy"', '"xz"', 1))
    assert read(run(path, cache)) == [marked("abc", "xz")] and renewed()


def test_the_code_that_the_key_covers_is_found_by_its_imports(monkeypatch):
    modules, libraries = tokenized._imports("tokenized", "tokenizer_files")
    needed = "sources records templates jinja jinja_text chat encoding seq2seq causal tokenizer tokenizer_files".split()
    assert {*needed} < {*modules}
    assert not {"mixture", "loader", "evaluation_set"} & {*modules}
    assert {"transformers", "tokenizers", "sentencepiece", "jinja2", "numpy", "datasets", "pyarrow"} < libraries
    assert not {"jax_it", "json", "re"} & libraries
    code = tokenized._code.__wrapped__
    assert code() == code()
    before, version = code(), importlib.metadata.version
    monkeypatch.setattr(importlib.metadata, "version", lambda name: version(name) + (name == "tokenizers") * ".post1")
    assert code() != before


def test_a_failure_halfway_leaves_nothing_behind(tmp_path, cache):
    path = write(tmp_path / "a.jsonl", pairs("abc>xy"))
    Path(path).write_text(Path(path).read_text() + "{broken")
    assert "line 2: not valid JSON" in refusal(path, cache)
    assert folders(cache) == set()


KILLED = """
import os, signal, sys
from jax_it.config import Data, Source
from jax_it.data import tokenized
from jax_it.data.formats import Seq2SeqFormat
from tests.data.letters import Letters
write = tokenized._write_tokens
def die(folder, pairs):
    write(folder, pairs)
    os.kill(os.getpid(), signal.SIGKILL)
tokenized._write_tokens = die
data = Data(max_source_length=8, max_target_length=4, cache_dir=sys.argv[2])
tokenized.tokenize(Source(sys.argv[1]), "", data, Letters(), Seq2SeqFormat(0, 0))
"""


def test_what_a_killed_process_left_is_not_used_and_goes(tmp_path, cache):
    path = write(tmp_path / "a.jsonl", pairs("abc>xy"))
    root = Path(__file__).parents[2]
    killed = subprocess.run([sys.executable, "-c", KILLED, path, str(cache)], cwd=root, check=False)
    assert killed.returncode == -signal.SIGKILL
    (left,) = folders(cache)
    assert left.startswith(".part-")
    tokenizer = Letters()
    assert read(run(path, cache, tokenizer)) == [marked("abc", "xy")] and tokenizer.encoded == 2
    assert not any(name.startswith(".part-") for name in folders(cache))


def test_two_that_build_the_same_cache_at_once_both_succeed(tmp_path, cache, monkeypatch):
    path = write(tmp_path / "a.jsonl", pairs("abc>xy", "b>z"))
    both, write_tokens = threading.Barrier(2, timeout=20), tokenized._write_tokens

    def write_together(folder: Path, pairs: Iterator[Any]) -> None:
        write_tokens(folder, pairs)
        both.wait()

    monkeypatch.setattr(tokenized, "_write_tokens", write_together)
    found: list[Any] = []
    threads = [threading.Thread(target=lambda: found.append(read(run(path, cache)))) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [[marked("abc", "xy"), marked("b", "z")]] * 2
    assert len(folders(cache)) == 1


def test_a_cache_that_cannot_be_written_is_refused_with_its_setting(tmp_path, cache, monkeypatch):
    path = write(tmp_path / "a.jsonl", pairs("abc>xy"))

    def refuse(*args: Any, **kwargs: Any) -> Any:
        raise PermissionError(13, "Read-only file system")

    with monkeypatch.context() as patch:  # the mode of a folder means nothing to root, who may run the tests
        patch.setattr("tempfile.mkdtemp", refuse)
        assert refusal(path, cache).endswith(": Read-only file system; fix that or name another")

    def full(folder: Path, pairs: Any) -> None:
        (folder / "source_tokens.bin").write_bytes(b"part")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(tokenized, "_write_tokens", full)
    assert refusal(path, cache).endswith(": No space left on device; free space or name another")
    assert folders(cache) == set()


@pytest.fixture
def cached(tmp_path: Path, cache: Path) -> tuple[str, Path]:
    """A data file, and its cache's folder."""
    path = write(tmp_path / "a.jsonl", pairs("abc>xy", "b\nc>"))
    run(path, cache)
    (folder,) = cache.iterdir()
    return path, folder


def damaged(path: str, folder: Path) -> bool:
    said = f"the cached data set {folder} is damaged; delete it and it will be rebuilt"
    return refusal(path, folder.parent) == said


def test_a_cache_with_any_flipped_bit_is_refused_until_it_is_removed(cached):
    path, folder = cached
    for file in folder.iterdir():
        content = file.read_bytes()
        end = len(content) - file.name.endswith(".txt")  # but for the last line's end, which says nothing
        for at in range(end):
            file.write_bytes(content[:at] + bytes([content[at] ^ (1 << at % 8)]) + content[at + 1 :])
            assert damaged(path, folder), (file, at)
        for cut in (0, 1, end - 1):
            file.write_bytes(content[:cut])
            assert damaged(path, folder), (file, cut)
        file.write_bytes(content)
    assert read(run(path, folder.parent)) == [marked("abc", "xy"), ([], [])]
    file.write_bytes(content[1:])
    shutil.rmtree(folder)
    assert read(run(path, folder.parent)) == [marked("abc", "xy"), ([], [])]


@pytest.mark.parametrize("name", ["index.txt", "source_ends.bin", ""])
@pytest.mark.parametrize("what", ["folder", "gone", "pipe", "loop"])
def test_a_cache_with_something_else_in_a_file_s_place_is_refused(cached, name, what):
    path, folder = cached
    target = folder / name
    shutil.rmtree(target) if target.is_dir() else target.unlink()
    if what == "folder":
        target.mkdir()
    elif what == "pipe":
        os.mkfifo(target)
    elif what == "loop":
        target.symlink_to(target)
    if what == "gone" and not name:
        assert read(run(path, folder.parent)) == [marked("abc", "xy"), ([], [])]
    else:
        assert damaged(path, folder)


def test_a_cache_that_is_no_local_folder_is_refused(tmp_path):
    path = write(tmp_path / "a.jsonl", pairs("abc>xy"))
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    for name in ("gs://bucket/cache", "s3://bucket", "", tmp_path / "loop", tmp_path / ("x" * 300), tmp_path / "a\0b"):
        assert refusal(path, name).startswith("config.data.cache_dir")
    assert refusal(path, path).startswith(f"config.data.cache_dir: cannot make {path}: ")


# The whole chain, against the slow and plain way to do it.


def test_tokens_are_those_of_templates_and_tokenizer_applied_one_by_one(tmp_path, cache):
    rng = np.random.default_rng(0)
    words = ["abc", "de", "F", "g", "hijkl"]
    records = [
        {"q": " ".join(rng.choice(words, rng.integers(0, 9))), "a": " ".join(rng.choice(words, rng.integers(0, 4)))}
        for _ in range(200)
    ]
    path = write(tmp_path / "a.jsonl", records)
    template, tokenizer = "Do: {{q}} ||| {{a}}", Letters()
    data = Data(max_source_length=16, max_target_length=6, cache_dir=str(cache), **LENIENT)
    (item,) = tokenize(Source(path, template=(template,)), "", data, tokenizer, FORMAT)
    expected, unknown = [], 0
    for record in sources.read(Source(path)):
        example = templates.render(record, template)
        (prompt,), (completion,) = tokenizer.encode([example.prompt]), tokenizer.encode([example.completion])
        unknown += [*prompt, *completion].count(UNKNOWN)
        expected.append(([*prompt[:15], END], [*completion[:5], END]) if completion else ([], []))
    assert read(item) == expected and item.counts.unknown_tokens == unknown > 0


# Processes


def test_processes_make_what_one_makes_in_order(tmp_path, cache, monkeypatch):
    monkeypatch.setattr(tokenized, "_CHUNK", 3)
    monkeypatch.setattr(workers, "FEW", 0)
    texts = [f"{'ab ' * (i % 5)}{i}>{'x' * (i % 4)}" for i in range(20)]
    path = write(tmp_path / "a.jsonl", [*pairs(*texts), {"prompt": 5}])
    alone = run(path, cache, on_invalid="drop")
    shared = run(path, tmp_path / "other", on_invalid="drop", num_workers=2)
    assert read(alone) == read(shared) and alone.counts == shared.counts and len(read(alone)) == 21
    assert alone.records.tolist() == shared.records.tolist() == list(range(21))
    for folder in (*cache.iterdir(), *(tmp_path / "other").iterdir()):
        assert {file.name for file in folder.iterdir()} == {"index.txt", *(f"{a}.bin" for a in tokenized._ARRAYS)}
    assert [file.read_bytes() for file in sorted(next(cache.iterdir()).iterdir())] == [
        file.read_bytes() for file in sorted(next((tmp_path / "other").iterdir()).iterdir())
    ]
    message = refusal(path, tmp_path / "third", num_workers=2, truncate="error")
    assert message.startswith(f"{path}, line ") and "exceed the limits" in message


def test_what_is_tokenized_before_is_trained_on_without_the_records(tmp_path, cache):
    path = write(tmp_path / "a.jsonl", pairs("ab>x", "c>y", "c>"))
    settings = {"max_source_length": 8, "max_target_length": 4, "cache_dir": str(cache), **LENIENT}
    data = Data((Source(path, template=("auto", "{{prompt}}b ||| {{completion}}")),), **settings)
    output = tmp_path / "made"
    made = chain.tokenize(data, Letters(), FORMAT, str(output))
    expected = [(read(item), item.counts, item.template, item.digest, item.records.tolist()) for item in made[0]]
    Path(path).unlink()
    shutil.rmtree(cache)
    used = replace(data, tokenized=str(output))
    ((*loaded,),) = tokenized.load(used, Letters(), FORMAT)
    assert [(read(i), i.counts, i.template, i.digest, i.records.tolist()) for i in loaded] == expected
    assert chain.build(used, Letters(), FORMAT, 2, lambda shape: 1.0).digest == made[0][0].digest

    def refused(data: Data, tokenizer: Any = None) -> str:
        with pytest.raises(UserError) as caught:
            tokenized.load(data, tokenizer or Letters(), FORMAT)
        return str(caught.value)

    again = f"config.data.tokenized: {output} was made with another {{}}; run 'jax-it data tokenize' again"
    assert refused(used, Letters("others")) == again.format("tokenizer")
    assert refused(replace(used, max_source_length=9)) == again.format("length, truncate or train_on")
    assert refused(replace(used, train=(Source(path),))) == again.format("template")
    other = replace(used, train=(replace(data.train[0], path="b.jsonl"),))
    assert refused(other).endswith("has the data sets a, and config.data.train has b")
    assert "was not written by 'jax-it data tokenize': No such file" in refused(replace(used, tokenized=str(tmp_path)))
    with pytest.raises(UserError, match=r"--output: .* already exists; name another, or remove it"):
        chain.tokenize(data, Letters(), FORMAT, str(output))
    (output / "0.1" / "target_tokens.bin").write_bytes(b"1234")
    assert refused(used) == f"the cached data set {output}/0.1 is damaged; delete it and it will be rebuilt"
