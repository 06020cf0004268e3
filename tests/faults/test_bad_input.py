"""Bad input: one line that says what, where and how to fix it, exit code 2, and nothing lost or half-made."""

import json
import shutil

import jax
import pytest

from jax_it.run_dir import RunDir
from tests.tiny_run import copy, fails, write_rows

GOOD = [{"prompt": f"add {i} and 1", "completion": f"it is {i + 1}"} for i in range(20)]


@pytest.fixture
def refused(capfd, config, tmp_path):
    """`refused(data or None, *options)`: the line with which training is refused; it must leave no folder behind.

    With `command="preview"`, which reads the same and builds no weights, the same in less time.
    """

    def refused(data, *options, command="train"):
        if data is not None:
            file = tmp_path / "data.jsonl"
            file.write_text(data) if isinstance(data, str) else write_rows(file, data)
            options = (f"--config.data.train=[{{'path': '{file}'}}]", *options)
        workdir = ("--workdir", tmp_path / "run") if command == "train" else ()
        line = fails(capfd, command, "--config", config, *workdir, *options)
        assert line.startswith(f"jax-it {command}: ")
        assert not (tmp_path / "run").exists()
        return line

    return refused


def has(line, *parts):
    missing = [part for part in parts if str(part) not in line]
    assert not missing, f"{missing} not in {line!r}"


def test_malformed_json_is_named_with_its_line(refused):
    lines = [json.dumps(row) for row in GOOD]
    lines[16] = '{"prompt": "add'
    has(refused("\n".join(lines)), "data.jsonl, line 17", "not valid JSON", "fix or remove")


def test_a_missing_field_is_named_with_its_line(refused):
    has(refused([*GOOD[:6], {"prompt": "add 6"}]), "data.jsonl, line 7", "'completion'", "its fields: prompt")


def test_an_empty_file_is_named(refused):
    has(refused(""), "data.jsonl", "no records", "config.data.train.0")


def test_a_file_that_does_not_exist_is_named(refused):
    options = ("--config.data.train.0.path=nowhere.jsonl",)
    has(refused(None, *options), "config.data.train.0", "nowhere.jsonl", "does not exist")


def test_a_field_that_a_template_asks_for_in_vain_is_named(refused):
    options = ("--config.data.train.1.template={{question}} ||| {{who}}",)
    has(refused(None, *options), "names.jsonl, line 1", "'question'", "its fields: name, who")


def test_a_template_that_does_not_exist_is_named_with_those_that_do(refused):
    has(refused(None, "--config.data.train.0.template=fancy"), "'fancy'", "alpaca")


def test_data_without_any_target_is_refused_whatever_its_limits(refused):
    rows = [{"prompt": f"add {i}", "completion": ""} for i in range(5)]
    for options in ((), ("--config.data.max_dropped=1",)):
        has(refused(rows, *options, command="preview"), "none of its 5 examples is left", "5 with an empty completion")


def test_a_tokenizer_larger_than_the_embedding_is_refused(refused):
    options = ("--config.model.tokenizer=bytes", "--config.model.tokenizer_size=0")
    has(refused(None, *options), "384 ids", "120 rows", "config.model.tokenizer")


@pytest.mark.parametrize(
    "option, parts",
    [
        ("train.lerning_rate=1", ("config.train.lerning_rate", "is not a setting")),
        ("trian.seed=1", ("'trian'", "did you mean 'train'")),
        ("data.train.7.path=x", ("config.data.train", "'7'")),
        ("train.batch_size=many", ("config.train.batch_size", "whole number", "'many'")),
        ("train.duration=3 years", ("config.train.duration", "'3 years'", "'3 epochs'")),
        ("eval.metrics=rougel", ("'rougel'", "did you mean 'rougeL'")),
        ("mesh.data=3", ("config.mesh", "data=3", "device")),
        ("model.architecture.num_layers=two", ("config.model.architecture", "num_layers", "'two'")),
    ],
)
def test_a_setting_that_cannot_be_is_named(refused, option, parts):
    has(refused(None, f"--config.{option}"), *parts)


def test_a_cache_that_cannot_be_written_is_named(refused):
    options = ("--config.data.cache_dir=/dev/null",)
    has(refused(None, *options, command="preview"), "config.data.cache_dir", "/dev/null")


def test_a_config_file_that_does_not_exist_or_run_is_named(capfd, tmp_path):
    file = tmp_path / "config.py"
    command = ("train", "--config", file, "--workdir", tmp_path / "run")
    has(fails(capfd, *command), file, "does not exist")
    file.write_text("def get_config(arg=''):\n    return undefined")
    has(fails(capfd, *command), file, "undefined")
    file.write_text("import nothing_of_that_name")
    has(fails(capfd, *command), file, "nothing_of_that_name")


