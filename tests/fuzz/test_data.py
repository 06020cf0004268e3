"""Hostile data files and templates, through `preview` and `train`: what is read adds up, and the rest is refused."""

import csv
import gzip
import io
import json
import os
import random
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest
import zstandard

from jax_it.data import tokenizer_files as tokenizers
from tests.fuzz.seeds import fuzz_cases
from tests.tiny_run import write_recipe

# Texts and values that data sets hold, or could.
TEXTS = [
    "", " ", "\n", "a", "say red 1", "two\nlines", "tab\there", "nul\0nul", "\ud800", "\udc00x", "é漢😀", "e\u0301",
    "\u200d", "\ufeff", "\u2028x\u2029", "\x85", "\r", "\r\n", "a" * 5000, "{{ x }}", "{% raw %}", "|||", "a ||| b",
    "<pad>", "</s>", "<unk>", "'\"", "\\", "\x1b[31m", "\u202e", "=1+1", "None", "NaN", "1e400", "-0", "0x7f",
    "x at 0x7f00aa>", "true",
]  # fmt: skip
SCALARS = [
    None, True, False, 0, -1, 7, 2**63, 10**400, -(10**400), 0.5, 1e308, float("nan"), float("inf"), [],
    {}, [None], [[]], {"a": {"b": None}}, ["a", "b"], [1, "a"], {"": ""}, [{"role": "user"}],
]  # fmt: skip
KEYS = ["prompt", "completion", "instruction", "output", "input", "messages", "conversations", "Definition", "id"]
TEMPLATES = [
    "auto", "prompt_completion", "alpaca", "messages", "prompt", "super_ni", "super_ni_1_example", "nonsense", "",
    "{{prompt}} ||| {{completion}}", "{{prompt}}", "|||", "{{prompt|upper}} ||| {{completion|length}}",
    "{% for x in prompt %}{{x}}{% endfor %} ||| {{completion[0]}}", "{{prompt|map('upper')}} ||| b", "{{prompt ||| b",
    "{{prompt|random}} ||| b", "{{lipsum()}} ||| b", "{{range(prompt)}} ||| b", "{{prompt.x.y.z}} ||| {{completion}}",
    "{{" + "(" * 2000 + "1" + ")" * 2000 + "}} ||| b", "{{1 // 0}} ||| b", "{{prompt}} ||| {{completion|tojson}}",
    "{{'%d' % prompt}} ||| b", "{{prompt|int(base=99)}} ||| b", "{{[prompt]|join('|||')}} ||| {{completion}} ||| c",
    "{% include 'x' %} ||| b", "{% extends prompt %} ||| b", "{% macro f() %}{{f()}}{% endmacro %}{{f()}} ||| b",
    "{{prompt.__class__}} ||| b", "{{self}} ||| {{cycler}}", "{{namespace}} ||| {{joiner()}}",
    "{{9" + "9" * 5000 + "}} ||| b", "{{choice(prompt)}} ||| {{[completion]|choice}}",
    "{{completion|most_frequent}} ||| b", "\ud800 ||| b", "\0 ||| \0",
]  # fmt: skip


def value_of(rng: random.Random, depth: int = 0) -> Any:
    kind = rng.random()
    if kind < 0.6:
        return rng.choice(TEXTS)
    if kind < 0.85 or depth > 3:
        return rng.choice(SCALARS)
    if kind < 0.93:
        return [value_of(rng, depth + 1) for _ in range(rng.randrange(4))]
    return {rng.choice([*KEYS, *TEXTS[:12]]): value_of(rng, depth + 1) for _ in range(rng.randrange(4))}


