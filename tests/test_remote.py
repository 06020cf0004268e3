"""Runs whose folder is in an object store: against a stand-in for Google's, with the libraries that users have."""

import gzip
import io
import json
import os
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest

from tests import object_store, tiny_run, xla


@pytest.fixture(scope="module")
def bucket() -> Iterator[tuple[object_store.Store, dict[str, str]]]:
    pytest.importorskip("gcsfs")
    with object_store.serving() as served:
        yield served


def run(environment: dict[str, str], *arguments: Any, code: int = 0) -> str:
    surroundings = (
        os.environ
        | environment
        | {
            "XLA_FLAGS": xla.flags(2),
            "PYTHONPATH": str(Path(__file__).parents[1]),
        }
    )
    command = [sys.executable, "-c", "from jax_it.cli import main; main()", *map(str, arguments)]
    done = subprocess.run(command, env=surroundings, text=True, capture_output=True, timeout=600)
    assert done.returncode == code, done.stderr
    return done.stdout + done.stderr


@pytest.mark.slow
def test_a_run_in_a_bucket_goes_on_is_scored_and_exported(
    bucket: tuple[object_store.Store, dict[str, str]], tmp_path: Path
) -> None:
    store, environment = bucket
    recipe = tiny_run.write_recipe(tmp_path / "recipe")
    recipe.write_text(recipe.read_text().replace('"60 steps"', '"8 steps"').replace('"15 steps"', '"4 steps"'))
    train = ["train", "--config", recipe, "--workdir"]
    run(environment, *train, tmp_path / "local")
    run(environment, *train, "gs://runs/tiny")
    wanted = tiny_run.losses(tmp_path / "local")

    def lines() -> list[dict[str, Any]]:
        return [json.loads(line) for line in store.objects["runs/tiny/metrics.jsonl"][0].splitlines()]

    assert [line["loss"] for line in lines()] == [line["loss"] for line in wanted]
    names = {name.removeprefix("runs/tiny/").split("/")[0] for name in store.objects if name.startswith("runs/tiny/")}
    assert {"config.json", "model", "tokenizer", "checkpoints", "metrics.jsonl", "tensorboard"} <= names

    # A byte of the newest checkpoint is lost: it is set aside, and its steps are taken again.
    cut = max(
        (n for n in store.objects if n.startswith("runs/tiny/checkpoints/8/params/")),
        key=lambda n: len(store.objects[n][0]),
    )
    store.objects[cut] = (store.objects[cut][0][:-1], store.objects[cut][1])
    text = run(environment, *train, "gs://runs/tiny")
    assert "gs://runs/tiny/damaged-checkpoint-8, and the run continues from step 4" in text
    assert [line["loss"] for line in lines()] == [line["loss"] for line in wanted]
    assert any(name.startswith("runs/tiny/damaged-checkpoint-8/") for name in store.objects)

    run(environment, "eval", "--workdir", "gs://runs/tiny")
    assert "runs/tiny/eval/8/metrics.json" in store.objects
    text = run(environment, "eval", "--workdir", "gs://runs/tiny", "--follow")
    assert "step 4\n" in text and "2 checkpoints scored, and training has ended" in text
    scored = {
        name.removeprefix("runs/tiny/tensorboard/eval/") for name in store.objects if "/tensorboard/eval/" in name
    }
    assert scored == {f"events.out.tfevents.{step:010d}.scores" for step in (4, 8)}
    assert not any("/followers/" in name for name in store.objects)
    assert "* best by loss: step " in run(environment, "eval", "--workdir", "gs://runs/tiny", "--summary")
    for place, output in ((tmp_path / "local", "a"), ("gs://runs/tiny", "b")):
        run(environment, "export", "--workdir", place, "--output", tmp_path / output)
    exported = [(tmp_path / output / "model.safetensors").read_bytes() for output in ("a", "b")]
    assert exported[0] == exported[1]
    assert "holds a run with config.train.seed=" in run(
        environment, *train, "gs://runs/tiny", "--config.train.seed=5", code=2
    )


