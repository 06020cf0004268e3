"""Samples of records: of the size and the kinds that were asked for, the same for any number of workers."""

import itertools
import json
import random

import numpy as np
import pytest

from jax_it import cli
from jax_it.curation import sample


def jax_it(*words):
    with pytest.raises(SystemExit) as left:
        cli.main(["data", "sample", *words])
    return left.value.code or 0


def rows(file):
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]


def write(file, records):
    file.write_text("".join(json.dumps(record) + "\n" for record in records))
    return str(file)


@pytest.fixture
def records(tmp_path):
    rng = random.Random(0)
    words = [f"w{i}" for i in range(300)]
    made = [
        {
            "id": i,
            "task": "abc"[i % 10 // 5 + (i % 10 == 9)],
            "prompt": " ".join(rng.choices(words, k=12)),
            "completion": "x",
        }
        for i in range(700)
    ]
    return write(tmp_path / "in.jsonl", made)


def test_a_sample_has_its_size_and_depends_on_the_seed_alone(tmp_path, records):
    made = []
    for words in (["--number", "100"], ["--number", "100", "--num-workers", "2"], ["--share", "0.1", "--seed", "1"]):
        output = tmp_path / f"{len(made)}.jsonl"
        assert jax_it(records, "--output", str(output), "--num-workers", "1", *words) == 0
        made.append([row["id"] for row in rows(output)])
    assert made[0] == made[1] == sorted(made[0]) and len(set(made[0])) == 100
    assert len(made[2]) == 70 and set(made[2]) - set(made[0])


def test_tasks_keep_their_shares(tmp_path, records):
    output = tmp_path / "out.jsonl"
    assert jax_it(records, "--output", str(output), "--num-workers", "1", "--number", "101", "--stratify", "task") == 0
    taken = [row["task"] for row in rows(output)]
    assert {task: taken.count(task) for task in "abc"} == {"a": 51, "b": 40, "c": 10}
    report = json.loads((tmp_path / "out.jsonl.manifest.json").read_text())["report"]
    assert report["by_value"]["b"] == {"records": 280, "taken": 40}
    assert sample.quotas([1, 1, 1], 2) == [1, 1, 0] and sample.quotas([5, 0, 95], 20) == [1, 0, 19]


def test_a_diverse_sample_takes_one_of_each_kind_before_two_of_any(tmp_path):
    kinds = [
        "write a poem about the sea",
        "add two numbers",
        "translate into german",
        "name a red bird",
        "sort the list",
    ]
    prompts = [f"{kinds[i % 5]} {'please ' * (i % 2)}" for i in range(40)]
    file = write(tmp_path / "in.jsonl", [{"prompt": prompt, "completion": "x"} for prompt in prompts])
    output = tmp_path / "out.jsonl"
    assert jax_it(file, "--output", str(output), "--num-workers", "1", "--number", "5", "--diverse") == 0
    assert {row["prompt"][:8] for row in rows(output)} == {kind[:8] for kind in kinds}


def test_k_centers_leave_at_most_twice_the_distance_that_the_best_choice_leaves():
    rng = np.random.default_rng(0)
    for _ in range(20):
        vectors = rng.normal(size=(9, 4)).astype(np.float32)
        vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
        found, distance = sample.k_centers(vectors, np.arange(9), 3)
        chords = np.sqrt(np.maximum(0, 2 - 2 * vectors @ vectors.T))
        best = min(chords[:, list(three)].min(1).max() for three in itertools.combinations(range(9), 3))
        assert len(set(found.tolist())) == 3 and found[0] == 0
        assert np.sqrt(2 * distance) == pytest.approx(chords[:, found].min(1).max(), abs=1e-3)
        assert np.sqrt(2 * distance) <= 2 * best + 1e-3


def test_the_parts_of_a_split_share_no_near_duplicates_and_make_up_the_whole(tmp_path, records):
    rng = random.Random(1)
    made = rows(tmp_path / "in.jsonl")[:200]
    for record in list(made):  # three copies of each, with a word more each time: a chain of near-duplicates
        words = (record["prompt"] + " " + " ".join(rng.choices("abcdefgh", k=120))).split()
        record["prompt"] = " ".join(words)
        for copy in range(3):
            words[copy * 40] = f"new{copy}"
            made.append(record | {"prompt": " ".join(words)})
    file = write(tmp_path / "copies.jsonl", made)
    parts = {}
    for part in ("train", "validation", "test"):
        output = tmp_path / f"{part}.jsonl"
        words = ["--split", part, "--validation", "0.1", "--test", "0.2", "--num-workers", "1"]
        assert jax_it(file, "--output", str(output), *words) == 0
        parts[part] = rows(output)
    assert sorted(json.dumps(row) for part in parts.values() for row in part) == sorted(map(json.dumps, made))
    assert {name: len(part) for name, part in parts.items()} == {"train": 560, "validation": 80, "test": 160}
    ids = [{row["id"] for row in part} for part in parts.values()]
    assert not ids[0] & ids[1] and not ids[0] & ids[2] and not ids[1] & ids[2]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "give one of --number, --share and --split"),
        (["--number", "3", "--share", "0.5"], "give one of --number, --share and --split"),
        (["--number", "701"], "701 records are wanted, and there are 700; lower it"),
        (["--share", "1.5"], "--share from 0 to 1"),
        (["--split", "test", "--diverse"], "--split excludes --stratify and --diverse"),
        (["--number", "3", "--model", "x"], "--model is for --diverse"),
        (["--split", "test", "--test", "0.9", "--validation", "0.1"], "leave some records to train on"),
    ],
)
def test_bad_settings_are_refused_in_one_line(records, capsys, words, message):
    assert jax_it(records, "--num-workers", "1", *words) == 2
    assert message in capsys.readouterr().err
