"""Adapters of a causal model trained on conversations, by the commands: train, resume, eval, export, generate."""

import dataclasses
import json
import math
import shutil
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from jax_it.pretrained import peft
from tests.parity import cases
from tests.tiny_run import copy, fails, losses, start, succeeds, write_rows

STEPS = 8

TEMPLATE = """{% for message in messages %}{% if message['role'] == 'assistant' -%}
A: {{ message['content'] + eos_token }}{% else %}Q: {{ message['content'] + '\n' }}{% endif %}{% endfor -%}
{% if add_generation_prompt %}A: {% endif %}"""

CONFIG = """
from pathlib import Path

from jax_it.pretrained import peft
from jax_it import config as defaults

HERE = Path(__file__).parent


def get_config(arg=""):
    config = defaults.default()
    config.model.path = str(HERE / "base")
    config.model.tokenizer = "bytes"
    config.model.chat_template = str(HERE / "chat.jinja")
    config.model.lora.rank = 4
    config.model.lora.dropout = 0.1
    config.model.quantize = arg or "none"
    config.data.train = [{"path": str(HERE / "talk.jsonl")}]
    config.data.eval = [{"path": str(HERE / "test.jsonl")}]
    config.data.max_seq_length = 128
    config.data.cache_dir = str(HERE / "cache")
    config.train.duration = "8 steps"
    config.train.batch_size = 4
    config.train.log_every = "1 steps"
    config.train.checkpoint_every = "4 steps"
    config.train.optimizer.learning_rate = 3e-2
    config.train.optimizer.warmup = "25%"
    config.eval.metrics = ["rougeL_chars", "exact_match"]
    config.eval.max_new_tokens = 8
    config.eval.batch_size = 4
    return config
"""


def talk(i: int) -> dict:
    words = ["red", "green", "blue", "pink"]
    turns = [
        ("user", f"say {words[i % 4]}"),
        ("assistant", words[i % 4]),
        ("user", "again"),
        ("assistant", words[i % 4]),
    ]
    return {"messages": [{"role": role, "content": text} for role, text in turns]}


def assert_done(process):
    output = process.communicate()[0]
    assert process.returncode == 0, output


