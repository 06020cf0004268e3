"""A run's folder: what it takes for the same run, which checkpoint it chooses, and what it makes of damage."""

import dataclasses
import json
import os
import shutil
from pathlib import Path

import jax
import numpy as np
import pytest

from jax_it import config as settings
from jax_it import pretrained
from jax_it.config import Mesh
from jax_it.data import tokenizer_files as tokenizers
from jax_it.data.packing import Layout, Shape
from jax_it.errors import Interrupted, UserError
from jax_it.files import write_atomically
from jax_it.models import build
from jax_it.models.lora import Adapter, Target
from jax_it.pretrained.folder import fingerprint
from jax_it.pretrained.safetensors import SINGLE
from jax_it.resolved_run import ResolvedRun
from jax_it.run import load, open_run
from jax_it.run_dir import FORMAT, PARTS, RunDir
from jax_it.sharding import make_mesh
from tests import tiny_run
from tests.parity import cases

TREE = {
    "model": {
        "pretrained": False,
        "tokenizer": "bytes",
        "architecture": {"model_type": "t5", "vocab_size": 384, "d_model": 8, "d_kv": 4, "d_ff": 8, "num_layers": 1},
    },
    "data": {"train": [{"path": "a.jsonl"}, {"path": "b.jsonl", "template": ["{{x}} ||| {{y}}"]}]},
    "train": {"duration": "1234567 steps"},
}
RESOLVED = ResolvedRun(Layout(Shape(2, 32, 40), 7, 3.5, 0.75, 0.875), True, 100, "digest", False)


def resolve(**changes):
    tree = json.loads(json.dumps(TREE))
    for name, value in changes.items():
        *sections, field = name.split("__")
        node = tree
        for section in sections:
            node = node[int(section)] if section.isdigit() else node.setdefault(section, {})
        node[field] = value
    return settings.resolve(tree)


def write_metrics(run_dir, step, **overall):
    run_dir.eval(step).mkdir(parents=True, exist_ok=True)
    (run_dir.eval(step) / "metrics.json").write_text(json.dumps({"all": overall}))


@pytest.fixture
def run_dir(tmp_path):
    """A run's folder, with checkpoints of steps 3, 5 and 10 by name alone."""
    run_dir, config = RunDir(tmp_path / "run"), resolve()
    assert not run_dir.holds_a_run()
    model = build(config.model.architecture, "the test", config.model)
    run_dir.create(config, RESOLVED, model, tokenizers.load("bytes"))
    for step in (3, 5, 10):
        (run_dir.path / "checkpoints" / str(step)).mkdir(parents=True)
    return run_dir


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    return tiny_run.finished(tmp_path_factory)


def test_what_was_created_is_opened_again(run_dir):
    assert run_dir.holds_a_run()
    config, resolved = run_dir.open()
    assert resolved == RESOLVED
    assert config == resolve()
    run_dir.check_same(resolve())
    saved = json.loads((run_dir.path / "config.json").read_text())
    assert {"python", "jax", "flax", "optax", "orbax-checkpoint"} <= saved["versions"].keys()
    assert run_dir.tokenizer().encode(["text"]) == tokenizers.load("bytes").encode(["text"])
    assert run_dir.model(config, resolved).config.vocab_size == 384 and not run_dir.model(config, resolved).config.tied


def test_what_says_which_weights_are_trained_is_read_back(run_dir):
    targets = (Target("encoder.layers.attention.query", 4, 2.0), Target("decoder.layers.mlp.down", 8, 0.5**0.5))
    resolved = dataclasses.replace(RESOLVED, adapter=Adapter(targets, True, 0.1), base_digest="of files")
    config = resolve()
    run_dir.create(config, resolved, run_dir.model(config, RESOLVED), tokenizers.load("bytes"))
    assert run_dir.open() == (config, resolved)
    assert (
        run_dir.model(config, resolved).adapter == resolved.adapter and run_dir.model(config, RESOLVED).adapter is None
    )