def records_of(rng: random.Random, files: Path) -> list[dict[str, Any]]:
    """Sound records, of which some are changed."""
    records: list[dict[str, Any]] = [
        {"prompt": f"say red {i}", "completion": "red green"} for i in range(rng.choice([1, 3, 20]))
    ]
    if rng.random() < 0.2:
        turns = [{"role": role, "content": f"say {role}"} for role in ("user", "assistant") * rng.randrange(3)]
        records = [{"messages": turns} for _ in records]
    for _ in range(rng.choice([0, 0, 0, 1, 1, 2, 5])):
        record = rng.choice(records)
        turns = record.get("messages")
        if rng.random() < 0.3 and isinstance(turns, list) and turns and isinstance(turns[0], dict):
            turns[0][rng.choice(["role", "content", "tool_calls"])] = value_of(rng)
        elif rng.random() < 0.2 and record:
            del record[rng.choice(list(record))]
        else:
            record[rng.choice([*KEYS, *TEXTS[:12]])] = value_of(rng)
    return records


def as_jsonl(records: list[Any], rng: random.Random) -> bytes:
    end = rng.choice(["\n", "\n", "\n", "\r\n", "\r", "\n\n"])
    return "".join(json.dumps(r, ensure_ascii=rng.random() < 0.5) + end for r in records).encode(errors="surrogatepass")


def as_json(records: list[Any], rng: random.Random) -> bytes:
    whole: Any = records if rng.random() < 0.7 else {"rows": records, "prompt": "shared"}
    return json.dumps(whole, indent=rng.choice([None, 1])).encode()


def as_csv(records: list[Any], rng: random.Random) -> bytes:
    sink = io.StringIO()
    names = list(dict.fromkeys(name for record in records for name in record))
    quoting = rng.choice([csv.QUOTE_ALL, csv.QUOTE_MINIMAL, csv.QUOTE_NONE])
    if len(names) == 1:  # the writer refuses an empty line
        quoting = csv.QUOTE_ALL
    writer = csv.writer(sink, quoting=quoting, escapechar="\\" if quoting == csv.QUOTE_NONE else None)
    for row in [names, *([record.get(name) for name in names] for record in records)]:
        writer.writerow(row)
    return sink.getvalue().encode(errors="surrogatepass")


def as_parquet(records: list[Any], rng: random.Random) -> bytes:
    sink = pyarrow.BufferOutputStream()
    odd = [
        pyarrow.array([2**62], pyarrow.timestamp("us", "No/Where")), pyarrow.array([2**31 - 1], pyarrow.date32()),
        pyarrow.array([b"\xff"]).view(pyarrow.string()), pyarrow.array([b"\xff"]), pyarrow.array([{"a": 1}]),
        pyarrow.array([2**62], pyarrow.duration("s")), pyarrow.array([15]).cast(pyarrow.decimal128(20, 1)),
        pyarrow.nulls(1),
    ]  # fmt: skip
    columns: dict[str, Any] = {}
    for name in ("prompt", "completion"):
        texts = [str(record.get(name)).encode(errors="replace").decode() for record in records]
        columns[name] = pyarrow.array(texts)
    if rng.random() < 0.5:
        columns[rng.choice([*KEYS, "odd"])] = pyarrow.concat_arrays([rng.choice(odd)] * len(records))
    names = list(columns)
    if rng.random() < 0.1:
        names[-1] = names[0]
    pyarrow.parquet.write_table(pyarrow.Table.from_arrays(list(columns.values()), names), sink)
    return sink.getvalue().to_pybytes()


WRITERS: dict[str, Callable[[list[Any], random.Random], bytes]] = {
    ".jsonl": as_jsonl, ".json": as_json, ".csv": as_csv, ".parquet": as_parquet,
}  # fmt: skip