@pytest.fixture(scope="module")
def recipe(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("adapted")
    llama = cases.BY_NAME["llama3"]
    wide = dataclasses.replace(llama, values={**llama.values, "vocab_size": 384})  # the ids of bytes
    cases.write(wide, folder / "base")
    write_rows(folder / "talk.jsonl", [talk(i) for i in range(24)])
    write_rows(folder / "test.jsonl", [talk(i) for i in range(4)])
    (folder / "chat.jinja").write_text(TEMPLATE)
    (folder / "config.py").write_text(CONFIG)
    return folder / "config.py"


@pytest.fixture(scope="module")
def run(recipe) -> Path:
    """A finished run; to be copied by tests that change it."""
    folder = recipe.parent / "run"
    process = start("train", "--config", recipe, "--workdir", folder)
    assert_done(process)
    return folder


def test_checkpoints_hold_adapters_and_their_optimizer_alone(run):
    """Three numbers a trained weight, Adam's two among them: far less than the weights beneath."""
    folder = run / "checkpoints" / str(STEPS)
    found = {}
    for item in ("params", "training"):
        leaves = json.loads((folder / item / "_METADATA").read_text())["tree_metadata"].values()
        found[item] = [leaf["value_metadata"].get("write_shape", []) for leaf in leaves]  # a counter has none
    base = sum(tensor.size for tensor in load_file(run.parent / "base" / "model.safetensors").values())
    adapters = sum(math.prod(shape) for shape in found["params"])
    assert len(found["params"]) == 14 and 0 < adapters < base / 2
    in_optimizer = sum(math.prod(shape) for shape in found["training"])
    assert 2 * adapters <= in_optimizer < 2 * adapters + 10


def test_training_lowers_the_loss(run):
    values = [line["loss"] for line in losses(run)]
    assert len(values) == STEPS and np.mean(values[-2:]) < values[0] - 0.3


def test_a_resumed_run_repeats_the_losses_bit_for_bit(run, recipe, tmp_path):
    again = copy(run, tmp_path / "run")
    shutil.rmtree(again / "checkpoints" / str(STEPS))
    process = start("train", "--config", recipe, "--workdir", again)
    output = process.communicate()[0]
    assert process.returncode == 0 and "steps 5 to 8" in output, output
    assert losses(again) == losses(run)


def test_quantized_weights_are_made_again_and_the_run_resumes_bit_for_bit(recipe, tmp_path):
    config = f"{recipe}:nf4"
    one = start("train", "--config", config, "--workdir", tmp_path / "one")
    assert_done(one)
    two = copy(tmp_path / "one", tmp_path / "two")
    shutil.rmtree(two / "checkpoints" / str(STEPS))
    process = start("train", "--config", config, "--workdir", two)
    assert_done(process)
    assert losses(two) == losses(tmp_path / "one")


def check_same_answers(run, exports, capfd) -> None:
    """The run, its merged export and its adapter give the same texts."""
    asked = write_rows(exports / "in.jsonl", [{"messages": talk(i)["messages"][:3]} for i in range(3)])
    answers = []
    for model in (run, exports / "merged", exports / "adapter"):
        out = exports / f"{model.name}.jsonl"
        succeeds(capfd, "generate", "--model", model, "--input", asked, "--output", out, "--max-new-tokens", 6)
        answers.append([json.loads(line)["prediction"] for line in out.read_text().splitlines()])
    assert answers[0] == answers[1] == answers[2] and any(answers[0])


def test_merged_adapter_and_run_say_the_same_after_a_conversation(run, tmp_path, capfd):
    succeeds(capfd, "export", "--workdir", run, "--output", tmp_path / "merged", "--dtype", "float32")
    succeeds(capfd, "export", "--workdir", run, "--output", tmp_path / "adapter", "--adapter-only")
    assert peft.is_folder(tmp_path / "adapter")
    assert (tmp_path / "merged" / "chat_template.jinja").is_file()
    ends = json.loads((tmp_path / "merged" / "generation_config.json").read_text())["eos_token_id"]
    assert 1 in ends, "the export must stop at what the run was trained to end its answers with"
    check_same_answers(run, tmp_path, capfd)


def test_evaluation_scores_the_adapted_model(run, tmp_path, capfd):
    scored = copy(run, tmp_path / "run")
    shown = succeeds(capfd, "eval", "--workdir", scored)
    values = json.loads((scored / "eval" / str(STEPS) / "metrics.json").read_text())["all"]
    assert values["n"] == 4 and 0 < values["loss"] < losses(run)[0]["loss"]
    assert "rougeL_chars" in shown


def test_other_weights_beneath_the_adapters_are_refused(run, recipe, tmp_path, capfd):
    base = recipe.parent / "base" / "model.safetensors"
    kept = base.read_bytes()
    tensors = load_file(base)
    tensors["model.norm.weight"] = tensors["model.norm.weight"] + 1
    try:
        save_file(tensors, base, metadata={"format": "pt"})
        message = fails(capfd, "export", "--workdir", run, "--output", tmp_path / "out")
    finally:
        base.write_bytes(kept)
    assert "have changed since the run in" in message and not (tmp_path / "out").exists()


def test_a_run_of_all_weights_has_no_adapter_to_export(recipe, tmp_path, capfd):
    full = tmp_path / "full"
    overrides = ["--config.model.lora.rank=0", "--config.model.lora.dropout=0", "--config.train.duration=1 steps"]
    process = start("train", "--config", recipe, "--workdir", full, *overrides)
    assert_done(process)
    message = fails(capfd, "export", "--workdir", full, "--output", tmp_path / "out", "--adapter-only")
    assert "trained all weights; export it without --adapter-only" in message


def test_what_no_adapter_can_use_is_refused_by_name(recipe, tmp_path, capfd):
    def refuses(*settings):
        overrides = [f"--config.{setting}" for setting in settings]
        return fails(capfd, "train", "--config", recipe, "--workdir", tmp_path / "run", *overrides)

    none = ("model.lora.rank=0", "model.lora.dropout=0")
    assert "config.model.quantize is for frozen weights" in refuses(*none, "model.quantize=nf4")
    assert "config.model.lora.dora has no effect" in refuses(*none, "model.lora.dora=True")
    assert "config.model.lora.rank has no effect" in refuses("model.lora.path=some/adapter")
    assert "config.model.prefix_lm needs data.train_on='last'" in refuses("model.prefix_lm=True")
    assert "config.train.router_aux_loss_coef is for mixtures" in refuses("train.router_aux_loss_coef=0.1")
    assert not (tmp_path / "run").exists()


def test_new_tokens_are_trained_saved_resumed_and_exported(recipe, tmp_path, capfd):
    run = tmp_path / "run"
    tokens = '--config.model.new_tokens=["say", "again"]'
    given = ("train", "--config", recipe, "--config.train.duration=4 steps", "--config.train.checkpoint_every=2 steps")
    succeeds(capfd, *given, "--workdir", run, tokens)
    first = losses(run)
    shutil.rmtree(run / "checkpoints" / "4")
    succeeds(capfd, *given, "--workdir", run, tokens)
    assert losses(run) == first
    message = fails(capfd, *given, "--workdir", run, '--config.model.new_tokens=["say"]')
    assert "holds a run with config.model.new_tokens" in message

    succeeds(capfd, "export", "--workdir", run, "--output", tmp_path / "merged", "--dtype", "float32")
    succeeds(capfd, "export", "--workdir", run, "--output", tmp_path / "adapter", "--adapter-only")
    assert json.loads((tmp_path / "merged" / "config.json").read_text())["vocab_size"] == 386
    indices = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())["trainable_token_indices"]
    assert indices == {"model.embed_tokens": [384, 385], "lm_head": [384, 385]}
    tensors = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    rows = tensors["base_model.model.model.embed_tokens.token_adapter.trainable_tokens_delta"]
    before = load_file(recipe.parent / "base" / "model.safetensors")["model.embed_tokens.weight"]
    assert np.abs(rows - before.mean(0)).max(1).min() > 1e-3, "both rows must have been trained, from the mean on"
    np.testing.assert_array_equal(
        load_file(tmp_path / "merged" / "model.safetensors")["model.embed_tokens.weight"],
        np.concatenate([before, rows]),
    )

    check_same_answers(run, tmp_path, capfd)
    succeeds(capfd, "eval", "--workdir", run)


@pytest.mark.parametrize(
    "tokens, message",
    [
        ('["<a>", "<a>"]', "config.model.new_tokens.1: '<a>' is listed twice; leave one out"),
        ('["<a>", " "]', "config.model.new_tokens.1: ' ' is blank; leave it out"),
        ('["</s>"]', "config.model.new_tokens.0: '</s>' is in the vocabulary already, as token 1; leave it out"),
    ],
)
def test_a_token_that_cannot_be_added_is_refused(tokens, message, recipe, tmp_path, capfd):
    overrides = [f"--config.model.new_tokens={tokens}"]
    assert message in fails(capfd, "train", "--config", recipe, "--workdir", tmp_path / "run", *overrides)
    assert not (tmp_path / "run").exists()