def test_a_run_of_a_version_that_took_settings_without_effect_opens_and_goes_on_without_them(tmp_path):
    now = resolve()
    optimizer = dataclasses.replace(now.train.optimizer, decay=settings.Duration(5, "steps"))
    then = dataclasses.replace(
        now,
        train=dataclasses.replace(now.train, squared_error_scale=2.0, optimizer=optimizer),
        data=dataclasses.replace(now.data, max_seq_length=64),  # of an encoder-decoder
        eval=dataclasses.replace(now.eval, length_penalty=2.0),
    )
    run_dir = RunDir(tmp_path / "old")
    run_dir.create(then, RESOLVED, build(now.model.architecture, "the test", now.model), tokenizers.load("bytes"))
    assert run_dir.open()[0] == dataclasses.replace(now, data=then.data)
    run_dir.check_same(now)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"train__seed": 1}, "config.train.seed=0, not 1"),
        ({"train__optimizer__learning_rate": 1.0}, "config.train.optimizer.learning_rate=0.0003, not 1.0"),
        ({"train__duration": "1234568 steps"}, "config.train.duration="),
        ({"data__train__0__path": "c.jsonl"}, "config.data.train.0.path='a.jsonl', not 'c.jsonl'"),
        ({"data__train__1__template": ["alpaca"]}, "config.data.train.1.template.0='{{x}} ||| {{y}}', not 'alpaca'"),
        ({"data__train__1__template": ["{{x}} ||| {{y}}", "auto"]}, "config.data.train.1.template.1=None, not 'auto'"),
        ({"data__train": [{"path": "a.jsonl"}]}, "config.data.train.1"),
        ({"model__architecture__d_model": 16}, "config.model.architecture.d_model=8, not 16"),
        ({"model__architecture__dropout_rate": 0.5}, "config.model.architecture.dropout_rate=None, not 0.5"),
        ({"model__dropout": 0.5}, "config.model.dropout=None, not 0.5"),
        ({"model__lora": {"rank": 2}}, "config.model.lora.rank=0, not 2"),
    ],
)
def test_another_config_is_refused_and_the_field_that_differs_is_named(run_dir, changes, message):
    with pytest.raises(UserError) as error:
        run_dir.check_same(resolve(**changes))
    line = str(error.value)
    assert f"{run_dir.path} holds a run with {message}" in line
    assert line.endswith("continue with its config, or name another --workdir")


@pytest.mark.parametrize(
    "changes",
    [
        {"mesh__tensor": 2},
        {"eval__metrics": ["bleu"], "eval__every": "5 steps"},
        {"data__cache_dir": "/elsewhere"},
        {"model__remat": "layer"},
        {"train__gradient_accumulation_steps": 4, "train__loss_chunk": 64},
        {"train__log_every": "1 steps", "train__checkpoint_every": "1 epochs"},
        {"train__max_to_keep": 9, "train__keep_best": 0, "train__max_skipped": 1},
    ],
)
def test_what_does_not_change_the_losses_may_change(run_dir, changes):
    assert run_dir.check_same(resolve(**changes)) == {}


def test_the_model_of_a_resumed_run_is_computed_as_its_config_now_says(run_dir):
    _, resolved = run_dir.open()
    assert not run_dir.model(resolve(), resolved).options.remat
    assert run_dir.model(resolve(model__remat="layer"), resolved).options.remat


def test_the_latest_the_best_or_a_numbered_checkpoint_is_chosen(run_dir):
    write_metrics(run_dir, 3, loss=2.0, rougeL=50.0)
    write_metrics(run_dir, 5, loss=1.0, rougeL=40.0)
    write_metrics(run_dir, 7, loss=0.5, rougeL=99.0)  # its checkpoint is gone
    assert run_dir.choose_step("latest", "loss") == 10
    assert run_dir.choose_step("best", "loss") == 5
    assert run_dir.choose_step("best", "rougeL") == 3
    write_metrics(run_dir, 3, ter=40.0)
    write_metrics(run_dir, 5, ter=30.0)
    assert run_dir.choose_step("best", "ter") == 5  # fewer edits are better
    write_metrics(run_dir, 3, loss=2.0)
    write_metrics(run_dir, 5, loss=1.0)
    assert run_dir.choose_step("3", "loss") == 3


@pytest.mark.parametrize("which", ["7", "-3", "newest", "", "3.0", "³", "3" * 5000])
def test_a_checkpoint_that_is_not_there_is_refused_with_those_that_are(run_dir, which):
    with pytest.raises(UserError, match=r"choose 3, 5, 10, latest or best"):
        run_dir.choose_step(which, "loss")


def test_without_a_score_there_is_no_best_checkpoint(run_dir):
    for content in (None, "", "{", "[]", '{"all": {}}', '{"all": {"loss": NaN}}', '{"all": {"loss": null}}'):
        if content is not None:
            run_dir.eval(5).mkdir(parents=True, exist_ok=True)
            (run_dir.eval(5) / "metrics.json").write_text(content)
        assert run_dir.scores("loss")(5) is None
        with pytest.raises(UserError, match=r"no checkpoint of .* has a score \(loss\); run jax-it eval first"):
            run_dir.choose_step("best", "loss")