def damaged(content: bytes, rng: random.Random) -> bytes:
    """The bytes of a file, or what is left of them."""
    at = rng.randrange(len(content) + 1)
    return rng.choice([
        lambda: content[:at], lambda: content[at:], lambda: content[:at] + b"\xff\xfe" + content[at:],
        lambda: content[:at] + b"\0" * 5 + content[at:], lambda: content[:at] + b'"' + content[at:], lambda: b"",
        lambda: content.decode(errors="replace").encode("utf-16"), lambda: b"\xef\xbb\xbf" + content,
        lambda: content[:at] + bytes(rng.randrange(256) for _ in range(20)) + content[at:],
        lambda: content.replace(b":", b"", 1), lambda: content + content, lambda: b"[" * 100_000 + content,
        lambda: content.replace(b'"prompt"', b'"completion"'), lambda: b"null\n" + content, lambda: b"\n \n" + content,
        lambda: content[:at] + b"," + content[at:], lambda: content[:at] + b"\n" + content[at:],
    ])()  # fmt: skip


def write_case(folder: Path, rng: random.Random) -> tuple[dict[str, Any], int | None]:
    """A source's settings with its files in the folder, and how many records these have, if that is known."""
    suffix = rng.choice([".jsonl", ".jsonl", *WRITERS])
    records = records_of(rng, folder)
    content = WRITERS[suffix](records, rng)
    known: int | None = len(records)
    if suffix == ".csv" and b"\\" in content:  # CSV has no escapes: a line break after one ends the record
        known = None
    if rng.random() < 0.3:
        content, known = damaged(content, rng), None
    packing = rng.choice(["", "", "", ".gz", ".zst"])
    packed = {"": lambda: content, ".gz": lambda: gzip.compress(content), ".zst": lambda: _zst(content)}[packing]()
    if packing and rng.random() < 0.2:
        packed, known = damaged(packed, rng), None
    name = rng.choice(["data"] * 12 + ["x" * 300, "é漢", "a b", "a\nb", "[ab]*"])
    file = folder / f"{name}{suffix}{packing}"
    source: dict[str, Any] = {"path": str(file)}
    try:
        file.write_bytes(packed)
    except OSError:
        known = None
    place = rng.random()
    if place < 0.1:
        source["path"], known = _odd_path(folder, file, rng), None
    if rng.random() < 0.3:
        source["template"] = [rng.choice(TEMPLATES) for _ in range(rng.choice([1, 1, 2]))]
    if rng.random() < 0.2:
        name, value = rng.choice([
            ("limit", rng.choice([1, 2, 10**30, -1, 0.5])), ("records", rng.choice(["rows", "prompt", ""])),
            ("format", rng.choice(["json", "csv", "parquet", "builtin", "xml"])), ("file_list", str(file)),
            ("max_per_file", 1), ("split", "test"), ("subset", "x"), ("revision", "x"), ("name", rng.choice(TEXTS)),
            ("weight", 2.0), ("template", []),
        ])  # fmt: skip
        source[name], known = value, None
    return source, known if suffix != ".json" else None


def _zst(content: bytes) -> bytes:
    return zstandard.ZstdCompressor().compress(content)


def _odd_path(folder: Path, file: Path, rng: random.Random) -> str:
    def pipe() -> str:
        os.mkfifo(folder / "pipe.jsonl")
        return str(folder / rng.choice(["pipe.jsonl", "*.jsonl", ""]))

    def loop() -> str:
        (folder / "loop.jsonl").symlink_to(folder / "loop.jsonl")
        return str(folder / rng.choice(["loop.jsonl", "l*.jsonl", ""]))

    def inside() -> str:
        (folder / "deep.jsonl").mkdir()
        return str(folder / rng.choice(["deep.jsonl", "*.jsonl", ""]))

    return rng.choice([
        pipe, loop, inside, lambda: str(folder), lambda: f"{folder}/*", lambda: f"{file}/x", lambda: "/dev/zero",
        lambda: "/dev/stdin", lambda: "a\0b", lambda: "~nobody-at-all/x.jsonl", lambda: "gs://", lambda: "ftp://a/b",
        lambda: "builtin:nothing", lambda: "builtin:instructions", lambda: "no-such/set", lambda: "absent.jsonl",
        lambda: f"{folder}/**/*.*", lambda: "\ud800", lambda: " ", lambda: "/proc/self/mem",
    ])()  # fmt: skip


