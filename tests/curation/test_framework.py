"""Every stage: reading, workers, output with its manifest, recipes."""

import json
import re
import signal
import subprocess
import sys
import time

import pytest
from pyarrow import parquet

from jax_it import errors, workers
from jax_it.config import Source
from jax_it.curation import input, recipe
from jax_it.curation.run import run
from jax_it.curation.settings import Convert
from jax_it.data import sources
from tests.curation.datasets import data_of, jax_it, read, write

PAIRS = [{"id": i, "prompt": f"Say {i}, please. é", "completion": f"{i}"} for i in range(1500)]


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz", "list.json", "a.csv", "a.parquet"])
def test_chunks_hold_the_records_of_training_with_their_places(tmp_path, name):
    file = tmp_path / name
    if name == "list.json":
        file.write_text(json.dumps(PAIRS), encoding="utf-8")
    elif name == "a.csv":
        lines = ["id,prompt,completion", *(f'{r["id"]},"{r["prompt"]}",{r["completion"]}' for r in PAIRS)]
        file.write_text("\n".join(lines), encoding="utf-8")
    elif name == "a.parquet":
        import pyarrow

        parquet.write_table(pyarrow.Table.from_pylist(PAIRS), file)
    else:
        write(file, PAIRS)
    chunks = list(data_of(str(file), folder=tmp_path).chunks())
    assert [chunk.start for chunk in chunks] == [0, 512, 1024]
    found = [record for chunk in chunks for record in chunk.records()]
    assert found == list(sources.read(Source(path=str(file))))
    assert len(found) == sum(chunk.size for chunk in chunks) == 1500


def test_lines_are_numbered_as_in_training_whatever_ends_them(tmp_path):
    file = tmp_path / "a.jsonl"
    file.write_bytes(b'\xef\xbb\xbf\n{"a": 1}\r\n\r\r{"a": 2}\r{"a": 3}\n  \n{"a": 4}')
    found = [record for chunk in data_of(str(file), folder=tmp_path).chunks() for record in chunk.records()]
    assert found == list(sources.read(Source(path=str(file))))
    assert [input.location(record.where)["line"] for record in found] == [2, 5, 6, 8]


def test_a_line_that_is_not_utf8_is_one_invalid_record(tmp_path):
    file = tmp_path / "a.jsonl"
    file.write_bytes(b'{"a": "x"}\n{"a": "\xff"}\n{"a": "y"}\n')
    (chunk,) = data_of(str(file), folder=tmp_path).chunks()
    one, two, three = chunk.records()
    assert (one.error, three.error) == ("", "")
    assert two.error == f"{file}, line 2: not UTF-8 text; convert the file to UTF-8"


def test_an_output_does_not_depend_on_the_number_of_workers(tmp_path, monkeypatch):
    monkeypatch.setattr(workers, "FEW", 0)
    path = write(tmp_path / "a.jsonl", [*PAIRS, {"prompt": "no completion"}])
    made = []
    for number in (1, 2):
        folder = tmp_path / str(number)
        folder.mkdir()
        words = ["convert", path, "--to", "messages", "--on-invalid", "drop", "--num-workers", str(number)]
        assert jax_it(*words, "--output", str(folder / "out.jsonl.zst")) == 0
        made.append([(folder / f"out.jsonl.zst{suffix}").read_bytes() for suffix in ("", ".dropped.jsonl")])
    assert made[0] == made[1]
    assert json.loads(made[0][1]) == {
        "file": path, "line": 1501, "reason": "invalid",
        "error": f"{path}, line 1501: field 'completion' is missing or null, which template 'auto' needs; its fields: "
        "prompt",
    }  # fmt: skip


def test_the_manifest_says_what_was_made_of_what(tmp_path):
    path = write(tmp_path / "a.jsonl", PAIRS[:3])
    data = data_of(path, folder=tmp_path)
    manifest = run("convert", Convert(to="messages"), data, sources.epath.Path(tmp_path / "b.jsonl"), command=["x"])
    assert manifest == json.loads((tmp_path / "b.jsonl.manifest.json").read_text())
    assert manifest["command"] == ["x"]
    assert manifest["settings"] == {"to": "messages", "keep_fields": False}
    assert manifest["inputs"] == [{"path": path, "template": "auto", "digest": sources.digest(Source(path=path))}]
    assert manifest["counts"] == {"read": 3, "kept": 3, "dropped": 0}
    assert manifest["changed"] == {"to messages": 3}
    assert {"python", "jax-it", "numpy"} <= set(manifest["versions"])


def test_an_invalid_record_stops_the_stage_and_leaves_nothing(tmp_path, capsys):
    path = write(tmp_path / "a.jsonl", [PAIRS[0], {"prompt": "x"}])
    assert jax_it("convert", path, "--to", "messages", "--output", str(tmp_path / "b.jsonl")) == 2
    assert f"{path}, line 2: field 'completion' is missing" in capsys.readouterr().err
    assert [file.name for file in tmp_path.iterdir()] == ["a.jsonl"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--output", "b.txt"], "--output: cannot tell the format of b.txt from its name"),
        (["--output", "a.jsonl"], "--output: a.jsonl is also read"),
        (["--output", "no/b.jsonl"], "--output: cannot write no/b.jsonl"),
        (["--to", "nope"], "--to: 'nope' is not one of 'same'"),
        (["missing.jsonl"], "FILE: data file missing.jsonl does not exist"),
        (["--num-workers", "0"], "0 is not from 1"),
        (["--nope"], "unknown option --nope"),
    ],
)
def test_a_wrong_command_line_is_refused_in_one_line(tmp_path, monkeypatch, capsys, words, message):
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "a.jsonl", PAIRS[:3])
    assert jax_it("convert", "a.jsonl", *words) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1
    assert [file.name for file in tmp_path.iterdir()] == ["a.jsonl"]