def test_the_only_checkpoint_that_has_a_score_is_not_taken_for_the_best(run_dir):
    write_metrics(run_dir, 10, loss=1.0)
    with pytest.raises(
        UserError, match=r"only checkpoint 10 of .* has a score \(loss\), so none is known to be the best"
    ):
        run_dir.choose_step("best", "loss")


@pytest.mark.parametrize(
    "content", ["", "{", "null", "[1]", "{}", '{"config": {}, "resolved": {"layout": {}}, "format": 3}']
)
def test_a_damaged_config_is_named(run_dir, content):
    (run_dir.path / "config.json").write_text(content)
    with pytest.raises(
        UserError, match=r"run/config.json is damaged or does not belong to a run .*name another --workdir"
    ):
        run_dir.open()


def test_a_config_with_a_setting_of_another_version_is_named(run_dir):
    saved = json.loads((run_dir.path / "config.json").read_text())
    del saved["checksum"]  # the change is meant
    saved["config"]["train"]["momentum"] = 0.9
    (run_dir.path / "config.json").write_text(json.dumps(saved))
    with pytest.raises(UserError, match=r"run/config.json: config.train.momentum is not a setting"):
        run_dir.open()


def test_a_config_that_was_changed_is_refused_unless_the_change_is_meant(run_dir):
    file = run_dir.path / "config.json"
    text = file.read_text().replace('"total_steps": 100', '"total_steps": 101')
    file.write_text(text)
    with pytest.raises(UserError, match=r"run/config.json has been changed .*restore it, or delete the checksum line"):
        run_dir.open()
    file.write_text(json.dumps({key: value for key, value in json.loads(text).items() if key != "checksum"}))
    assert run_dir.open()[1].total_steps == 101


def loop(path):
    path.symlink_to(path)


@pytest.mark.parametrize("make, reason", [(Path.mkdir, "Is a directory"), (loop, "symbolic"), (os.mkfifo, "Not a reg")])
def test_what_stands_in_the_place_of_a_config_is_named(run_dir, make, reason):
    (run_dir.path / "config.json").unlink()
    make(run_dir.path / "config.json")
    assert run_dir.holds_a_run()
    with pytest.raises(UserError, match=rf"run/config.json cannot be read: .*{reason}.*; restore it"):
        run_dir.open()


@pytest.mark.parametrize("part", ["model/config.json", "tokenizer/tokenizer_config.json"])
def test_a_part_that_was_lost_or_changed_is_named(run_dir, part):
    config, resolved = run_dir.open()
    file = run_dir.path / part
    content = file.read_text()
    read = {"model": lambda: run_dir.model(config, resolved), "tokenizer": run_dir.tokenizer}[file.parent.name]
    file.write_text(content.replace(" ", "  ", 1))
    with pytest.raises(UserError, match=rf"{part} is not the file that the run was started with; restore it"):
        read()
    file.unlink()
    with pytest.raises(UserError, match=rf"{part} cannot be read"):
        read()
    os.mkfifo(file)
    with pytest.raises(UserError, match=rf"{part} cannot be read \(Not a regular file\)"):
        read()
    file.unlink()
    file.write_text(content)
    read()


@pytest.mark.parametrize("left", [*PARTS])
def test_a_folder_with_a_part_of_a_run_and_no_config_is_refused(run_dir, left):
    for item in run_dir.path.iterdir():
        item.unlink() if item.is_file() else shutil.rmtree(item)
    (run_dir.path / left).mkdir() if PARTS[left] else (run_dir.path / left).touch()
    for refusing in (run_dir.check_new, run_dir.open):
        with pytest.raises(
            UserError, match=rf"contains parts of a run \({left}\) but no config.json; restore it from a backup"
        ):
            refusing()


def test_what_a_start_that_was_killed_has_left_is_no_run_and_is_made_again(tmp_path, monkeypatch):
    run_dir, config = RunDir(tmp_path / "run"), resolve()
    model, tokenizer = build(config.model.architecture, "the test", config.model), tokenizers.load("bytes")

    def killed(file, content):
        if file.name == "config.json" and file.parent == run_dir.path:
            shutil.copytree(run_dir.path, tmp_path / "left")
            raise KeyboardInterrupt
        write_atomically(file, content)

    monkeypatch.setattr("jax_it.run_dir.write_atomically", killed)
    with pytest.raises(KeyboardInterrupt):
        run_dir.create(config, RESOLVED, model, tokenizer)
    assert not list(run_dir.path.iterdir())
    monkeypatch.undo()
    left = RunDir(tmp_path / "left")
    (left.path / "tokenizer" / "chat_template.jinja").write_text("of another tokenizer")
    assert not left.holds_a_run()
    left.check_new()
    left.create(config, RESOLVED, model, tokenizer)
    assert left.open() == (config, RESOLVED) and left.tokenizer().chat_template is None
    assert sorted(item.name for item in left.path.iterdir()) == ["config.json", "model", "tokenizer"]