CONFIG = """
import pickle
from pathlib import Path

def get_config(arg=""):
    tree = pickle.loads((Path(__file__).parent / "config.pickle").read_bytes())
    from jax_it import config
    made = config.default()
    made.update(tree)
    return made
"""


@pytest.fixture(scope="session")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The tiny recipe's settings, with its tokenizer in a folder."""
    from jax_it import config

    folder = tmp_path_factory.mktemp("recipe")
    tree = config.read(str(write_recipe(folder)))
    texts = [f"say {word} {i} user assistant" for word in ("red", "green", "blue") for i in range(20)]
    tokenizers.train(texts, 120).save(folder / "tokenizer")
    tree["model"] |= {"tokenizer": str(folder / "tokenizer"), "tokenizer_size": 0}
    tree["data"] |= {"max_unknown": 1.0, "max_dropped": 1.0, "max_truncated": 1.0, "eval": []}
    return tree


@fuzz_cases(900, short=40)
def test_data_is_read_whole_or_refused(seeds, commands, tally, recipe, tmp_path):
    tally(run_case(seed, commands, recipe, tmp_path / str(seed)) for seed in seeds)


def run_case(seed: int, commands: Any, recipe: dict[str, Any], folder: Path) -> tuple[Any, str]:
    import pickle

    rng = random.Random(seed)
    data, home = folder / "data", folder / "home"
    data.mkdir(parents=True), home.mkdir()
    source, known = write_case(data, rng)
    other = rng.random()
    sources = [source] if other < 0.8 else [source, {"path": "builtin:instructions", "limit": 20}]
    where = {"train": sources}
    training = rng.random() < 0.03
    if training and rng.random() < 0.5:  # of evaluation
        where = {"train": [{"path": "builtin:instructions", "limit": 20}], "eval": [source]}
    given = {"cache_dir": str(home / "cache"), "on_invalid": rng.choice(["error", "error", "drop"])}
    tree = {**recipe, "data": {**recipe["data"], **where, **given}}
    (home / "config.pickle").write_bytes(pickle.dumps(tree))
    (home / "config.py").write_text(CONFIG)
    words: list[Any] = ["preview", "--config", home / "config.py"]
    if training:
        words = ["train", "--config", home / "config.py", "--workdir", home / "run", "--config.train.duration=1 steps"]
    hub = {"HF_HUB_OFFLINE": "1", "HF_HOME": str(home / "hf")}
    result = commands.run(*words, cwd=home, timeout=240 if training else 60, **hub)
    kind, said = result.kind, f"seed {seed}, {source}: {result}"
    if kind != "fault" and (wrong := _wrong(result, home, training, known if len(source) == 1 else None)):
        kind, said = "fault", f"{wrong}; {said}\n{result.out}"
    shutil.rmtree(folder, ignore_errors=True)
    return kind, said


def _wrong(result: Any, home: Path, training: bool, known: int | None) -> str:
    """What does not add up after a command that has ended well, or what one that was refused has left behind."""
    cached = list((home / "cache").iterdir()) if (home / "cache").exists() else []
    if any(folder.name.startswith(".part-") for folder in cached):
        return "a half-made cache is left"
    if result.kind == "refused":
        return "a refused run is left" if (home / "run").exists() else ""
    if training:
        return "" if (home / "run" / "checkpoints" / "1").is_dir() else "there is no checkpoint"
    number, kept = map(int, re.search(r": (\d+) examples, (\d+) kept\n", result.out).groups())
    dropped = sum(map(int, re.search(r"dropped +(\d+) \(.*?, (\d+) \(", result.out).groups()))
    dropped += sum(map(int, re.findall(r"^    invalid    (\d+) \(", result.out, re.M)[:1]))
    if number - dropped != kept:
        return "the counts do not add up"
    return f"{known} records became {number}" if known not in (None, number) else ""