@pytest.mark.parametrize("place", ["file", "file/run"])
def test_a_file_in_the_place_of_the_folder_is_named(capfd, config, tmp_path, place):
    (tmp_path / "file").write_text("precious")
    has(fails(capfd, "train", "--config", config, "--workdir", tmp_path / place), tmp_path / place, "--workdir")
    assert (tmp_path / "file").read_text() == "precious"


def tree(folder):
    return {str(file): file.read_bytes() for file in folder.rglob("*") if file.is_file() and file.name != ".lock"}


def test_a_folder_with_a_run_of_another_config_is_refused_and_stays_as_it_is(capfd, config, finished, tmp_path):
    run = copy(finished, tmp_path / "run")
    before = tree(run)
    line = fails(capfd, "train", "--config", config, "--workdir", run, "--config.data.train.0.limit=9")
    has(line, run, "config.data.train.0.limit=0, not 9", "another --workdir")
    assert tree(run) == before


def test_data_that_has_changed_since_the_run_started_is_refused(capfd, config, finished, tmp_path):
    recipe = copy(finished.parent, tmp_path / "tiny")
    run = recipe / "run"
    file = run / "config.json"
    saved = json.loads(file.read_text().replace(str(finished.parent), str(recipe)))
    del saved["checksum"]  # the change is meant
    file.write_text(json.dumps(saved))
    with (recipe / "say.jsonl").open("a") as file:
        file.write('{"prompt": "say red", "completion": "red"}\n')
    before = tree(run)
    line = fails(capfd, "train", "--config", recipe / "config.py", "--workdir", run)
    has(line, "data has changed", run, "another --workdir")
    assert tree(run) == before


@pytest.mark.parametrize("content", ["{", "[]", '{"config": {}}', '{"model_type": "t5"}', ""])
def test_a_config_of_the_run_that_is_damaged_or_another_file_is_named(capfd, config, tmp_path, content):
    (tmp_path / "config.json").write_text(content)
    line = fails(capfd, "train", "--config", config, "--workdir", tmp_path)
    has(line, tmp_path / "config.json", "damaged")
    assert (tmp_path / "config.json").read_text() == content
    has(fails(capfd, "eval", "--workdir", tmp_path), tmp_path / "config.json", "damaged")


def test_a_run_that_another_process_trains_is_refused(capfd, config, finished, tmp_path):
    run = copy(finished, tmp_path / "run")
    with jax.set_mesh(jax.sharding.Mesh(jax.devices()[:1], "x")), RunDir(run).locked():
        line = fails(capfd, "train", "--config", config, "--workdir", run)
    has(line, run, "process ", "wait for it or stop it, or name another --workdir")


@pytest.mark.parametrize("command", ["eval", "export"])
def test_a_folder_without_a_run_or_checkpoint_is_named(capfd, finished, tmp_path, command):
    options = ["--output", tmp_path / "out"] if command == "export" else []
    nowhere = tmp_path / "nowhere"
    has(fails(capfd, command, "--workdir", nowhere, *options), nowhere, "is not a run directory", "jax-it train")
    line = fails(capfd, command, "--workdir", finished, "--checkpoint", 7, *options)
    has(line, "--checkpoint 7", "45, 60, latest or best")
    has(fails(capfd, command, "--workdir", finished, "--checkpoint", "best", *options), finished, "jax-it eval")
    run = copy(finished, tmp_path / "run")
    shutil.rmtree(run / "checkpoints")
    has(fails(capfd, command, "--workdir", run, *options), run, "no checkpoint yet")
    assert not nowhere.exists() and not (tmp_path / "out").exists()


def test_a_run_with_nothing_to_evaluate_on_is_told_where_to_name_it(capfd, finished, tmp_path):
    run = copy(finished, tmp_path / "run")
    saved = json.loads((run / "config.json").read_text())
    del saved["checksum"]  # the change is meant
    saved["config"]["data"]["eval"] = []
    (run / "config.json").write_text(json.dumps(saved))
    has(fails(capfd, "eval", "--workdir", run), run, "config.data.eval", "config.data.validation_size")
    assert not (run / "eval").exists()


def test_a_folder_of_pytorch_weights_is_told_how_to_convert_them(capfd, finished, tmp_path):
    shutil.copy(finished / "model" / "config.json", tmp_path)
    (tmp_path / "pytorch_model.bin").write_bytes(b"\x80")
    line = fails(capfd, "generate", "--model", tmp_path, "--prompt", "add 1 and 1")
    has(line, tmp_path, "pytorch_model.bin", "save_pretrained")


@pytest.mark.parametrize("name", ["nowhere", "a/b/c", "./nowhere"])
def test_a_model_that_is_nowhere_is_named(capfd, name):
    has(fails(capfd, "generate", "--model", name, "--prompt", "add 1 and 1"), name)


def test_a_folder_that_is_no_model_is_named(capfd, tmp_path):
    has(fails(capfd, "generate", "--model", tmp_path, "--prompt", "x"), tmp_path, "config.json is missing")