def test_parquet_has_the_columns_of_all_records(tmp_path):
    records = [*PAIRS[:600], {"prompt": "x", "completion": "y", "score": 0.5}]
    path = write(tmp_path / "a.jsonl", records)
    assert jax_it("convert", path, "--output", str(tmp_path / "b.parquet")) == 0
    blank = {"id": None, "score": None}
    assert read(tmp_path / "b.parquet") == [blank | record for record in records]


def test_fields_of_several_types_do_not_become_a_column(tmp_path, capsys):
    path = write(tmp_path / "a.jsonl", [*PAIRS[:600], {"id": "x", "prompt": "x", "completion": "y"}])
    assert jax_it("convert", path, "--output", str(tmp_path / "b.parquet")) == 2
    assert "write .jsonl" in capsys.readouterr().err


def test_a_second_command_into_the_same_output_is_refused_until_the_first_ends_even_if_it_is_killed(tmp_path):
    path = write(tmp_path / "a.jsonl", [{"prompt": f"{i} " * 9, "completion": "x"} for i in range(30_000)])
    (tmp_path / "link.jsonl").symlink_to("out.jsonl")

    def words(stage: str, output: str) -> list[str]:
        command = [sys.executable, "-m", "jax_it", "data", stage, path, "--num-workers", "1"]
        return [*command, "--output", str(tmp_path / output)]

    first = subprocess.Popen(words("dedup", "out.jsonl"), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        lock = tmp_path / ".out.jsonl.lock"
        while not (lock.exists() and lock.read_bytes()) and first.poll() is None:
            time.sleep(0.01)
        first.send_signal(signal.SIGSTOP)
        second = subprocess.run(words("convert", "link.jsonl"), capture_output=True, text=True)
        assert first.poll() is None, "the first command ended before the second began"
    finally:
        first.kill()
        first.wait()
    assert second.returncode == 2 and second.stderr.count("\n") == 1
    message = rf"process {first.pid} on .* is writing .*link.jsonl; wait for it, or give another --output"
    assert re.search(message, second.stderr)
    assert subprocess.run(words("convert", "link.jsonl"), stdout=subprocess.DEVNULL).returncode == 0
    made = ["link.jsonl.dropped.jsonl", "link.jsonl.manifest.json"]
    assert sorted(file.name for file in tmp_path.iterdir()) == ["a.jsonl", "link.jsonl", *made, "out.jsonl"]


RECIPE = """
from ml_collections import ConfigDict


def get_config(arg=""):
    stages = [{{"stage": "convert", "to": "messages"}}, {{"stage": "convert", "to": "sharegpt"}}]
    stages += [{{"stage": "dedup", "method": "exact"}}, {{"stage": "dedup", "threshold": 0.9}}]
    return ConfigDict({{"inputs": [{{"path": {path!r}}}], "stages": stages, "output": arg, "on_invalid": "drop"}})
"""


def test_a_recipe_runs_its_stages_and_keeps_what_is_done(tmp_path, capsys):
    path = write(tmp_path / "a.jsonl", [PAIRS[0], {"prompt": "x"}, {**PAIRS[1], "jax_it origin": "mine"}])
    (tmp_path / "recipe.py").write_text(RECIPE.format(path=path))
    output = tmp_path / "out.jsonl"
    assert jax_it("run", f"{tmp_path}/recipe.py:{output}") == 0
    assert [record["conversations"][1]["value"] for record in read(output)] == ["0", "1"]
    assert all(set(record) == {"conversations"} for record in read(output))
    (dropped,) = read(tmp_path / "out.jsonl.dropped.jsonl")
    assert (dropped["stage"], dropped["file"], dropped["line"], dropped["reason"]) == ("convert", path, 2, "invalid")
    manifest = json.loads((tmp_path / "out.jsonl.manifest.json").read_text())
    assert [stage["counts"]["kept"] for stage in manifest["stages"]] == [2, 2, 2, 2]

    capsys.readouterr()
    (tmp_path / "out.jsonl.stages" / "1-convert.jsonl.zst").write_bytes(b"damaged")
    assert jax_it("run", f"{tmp_path}/recipe.py:{output}") == 0
    text = capsys.readouterr().out
    assert "0-convert.jsonl.zst is up to date" in text and "1-convert.jsonl.zst is up to date" not in text
    assert len(read(output)) == 2

    write(tmp_path / "a.jsonl", PAIRS[:1])
    assert jax_it("run", f"{tmp_path}/recipe.py:{output}") == 0
    assert "up to date" not in capsys.readouterr().out


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"stages": [{"stage": "nope"}]}, "config.stages.0.stage: 'nope' is not one of"),
        ({"stages": [{"stage": "convert", "too": 1}]}, "config.stages.0.too is not a setting; did you mean 'to'?"),
        ({"inputs": [{"path": "a.jsonl"}, {"path": "b.jsonl", "template": "messages"}]}, "have different templates"),
    ],
)
def test_a_wrong_recipe_names_the_field(tmp_path, monkeypatch, change, message):
    monkeypatch.chdir(tmp_path)
    tree = {"inputs": [{"path": "a.jsonl"}], "stages": [{"stage": "convert"}], "output": "out.jsonl"} | change
    with pytest.raises(errors.UserError, match=message):
        recipe.run(recipe.typed.build(recipe.Recipe, tree, "config"), workers.Workers())