@pytest.mark.slow
def test_a_process_sees_what_others_add_to_a_folder(bucket: tuple[object_store.Store, dict[str, str]]) -> None:
    store, environment = bucket
    store.put("runs/growing/1/a", b"")
    script = (
        "from jax_it import files; folder = files.locate('gs://runs/growing'); "
        "[print(*sorted(item.name for item in folder.iterdir()), flush=True) or input() for _ in range(2)]"
    )
    with subprocess.Popen(
        [sys.executable, "-c", script],
        env=os.environ | environment | {"PYTHONPATH": str(Path(__file__).parents[1])},
        text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE,
    ) as process:  # fmt: skip
        assert process.stdin and process.stdout
        assert process.stdout.readline() == "1\n"
        store.put("runs/growing/2/a", b"")
        print(file=process.stdin, flush=True)
        assert process.stdout.readline() == "1 2\n"
        process.communicate("\n")


@pytest.mark.slow
def test_data_in_a_bucket_is_read(bucket: tuple[object_store.Store, dict[str, str]]) -> None:
    store, environment = bucket
    rows = [{"prompt": f"say {i}", "completion": f"word {i}"} for i in range(6)]
    packed = gzip.compress("".join(f"{json.dumps(row)}\n" for row in rows[:2]).encode())
    store.put("data/one/a.jsonl.gz", packed)
    table = io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows[2:4]), table)
    store.put("data/one/b.parquet", table.getvalue())
    store.put("data/one/c.jsonl", "".join(f"{json.dumps(row)}\n" for row in rows[4:]).encode())
    script = (
        "import json, sys; from jax_it.config import Source; from jax_it.data import sources; "
        "print(json.dumps([[record.fields for record in sources.read(Source(path=p), 'p')] for p in sys.argv[1:]]))"
    )
    names = ["gs://data/one/a.jsonl.gz", "gs://data/one/b.parquet", "gs://data/one/*.jsonl"]
    done = subprocess.run(
        [sys.executable, "-c", script, *names],
        env=os.environ | environment | {"PYTHONPATH": str(Path(__file__).parents[1])},
        text=True, capture_output=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout.splitlines()[-1]) == [rows[:2], rows[2:4], rows[4:]]


@pytest.mark.slow
def test_a_run_in_s3_goes_on_and_is_exported(tmp_path: Path) -> None:
    pytest.importorskip("s3fs")
    server = pytest.importorskip("moto.server").ThreadedMotoServer(port=0)
    server.start()
    try:
        url = "http://{}:{}".format(*server.get_host_and_port())
        environment = {
            "AWS_ENDPOINT_URL": url, "AWS_REGION": "us-east-1", "AWS_DEFAULT_REGION": "us-east-1",
            "AWS_ACCESS_KEY_ID": "key", "AWS_SECRET_ACCESS_KEY": "secret", "AWS_EC2_METADATA_DISABLED": "true",
        }  # fmt: skip
        urllib.request.urlopen(urllib.request.Request(f"{url}/runs", method="PUT")).close()  # a bucket
        recipe = tiny_run.write_recipe(tmp_path / "recipe")
        recipe.write_text(recipe.read_text().replace('"60 steps"', '"8 steps"').replace('"15 steps"', '"4 steps"'))
        train = ["train", "--config", recipe, "--workdir"]
        run(environment, *train, tmp_path / "local")
        run(environment, *train, "s3://runs/tiny")
        again = run(environment, *train, "s3://runs/tiny")
        assert "damaged" not in again and "step 8/8" not in again  # it was at its end
        for place, output in ((tmp_path / "local", "a"), ("s3://runs/tiny", "b")):
            run(environment, "export", "--workdir", place, "--output", tmp_path / output)
        exported = [(tmp_path / output / "model.safetensors").read_bytes() for output in ("a", "b")]
        assert exported[0] == exported[1]
    finally:
        server.stop()