def test_a_file_in_the_place_of_a_folder_is_named_before_a_run_goes_on(run_dir):
    run_dir.check_parts()
    (run_dir.path / "eval").touch()
    with pytest.raises(UserError, match=r"run/eval is not a folder; remove it"):
        run_dir.check_parts()
    (run_dir.path / "eval").unlink()
    for make in (Path.mkdir, os.mkfifo, loop):
        make(run_dir.path / "ended.json")
        with pytest.raises(UserError, match=r"run/ended.json is not a regular file; remove it"):
            run_dir.check_parts()
        with pytest.raises(UserError, match=r"run/ended.json is damaged"):
            run_dir.ended()
        shutil.rmtree(run_dir.path / "ended.json") if make is Path.mkdir else (run_dir.path / "ended.json").unlink()


@pytest.mark.parametrize(
    "error, came_to, kept",
    [
        (KeyError, "checkpoints/3/x", True),
        (KeyError, "metrics.jsonl", True),
        (KeyError, "eval/0/metrics.json", True),
        (Interrupted, "", True),
        (KeyError, "", False),
        (UserError, "", False),
    ],
)
def test_a_new_run_that_fails_before_its_first_step_leaves_nothing(tmp_path, error, came_to, kept):
    run_dir, config = RunDir(tmp_path), resolve()
    model, tokenizer = build(config.model.architecture, "the test", config.model), tokenizers.load("bytes")
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(error), run_dir.locked():
        run_dir.create(config, RESOLVED, model, tokenizer)
        (tmp_path / "checkpoints").mkdir()
        (tmp_path / "metrics.jsonl").touch()
        if came_to:
            (tmp_path / came_to).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / came_to).write_text('{"step": 1}\n')
        raise error("no")
    assert run_dir.holds_a_run() == kept
    assert kept or [item.name for item in tmp_path.iterdir()] == ["notes.txt"]
    if kept:
        with pytest.raises(KeyError), run_dir.locked():  # it was there before
            shutil.rmtree(tmp_path / "checkpoints")
            raise KeyError
        assert run_dir.holds_a_run()


@pytest.mark.parametrize("content", ['{"step": 1e999}', "[]", '{"step": "3"}', "", "\0", '{"step": null}', "{}"])
def test_a_damaged_end_is_named(run_dir, content):
    assert run_dir.ended() is None
    (run_dir.path / "ended.json").write_text(content)
    with pytest.raises(UserError, match=r"run/ended.json is damaged, so it does not say whether training has ended"):
        run_dir.ended()


def test_lines_of_the_log_that_cannot_be_read_are_removed_with_a_word(run_dir, capfd):
    lines = [f'{{"step": {step}}}\n' for step in range(1, 6)]
    for bad in ("\0\1\n", '{"step": "2"}\n', '{"step": NaN}\n', "[" * 100_000 + "\n"):
        run_dir.metrics.write_text("".join([lines[0], bad, *lines[2:]]))
        run_dir.rewind_metrics(4)
        assert run_dir.metrics.read_text() == "".join([lines[0], *lines[2:4]])
        assert f"1 lines of {run_dir.metrics} cannot be read; they are removed" in capfd.readouterr().err
    run_dir.rewind_metrics(0)
    assert "has logged steps and no checkpoint; the run starts over" in capfd.readouterr().err


def test_a_folder_is_locked_once_and_free_again_after(run_dir):
    with run_dir.locked():
        for _ in range(2):  # the one that was refused has taken nothing away
            with pytest.raises(UserError, match=r"process \d+ on .* trains in .*run; wait for it or stop it"):
                run_dir.locked().__enter__()
    with run_dir.locked():
        pass
    assert run_dir.holds_a_run()


def test_a_folder_that_has_become_no_run_is_left_as_it_was_found(tmp_path):
    with pytest.raises(KeyError), RunDir(tmp_path / "new").locked():
        raise KeyError
    assert not (tmp_path / "new").exists()
    (tmp_path / "notes.txt").write_text("mine")
    with RunDir(tmp_path).locked():
        pass
    assert [file.name for file in tmp_path.iterdir()] == ["notes.txt"]


def test_a_run_that_could_not_be_made_leaves_nothing(tmp_path, monkeypatch):
    config = resolve()
    model = build(config.model.architecture, "the test", config.model)
    tokenizer = tokenizers.load("bytes")

    def full(folder):  # as the tokenizers library says it
        raise Exception("No space left on device (os error 28)")

    monkeypatch.setattr(tokenizer, "save", full)
    with pytest.raises(UserError, match=r"cannot write to .*: No space left on device; free space or name another"):
        RunDir(tmp_path).create(config, RESOLVED, model, tokenizer)
    assert not list(tmp_path.iterdir())


def test_the_newest_checkpoint_of_a_run_is_loaded_sharded_over_all_devices(finished):
    _, params, tokenizer = load(str(finished))
    run_dir = RunDir(finished)
    mesh = make_mesh(Mesh(), jax.devices()[:1])
    expected = dataclasses.replace(open_run(run_dir), mesh=mesh).load_params(tiny_run.STEPS)
    jax.tree.map(np.testing.assert_array_equal, params, expected)
    assert all(len(leaf.sharding.device_set) == jax.device_count() for leaf in jax.tree.leaves(params))
    assert tokenizer.digest() == run_dir.tokenizer().digest()


def test_a_run_without_a_checkpoint_is_not_taken_for_a_model(run_dir):
    for step in (3, 5, 10):
        (run_dir.path / "checkpoints" / str(step)).rmdir()
    with pytest.raises(UserError, match="has no checkpoint yet"):
        load(str(run_dir.path))
    (run_dir.path / "checkpoints").rmdir()
    with pytest.raises(UserError, match="has no checkpoint yet"):
        load(str(run_dir.path))


def test_frozen_values_are_saved_as_they_are(run_dir):
    """JSON has no tuples; what is read back must still equal the config that was resolved."""
    assert dataclasses.asdict(run_dir.open()[0]) == dataclasses.asdict(resolve())


@pytest.fixture
def adapted(tmp_path):
    """(folder of the base model, the run's folder, config, model) of a run that trains adapters."""
    base = cases.write(cases.BY_NAME["t5_1_1"], tmp_path / "base")
    config = resolve(model__path=str(base), model__architecture={}, model__pretrained=True, model__lora={"rank": 2})
    run_dir = RunDir(tmp_path / "run")
    model = pretrained.load_model(config.model)
    resolved = dataclasses.replace(RESOLVED, adapter=model.adapter, base_digest=fingerprint(base))
    run_dir.create(config, resolved, model, tokenizers.load("bytes"))
    return base, run_dir, config, model


def test_the_weights_beneath_adapters_are_read_from_the_base_model(adapted):
    base, run_dir, config, model = adapted
    mesh = make_mesh(Mesh(), jax.devices()[:1])
    run = dataclasses.replace(open_run(run_dir), mesh=mesh)
    frozen = run.load_frozen()
    jax.tree.map(np.testing.assert_array_equal, frozen, cases.load(base)[1])
    assert dataclasses.replace(run, model=dataclasses.replace(model, adapter=None)).load_frozen() == {}
    trained = jax.jit(model.init_adapter)(jax.random.key(0), frozen)
    with run_dir.writing_checkpoints(config) as checkpoints:
        checkpoints.save(3, trained, {"step": np.int32(3)}, {"step": 3})
    params = run.load_params(3)
    jax.tree.map(np.testing.assert_array_equal, params, model.join(trained, frozen))


def test_a_base_model_with_other_weights_than_the_run_was_started_from_is_refused(adapted):
    base, run_dir, _, _ = adapted
    file = Path(base) / SINGLE
    content = bytearray(file.read_bytes())
    content[-7] ^= 1
    file.write_bytes(content)
    with pytest.raises(UserError) as error:
        open_run(run_dir).load_frozen()
    line = str(error.value)
    assert str(base) in line and f"have changed since the run in {run_dir.path} was started; restore them" in line


def test_a_run_of_another_format_is_refused_by_its_file(run_dir):
    file = run_dir.path / "config.json"
    saved = json.loads(file.read_text())
    del saved["checksum"]
    for change in ({"format": FORMAT + 1}, {"format": None}):
        file.write_text(json.dumps(saved | change))
        with pytest.raises(UserError, match=rf"^{file} has format \S+, .*; continue or export the run"):
            run_dir.open()
    del saved["format"]  # a run that was started before there were formats
    file.write_text(json.dumps(saved))
    with pytest.raises(UserError, match=f"has format 1, and this version of jax_it reads format {FORMAT}"):
        run_dir.open()
