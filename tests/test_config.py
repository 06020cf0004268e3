import dataclasses
import json
import math
import os
import re
import types
import typing
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

import ml_collections
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jax_it import config as settings
from jax_it.config import Config, Duration, Rates
from jax_it.errors import UserError


def tree(**changes: Any) -> dict[str, Any]:
    """The smallest config that resolves, as `resolve` takes it, with changes such as train__seed=1."""
    made: dict[str, Any] = {"model": {"path": "some/model"}, "data": {"train": [{"path": "train.jsonl"}]}}
    for name, value in changes.items():
        *parents, last = name.split("__")
        node: Any = made
        for key in parents:
            node = node[int(key)] if isinstance(node, list) else node.setdefault(key, {})
        node[last] = value
    return made


def refusal(**changes: Any) -> str:
    with pytest.raises(UserError) as caught:
        settings.resolve(tree(**changes))
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "tiny.py"
    path.write_text(
        "from jax_it import config as defaults\n"
        "def get_config(arg=''):\n"
        "    config = defaults.default()\n"
        "    config.model.path = arg or 'some/model'\n"
        "    config.data.train = [{'path': 'a.jsonl'}, {'path': 'b.jsonl', 'limit': 3}]\n"
        "    return config\n"
    )
    return path


# Types


def leaves(kind: type, prefix: str) -> Iterator[tuple[str, Any]]:
    """Every setting and its declared type, found without the code under test."""
    for name, hint in typing.get_type_hints(kind).items():
        path = f"{prefix}__{name}".removeprefix("__")
        if dataclasses.is_dataclass(hint) and hint is not Duration:
            yield path, hint
            yield from leaves(typing.cast(type, hint), path)
        elif typing.get_origin(hint) is tuple and dataclasses.is_dataclass(typing.get_args(hint)[0]):
            yield path, hint
            yield from leaves(typing.get_args(hint)[0], f"{path}__0")
        else:
            yield path, hint


LEAVES = dict(leaves(Config, ""))


def wrong_values(hint: Any) -> list[Any]:
    origin = typing.get_origin(hint)
    if hint is Duration:
        return ["soon", [], None, "-1 steps", {}]
    if origin is Literal:
        return ["nonsense", 5, None]
    if origin is tuple:
        return [5, {"a": 1}, None, [None]]
    if origin is Mapping or dataclasses.is_dataclass(hint):
        return [5, "text", [1], None]
    if origin is types.UnionType:
        return ["text", True, math.inf]
    return {
        str: [5, None, ["text"], True],
        int: ["text", 1.5, None, True, "1.5", [1]],
        float: ["text", None, True, math.nan, math.inf, "1e999"],
        bool: ["maybe", 1, 0, None, "1"],
    }[hint]


@pytest.mark.parametrize("name", LEAVES)
def test_a_value_of_the_wrong_type_is_refused_with_the_name_of_the_field(name):
    data = settings.Data((settings.Source(),), (settings.Source(),))
    full = settings.to_dict(Config(data=data, eval=settings.Eval(tasks=(settings.Task(),))))
    for value in wrong_values(LEAVES[name]):
        changed = json.loads(json.dumps(full))
        *parents, last = name.split("__")
        node = changed
        for key in parents:
            node = node[int(key) if key.isdigit() else key]
        node[last] = value
        with pytest.raises(UserError, match=re.escape(f"config.{name.replace('__', '.')}")):
            settings.resolve(changed)


def test_every_setting_has_a_section_a_type_and_a_default():
    assert len(LEAVES) > 80
    # Sources and tasks are the only things whose fields a default config does not show.
    shown = [name for name in LEAVES if "__0" not in name]
    default = settings.default()
    for name in shown:
        node = default
        for key in name.split("__"):
            node = node[key]


def test_whole_numbers_stand_for_floats_and_whole_floats_for_ints():
    config = settings.resolve(tree(train__max_grad_norm=2, train__batch_size=1e2))
    assert (config.train.max_grad_norm, config.train.batch_size) == (2.0, 100)
    assert type(config.train.max_grad_norm) is float and type(config.train.batch_size) is int


def test_dataclasses_are_checked_like_dicts():
    made = tree(data__train=[settings.Source(path="a.jsonl", weight=typing.cast(Any, "much"))])
    with pytest.raises(UserError, match=r"config\.data\.train\.0\.weight: expected a number, got 'much'"):
        settings.resolve(made)
    with pytest.raises(UserError, match=r"config\.data: expected a section with fields"):
        settings.resolve({"data": settings.Model()})


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"train__lerning_rate": 1}, "config.train.lerning_rate is not a setting; it has: duration, batch_size"),
        ({"train__clip": 1}, "config.train.clip is not a setting; did you mean 'max_grad_norm'?"),  # its former name
        ({"data__train__0__listed": "a"}, "config.data.train.0.listed is not a setting; did you mean 'file_list'?"),
        ({"train__batchsize": 1}, "config.train.batchsize is not a setting; did you mean 'batch_size'?"),
        ({"trian": {}}, "config.trian is not a setting; did you mean 'train'?"),
        ({"data__train__0__tempalte": "auto"}, "config.data.train.0.tempalte is not a setting; did you mean 'temp"),
        ({"train__optimizer__beta_1": 1}, "config.train.optimizer.beta_1 is not a setting; did you mean 'beta1'?"),
        ({"model__5": 1}, "config.model.5 is not a setting; it has: path, pretrained"),
    ],
)  # fmt: skip
def test_an_unknown_key_is_refused_with_a_suggestion(changes, message):
    assert refusal(**changes).startswith(message)


def test_a_choice_that_does_not_exist_is_refused_with_those_that_do():
    assert refusal(train__loss="l2") == "config.train.loss: 'l2' is not one of 'cross_entropy', 'squared_error'"


@pytest.mark.parametrize("name", [name for name, hint in LEAVES.items() if hint in (int, float, float | None)])
def test_every_number_has_a_range_and_what_lies_outside_is_refused_with_its_limit(name):
    data = settings.Data((settings.Source(),), (settings.Source(),))
    full = settings.to_dict(Config(data=data, eval=settings.Eval(tasks=(settings.Task(),))))
    for value in (-(10**40), 10**400, 10**5000, 1e300, "9" * 400, "9" * 5000):
        changed = json.loads(json.dumps(full))
        *parents, last = name.split("__")
        node = changed
        for key in parents:
            node = node[int(key) if key.isdigit() else key]
        node[last] = value
        where = re.escape(f"config.{name.replace('__', '.')}: ")
        with pytest.raises(UserError, match=f"^{where}.*(must be|expected|not a finite)") as caught:
            settings.resolve(changed)
        assert len(str(caught.value)) < 400


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"train__batch_size": 10**12}, "train.batch_size: 1000000000000 must be at most 1048576"),
        ({"train__seed": 2**32}, "train.seed: 4294967296 must be at most 4294967295"),
        ({"train__seed": 10**400}, "train.seed: a number of 401 digits must be at most 4294967295"),
        ({"data__seed": 2**63}, "data.seed: 9223372036854775808 must be at most 9223372036854775807"),
        ({"model__dropout": 0.9999}, "model.dropout: 0.9999 must be 0 or in [0.0001, 0.99]"),
        ({"model__dropout": 1e-9}, "model.dropout: 1e-09 must be 0 or in [0.0001, 0.99]"),
        ({"model__lora": {"rank": 4, "dropout": 2}}, "model.lora.dropout: 2.0 must be 0 or in [0.0001, 0.99]"),
        ({"model__lora": {"rank": 4, "alpha": 0}}, "model.lora.alpha: 0.0 must be more than 0"),
        ({"model__lora": {"rank": 4, "alpha": -3}}, "model.lora.alpha: -3.0 must be more than 0"),
        ({"model__lora": {"rank": -4}}, "model.lora.rank: -4 must be at least 0"),
        (
            {"train__optimizer__learning_rate": 1e-300},
            "train.optimizer.learning_rate: 1e-300 must be 0 or at least 1.2",
        ),
        ({"train__optimizer__learning_rate": 1e39}, "train.optimizer.learning_rate: 1e+39 must be at most 3e+38"),
        ({"train__optimizer__epsilon": 0}, "train.optimizer.epsilon: 0.0 must be more than 0"),
        ({"train__step_timeout": 1e-9}, "train.step_timeout: 1e-09 must be 0 or at least 1"),
        (
            {"train__gradient_accumulation_steps": 9, "train__batch_size": 8},
            "train.gradient_accumulation_steps: 9 is more than train.batch_size, 8",
        ),
        ({"eval__min_new_tokens": 200}, "eval.min_new_tokens: 200 is more than data.max_target_length, 128"),
        (
            {"eval__min_new_tokens": 9, "eval__max_new_tokens": 8},
            "eval.min_new_tokens: 9 is more than eval.max_new_tok",
        ),
        (
            {"train__duration": "1e300 epochs"},
            "train.duration: '1e300 epochs' is too large; the maximum is 1e+18",
        ),
    ],
)
def test_a_number_that_would_hang_crash_or_do_nothing_is_refused_with_its_limit(changes, message):
    assert refusal(**changes).startswith(f"config.{message}")


@pytest.mark.parametrize(
    "changes, message",
    [
        (
            {"train__optimizer": {"name": "adafactor", "beta1": 0.5}},
            "train.optimizer.beta1 has no effect with optimizer",
        ),
        (
            {"train__optimizer": {"name": "adafactor", "beta2": 0.5}},
            "train.optimizer.beta2 has no effect with optimizer",
        ),
        (
            {"train__optimizer": {"name": "sgd", "beta2": 0.5}},
            "train.optimizer.beta2 has no effect with optimizer.name='s",
        ),
        (
            {"train__optimizer": {"name": "lion", "epsilon": 1e-6}},
            "train.optimizer.epsilon has no effect with optimizer.",
        ),
        (
            {"train__optimizer__decay": "20%"},
            "train.optimizer.decay has no effect with optimizer.schedule='linear'; le",
        ),
        (
            {"train__optimizer": {"schedule": "rsqrt", "final_lr_ratio": 0.1}},
            "train.optimizer.final_lr_ratio has no effect with",
        ),
        (
            {"train": {"loss": "squared_error", "label_smoothing": 0.1}},
            "train.label_smoothing has no effect with train.lo",
        ),
        (
            {"train": {"loss": "squared_error", "z_loss": 1e-4}},
            "train.z_loss has no effect with train.loss='squared_erro",
        ),
        (
            {"train__squared_error_scale": 2},
            "train.squared_error_scale has no effect with train.loss='cross_entropy'; le",
        ),
        (
            {"train__profile_steps": 9},
            "train.profile_steps has no effect without a profile; set train.profile to the step",
        ),
        (
            {"data": {"packing": False, "packed_target_length": 128, "packed_source_length": 512}},
            "data.packed_source_len",
        ),
        (
            {"eval": {"generate": False, "num_beams": 4}},
            "eval.num_beams has no effect with eval.generate=False; leave it",
        ),
        ({"eval": {"generate": False, "max_new_tokens": 9}}, "eval.max_new_tokens has no effect with eval.generate=Fa"),
    ],
)
def test_a_setting_that_nothing_reads_is_refused_but_taken_from_a_saved_run(changes, message):
    if "data" in changes:
        changes = {"data": changes["data"] | {"train": [{"path": "train.jsonl"}]}}
    assert refusal(**changes).startswith(f"config.{message}")
    reopened = settings.reopen(tree(**changes))
    assert settings.without_unread(reopened) == reopened == settings.resolve(settings.to_dict(reopened))


def test_a_setting_that_only_the_other_kind_of_model_reads_is_refused_once_the_kind_is_known():
    def refused(kind: settings.Kind, **changes: Any) -> str:
        with pytest.raises(UserError) as caught:
            settings.check_read(settings.resolve(tree(**changes)), kind)
        return str(caught.value)

    assert refused("seq2seq", data__max_seq_length=64).startswith("config.data.max_seq_length has no effect on an enc")
    assert refused("seq2seq", data__train_on="last").startswith(
        "config.data.train_on has no effect on an encoder-decoder"
    )
    assert refused("causal", data__max_source_length=64).startswith(
        "config.data.max_source_length has no effect on a causal mo"
    )
    assert refused("causal", data__max_target_length=64).startswith("config.data.max_target_length has no effect on a")
    settings.check_read(settings.resolve(tree(data__max_target_length=64, data__max_source_length=64)), "seq2seq")


def test_generated_texts_have_the_length_of_targets_or_that_of_a_causal_model_unless_one_is_set():
    config = settings.resolve(tree(data__max_target_length=64))
    assert (config.max_new_tokens("seq2seq"), config.max_new_tokens("causal")) == (64, 128)
    assert settings.resolve(tree(eval__max_new_tokens=9)).max_new_tokens("causal") == 9


def test_a_run_of_an_older_version_opens_with_numbers_that_are_refused_now():
    """A best metric and a patience without examples would have no effect: they are put back."""
    changes = {
        "train__gradient_accumulation_steps": 9,
        "train__batch_size": 8,
        "eval__min_new_tokens": 999,
        "eval__patience": 3,
    }
    reopened = settings.reopen(tree(**changes, train__duration="20000 epochs"))
    assert (reopened.train.gradient_accumulation_steps, reopened.eval.min_new_tokens, reopened.eval.patience) == (
        9,
        999,
        0,
    )


def test_a_run_of_an_older_version_opens_where_settings_are_missing():
    made = settings.to_dict(settings.resolve(tree()))
    del made["train"]["max_spike"], made["eval"], made["model"]["lora"]["dora"]
    assert settings.reopen(made) == settings.resolve(tree())


# Overrides


@pytest.mark.parametrize(
    "name, text, read, value",
    [
        ("train.seed", "7", lambda c: c.train.seed, 7),
        ("train.batch_size", "1e3", lambda c: c.train.batch_size, 1000),
        ("train.optimizer.learning_rate", "3e-4", lambda c: c.train.optimizer.learning_rate, 3e-4),
        ("train.optimizer.name", "lion", lambda c: c.train.optimizer.name, "lion"),
        ("train.duration", "200", lambda c: c.train.duration, Duration(200, "steps")),
        ("train.duration", "2 epochs", lambda c: c.train.duration, Duration(2, "epochs")),
        ("eval.every", "", lambda c: c.eval.every, Duration(0, "steps")),
        ("model.pretrained", "false", lambda c: c.model.pretrained, False),
        ("eval.at_start", "True", lambda c: c.eval.at_start, True),
        ("model.dropout", "0.1", lambda c: c.model.dropout, 0.1),
        ("model.dropout", "None", lambda c: c.model.dropout, None),
        ("model.path", "123", lambda c: c.model.path, "123"),
        ("mesh.fsdp", "-1", lambda c: (c.mesh.fsdp, c.mesh.data), (-1, 1)),
        ("data.train.0.path", "c.jsonl", lambda c: [s.path for s in c.data.train], ["c.jsonl", "b.jsonl"]),
        ("data.train[1].path", "c.jsonl", lambda c: [s.path for s in c.data.train], ["a.jsonl", "c.jsonl"]),
        ("data.train.1.limit", "5", lambda c: c.data.train[1].limit, 5),
        ("data.train.0.template", "alpaca", lambda c: c.data.train[0].template, ("alpaca",)),
        ("data.train.0.template", "['alpaca', 'auto']", lambda c: c.data.train[0].template, ("alpaca", "auto")),
        ("data.train.0.template", "[{{a}}] ||| {{b}}", lambda c: c.data.train[0].template, ("[{{a}}] ||| {{b}}",)),
        ("data.train.0.template", "({{a}}) ||| {{b}}", lambda c: c.data.train[0].template, ("({{a}}) ||| {{b}}",)),
        ("data.train", "[{'path': 'c.jsonl'}]", lambda c: [s.path for s in c.data.train], ["c.jsonl"]),
        ("eval.metrics", "('bleu', 'chrf')", lambda c: c.eval.metrics, ("bleu", "chrf")),
        ("eval.metrics", "bleu", lambda c: c.eval.metrics, ("bleu",)),
        ("eval.metrics", "rougeL,bleu", lambda c: c.eval.metrics, ("rougeL", "bleu")),
        ("data.train.0.template", "{{a}}, b ||| c", lambda c: c.data.train[0].template, ("{{a}}, b ||| c",)),
        ("data.train.0.path", "a,b.jsonl", lambda c: c.data.train[0].path, "a,b.jsonl"),
        ("data.train.2.path", "c.jsonl", lambda c: [s.path for s in c.data.train], ["a.jsonl", "b.jsonl", "c.jsonl"]),
        ("data.eval.0.path", "c.jsonl", lambda c: [s.path for s in c.data.eval], ["c.jsonl"]),
        ("model.architecture", "{'d_model': 8}", lambda c: c.model.architecture, {"d_model": 8}),
        ("model.architecture.d_model", "8", lambda c: c.model.architecture, {"d_model": 8}),
        ("model.architecture.model_type", "t5", lambda c: c.model.architecture, {"model_type": "t5"}),
        ("model.architecture.is_decoder", "false", lambda c: c.model.architecture, {"is_decoder": False}),
    ],
)  # fmt: skip
def test_an_override_is_read_as_its_field_s_type_asks(file, name, text, read, value):
    overrides = {name: text}
    if name == "mesh.fsdp":
        overrides["mesh.data"] = "1"
    found = read(settings.load(str(file), overrides))
    assert found == value and type(found) is type(value)


@pytest.mark.parametrize(
    "name, text, message",
    [
        ("train.sede", "7", "config.train.sede is not a setting; did you mean 'seed'?"),
        ("trian.seed", "7", "config has no entry 'trian'; did you mean 'train'?"),
        ("train.seed", "x", "config.train.seed: expected a whole number, got 'x'"),
        ("train.seed.deep", "7", "config.train.seed has no field 'deep': it is a single value"),
        ("train.batch_size.deep.er", "7", "config.train.batch_size has no field 'deep': it is a single value"),
        ("model.path.deep.er", "7", "config.model.path has no field 'deep': it is a single value"),
        ("data.train.3.path", "x", "config.data.train has no entry '3'; it has: 0, 1"),
        ("data.train.first.path", "x", "config.data.train has no entry 'first'; it has: 0, 1"),
        ("data.eval.1.path", "x", "config.data.eval has no entry '1'; it is empty"),
        ("data.eval.0", "x", "config.data.eval.0: expected a section with fields, got 'x'"),
        ("data.train", "c.jsonl", "config.data.train: expected a list, got 'c.jsonl'"),
        ("data.train.0", "c.jsonl", "config.data.train.0: expected a section with fields, got 'c.jsonl'"),
        ("model.architecture", "{[]: 1}", "config.model.architecture: expected a mapping, got '{[]: 1}'"),
        ("", "x", "config. is not a setting"),
        ("train..seed", "7", "config.train has no entry ''"),
        ("train.seed ", "7", "config.train.seed  is not a setting; did you mean 'seed'?"),
        ("data.train.-1.path", "x", "config.data.train has no entry '-1'"),
        ("data.train." + "9" * 5000 + ".path", "x", "config.data.train has no entry '9"),
        ("train.seed", "[" * 100_000, "config.train.seed: expected a whole number, got '[[["),
        ("train.seed", "-" * 100_000 + "1", "config.train.seed: expected a whole number, got '---"),
        ("data.train", "[" * 60 + "]" * 60, "config.data.train.0: expected a section with fields, got [[["),
        ("model.architecture.deep", "[" * 60 + "]" * 60, "config.model.architecture.deep.0.0.0"),
        ("model.architecture", "{1: 2}", "config.model.architecture: expected names to be text, got 1"),
        ("model.architecture.d_model", "1e999", "config.model.architecture.d_model: inf is not a finite number"),
        ("model.architecture.d_model", "9" * 400, "config.model.architecture.d_model: 999"),
        ("model.architecture.d_model", "b'x'", "config.model.architecture.d_model: b'x' is of type bytes, which JSON"),
        ("model.path", "a\0b", "config.model.path: 'a\\x00b' has a character that is not text"),
        ("data.train.0.path", "\udcff.jsonl", "config.data.train.0.path: '\\udcff.jsonl' has a character that is no"),
        ("data.train.0.template", "x\ud800 ||| y", "config.data.train.0.template.0: 'x\\ud800 ||| y' has a character"),
        ("model.architecture.\ud800", "1", "config.model.architecture: '\\ud800' has a character that is not text"),
        ("eval.generate", "yes", "config.eval.generate: expected True or False, got 'yes'"),
        ("train.loss", "None", "config.train.loss: 'None' is not one of 'cross_entropy', 'squared_error'"),
        ("train.duration", "[1]", "config.train.duration: '[1]' is not a duration"),
        ("train.duration", "9" * 5000, "config.train.duration: '999"),
    ],
)
def test_an_override_that_does_not_fit_is_refused_with_the_name_of_the_field(file, name, text, message):
    with pytest.raises(UserError) as caught:
        settings.load(str(file), {name: text})
    assert str(caught.value).startswith(message) and len(str(caught.value)) < 1000


# Durations

RATES = Rates(epoch_steps=12.5, step_examples=8, step_tokens=1000)


@pytest.mark.parametrize(
    "text, steps",
    [
        ("200 steps", 200), ("1 step", 1), ("200", 200), (" 200  steps ", 200), ("200steps", 200), ("0.5 steps", 1),
        ("1e-12 steps", 1), ("1e-300 tokens", 1), ("1e-12%", 1),
        ("2 epochs", 25), ("1 epoch", 13), ("0.5 epochs", 7), ("1e-1 epochs", 2),
        ("16 examples", 2), ("17 examples", 3), ("1 example", 1), ("1e2 examples", 13), ("1e+2 examples", 13),
        ("5000 tokens", 5), ("5001 tokens", 6),
        ("5%", 10), ("5 %", 10), ("100%", 200), ("0.1%", 1),
        ("", 0), ("0", 0), ("0 epochs", 0), ("0%", 0),
    ],
)  # fmt: skip
def test_a_duration_is_steps_rounded_up(text, steps):
    assert Duration.parse(text, "here").steps(RATES, total_steps=200) == steps


@pytest.mark.parametrize("value", [3, 3.0, "3", Duration(3, "steps")])
def test_a_bare_number_means_steps(value):
    assert settings.resolve(tree(train__duration=value)).train.duration == Duration(3, "steps")


@pytest.mark.parametrize(
    "text",
    ["soon", "-1 steps", "3 weeks", "steps", "1.2.3 steps", ".", "nan", "inf", "1e999 steps", "3 epochs 2", "1 e"],
)
def test_a_text_that_is_no_duration_is_refused_with_examples(text):
    with pytest.raises(UserError, match=r"^here: .* is not a duration; write for example '200 steps', '3 epochs'"):
        Duration.parse(text, "here")


@given(st.floats(1e-6, 1e15), st.sampled_from(typing.get_args(settings.Unit)))
def test_a_duration_s_text_gives_it_back_to_the_last_digit(value, unit):
    assert Duration.parse(str(Duration(value, unit)), "") == Duration(value, unit)


@pytest.mark.parametrize("text", ["1234567 steps", "123456789 tokens", "3 epochs", "0.123456789 epochs", "5%", ""])
def test_a_duration_is_saved_as_it_was_written(text):
    assert str(Duration.parse(text, "")) == text


# Combinations


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"model__path": ""}, "config.model.path is empty"),
        ({"model__path": "", "model__architecture": {"a": 1}}, "config.model.pretrained needs config.model.path"),
        ({"model__path": "", "model__architecture": {"a": 1}, "model__pretrained": False}, "config.model.tokenizer is"),
        ({"model__tokenizer": "train"}, "config.model.tokenizer='train' needs config.model.tokenizer_size"),
        ({"model__tokenizer_size": 100}, "config.model.tokenizer_size is of tokenizers that are trained"),
        ({"model__tokenizer": "train", "model__tokenizer_size": -1}, "config.model.tokenizer_size: -1 must be at"),
        ({"model__dropout": 1.0}, "config.model.dropout: 1.0 must be 0 or in [0.0001, 0.99]"),
        ({"data__train": []}, "config.data.train is empty"),
        ({"data__train__0__path": ""}, "config.data.train.0.path is empty"),
        ({"data__train__0__template": []}, "config.data.train.0.template is empty"),
        ({"data__train__0__limit": -1}, "config.data.train.0.limit: -1 must be at least 0"),
        ({"data__eval": [{"path": ""}]}, "config.data.eval.0.path is empty"),
        (
            {"data__eval": [{"path": "x"}], "data__validation_size": 5},
            "config.data.validation_size and config.data.eval exclude",
        ),
        ({"data__validation_size": -1}, "config.data.validation_size: -1 must be at least 0"),
        ({"data__max_source_length": 1}, "config.data.max_source_length: 1 must be at least 2"),
        ({"data__max_target_length": 1}, "config.data.max_target_length: 1 must be at least 2"),
        ({"data__mixing": "weights", "data__train__0__weight": 0}, "config.data.mixing='weights' needs a source with"),
        ({"data__train__0__weight": 2}, "config.data.train.0.weight has no effect with data.mixing='all'"),
        (
            {"data__mixing": "proportional", "data__train__0__weight": 2},
            "config.data.train.0.weight has no effect with",
        ),
        (
            {"data__mixing": "proportional", "data__mixing_temperature": 0},
            "config.data.mixing_temperature: 0.0 must be",
        ),
        (
            {"data__train": [{"path": "a.jsonl", "mixing_cap": 5}]},
            "config.data.train.0.mixing_cap has no effect with data.mixing='all'; set that to 'proportional'",
        ),
        (
            {"data__mixing_cap": 5},
            "config.data.mixing_cap has no effect with data.mixing='all'; set that to 'proportional'",
        ),
        ({"data__mixing": "weights", "data__mixing_temperature": 2}, "config.data.mixing_temperature has no effect"),
        ({"data__packed_source_length": 1024}, "config.data.packed_source_length and packed_target_length are given"),
        ({"data__packed_source_length": 256, "data__packed_target_length": 128}, "config.data.packed_source_length: 2"),
        (
            {"data__packed_source_length": 512, "data__packed_target_length": 64},
            "config.data.packed_target_length: 64 is less than data.max_target_length, 128",
        ),
        ({"data__packed_source_length": 600, "data__packed_target_length": 128}, "config.data.packed_source_length: 6"),
        ({"data__max_truncated": 1.5}, "config.data.max_truncated: 1.5 must be in [0, 1]"),
        ({"train__duration": ""}, "config.train.duration must be positive"),
        ({"train__duration": "5%"}, "config.train.duration must be positive and in steps, epochs, examples or tokens"),
        ({"train__batch_size": 0}, "config.train.batch_size: 0 must be at least 1"),
        ({"train__label_smoothing": 1.0}, "config.train.label_smoothing: 1.0 must be in [0, 1)"),
        ({"train__optimizer__beta2": 1.0}, "config.train.optimizer.beta2: 1.0 must be in [0, 0.999999]"),
        ({"train__optimizer__final_lr_ratio": -0.1}, "config.train.optimizer.final_lr_ratio: -0.1 must be in [0, 1]"),
        ({"train__max_to_keep": 0}, "config.train.max_to_keep: 0 must be at least 1"),
        ({"eval__best": "rougel"}, "config.eval.best: 'rougel' is not measured; add it to eval.metrics"),
        ({"eval__best": "rougeL", "eval__generate": False}, "config.eval.best: 'rougeL' is not measured"),
        ({"eval__num_beams": 0}, "config.eval.num_beams: 0 must be at least 1"),
        ({"eval__length_penalty": 2.0}, "config.eval.length_penalty has no effect without beams; set eval.num_beams"),
        ({"eval__repetition_penalty": 0.0}, "config.eval.repetition_penalty: 0.0 must be at least 0.001"),
        ({"mesh__fsdp": -1}, "config.mesh: sizes must be positive, and at most one of them -1"),
        ({"mesh__tensor": 0}, "config.mesh: sizes must be positive"),
        ({"mesh__slices": -1}, "config.mesh.slices: -1 must be at least 0"),
    ],
)
def test_what_cannot_work_is_refused_before_anything_is_read(changes, message):
    assert refusal(**changes).startswith(message)


TASK = {"name": "quiz", "data": {"path": "a.jsonl"}, "metrics": ["exact_match"]}
RANK = {"name": "quiz", "data": {"path": "a.jsonl"}, "score": "multiple_choice", "options": "a ||| b"}


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"name": ""}, ".name: '' is not allowed"),
        ({"name": "a/b"}, ".name: 'a/b' is not allowed; choose a name without '/' other than 'all'"),
        ({"name": "all"}, ".name: 'all' is not allowed"),
        ({"data": {}}, ".data.path is empty"),
        ({"data": {"path": "a", "template": []}}, ".data.template is empty"),
        ({"data": {"path": "a", "max_per_file": -1}}, ".data.max_per_file: -1 must be at least 0"),
        ({"metrics": []}, ".metrics is empty; name what score='generate' measures"),
        ({"options": "a ||| b"}, ".options has no effect with score='generate'"),
        ({"normalize": "tokens"}, ".normalize has no effect with score='generate'"),
        (RANK | {"options": ""}, ".options is empty; score='multiple_choice' needs the texts to choose from"),
        (RANK | {"metrics": ["bleu"]}, ".metrics has no effect with score='multiple_choice'"),
        (RANK | {"metrics": [], "samples": 2}, ".samples has no effect with score='multiple_choice'"),
        (
            RANK | {"metrics": [], "score": "guess"},
            ".score: 'guess' is not one of 'generate', 'multiple_choice', 'perplexity', 'code_execution'",
        ),
        (RANK | {"metrics": [], "score": "perplexity"}, ".options has no effect with score='perplexity'"),
        ({"num_fewshot": 2}, ": fewshot and num_fewshot are given together or not at all"),
        ({"fewshot": {"path": "b"}}, ": fewshot and num_fewshot are given together or not at all"),
        ({"fewshot": {"path": "b", "template": []}, "num_fewshot": 1}, ".fewshot.template is empty"),
        ({"fewshot_by": "subject"}, ".fewshot_by has no effect without few-shot examples"),
        ({"truncate": "fewshot"}, ".truncate='fewshot' needs few-shot examples"),
        ({"samples": 0}, ".samples: 0 must be at least 1"),
        ({"max_new_tokens": 0}, ".max_new_tokens: 0 must be at least 1"),
        ({"max_prompt_length": -1}, ".max_prompt_length: -1 must be at least 0"),
        ({"num_fewshot": -1}, ".num_fewshot: -1 must be at least 0"),
        ({"samples": 4}, ": samples and top_p need a temperature above 0"),
        ({"top_p": 0.5}, ": samples and top_p need a temperature above 0"),
        ({"seed": 5}, ".seed has no effect without a temperature above 0; leave it out"),
        ({"temperature": -1}, ".temperature: -1.0 must be 0 or at least 0.0001"),
        ({"temperature": 1, "top_p": 1.5}, ".top_p: 1.5 must be in (0, 1]"),
        ({"answer": "("}, ".answer: '(' is not a regular expression: missing )"),
        ({"answer": "(a)(b)"}, ".answer: '(a)(b)' has 2 groups; keep the one that is the answer"),
        ({"shot": 1}, ".shot is not a setting; did you mean 'fewshot'?"),
    ],
)
def test_a_task_that_cannot_be_scored_is_refused(changes, message):
    assert refusal(eval__tasks=[TASK | {"name": "other"}, TASK | changes]).startswith(f"config.eval.tasks.1{message}")


def test_two_tasks_have_two_names():
    message = "config.eval.tasks.1.name: there are two tasks 'quiz'; give each its own name"
    assert refusal(eval__tasks=[TASK, RANK]) == message


def test_a_task_s_score_may_be_the_one_that_ranks_checkpoints():
    config = settings.resolve(tree(eval__tasks=[RANK | {"group_by": "subject"}], eval__best="quiz/accuracy_macro"))
    assert settings.measured(config.eval.tasks[0]) == ("accuracy", "accuracy_macro")
    settings.resolve(tree(eval__tasks=[TASK], eval__best="quiz/exact_match"))
    for best in ("quiz/accuracy_macro", "quiz/bleu", "other/accuracy"):
        message = refusal(eval__tasks=[RANK], eval__best=best)
        assert message.startswith(f"config.eval.best: {best!r} is not measured")


# Saving


def test_a_config_comes_back_from_json_as_it_was():
    made = tree(
        model__architecture={"d_model": 8, "feed_forward_proj": "gated-gelu", "eos_token_id": [1]},
        model__dropout=0.05,
        data__train=[{"path": "a", "template": ["auto", "{{a}} ||| {{b}}"], "weight": 2.5}, {"path": "b"}],
        data__mixing="weights",
        train__duration="1234567 examples",
        train__optimizer={"warmup": "1001 steps", "decay": "12.5%", "schedule": "wsd", "learning_rate": 1 / 3},
        eval__every="0 epochs",
        eval__metrics=["bleu"],
    )
    config = settings.resolve(made)
    assert settings.resolve(json.loads(json.dumps(settings.to_dict(config)))) == config


def test_the_defaults_come_back_from_a_configdict_as_they_are():
    default = settings.default()
    default.model.path = "some/model"
    default.data.train = [ml_collections.ConfigDict({"path": "a.jsonl"})]
    config = settings.resolve(settings.to_dict(default))
    expected = Config(settings.Model(path="some/model"), settings.Data(train=(settings.Source(path="a.jsonl"),)))
    assert config == expected


# Config files


def test_a_config_file_s_argument_follows_a_colon(file):
    assert settings.load(f"{file}:other/model").model.path == "other/model"
    assert settings.load(str(file)).model.path == "some/model"


@pytest.mark.parametrize(
    "content, message",
    [
        ("def get_config(", "config file {file} does not run: SyntaxError: '(' was never closed"),
        ("import no_such_module", "config file {file} does not run: ModuleNotFoundError: No module named 'no_such_mod"),
        ("x = 1", "config file {file} has no get_config(arg='')"),
        ("def get_config(): pass", "{file}: get_config('') failed: TypeError: get_config() takes 0 positional"),
        ("def get_config(arg): pass", "{file}: get_config('') returned None, not a config; end it with 'ret"),
        ("def get_config(arg): return 1 / 0", "{file}: get_config('') failed: ZeroDivisionError: division by zero"),
        ("def get_config(arg): raise ValueError", "{file}: get_config('') failed: ValueError: "),
        (
            "from jax_it import config\ndef get_config(arg): config.default().trian.seed = 1",
            "{file}: get_config('') failed: AttributeError: 'trian' Did you mean \"train\" instead of \"trian\"?",
        ),
        (
            "from jax_it import config\ndef get_config(arg):\n c = config.default()\n c.trian = 1\n return c",
            "config.trian is not a setting; did you mean 'train'?",
        ),
        (
            "from jax_it import config\ndef get_config(arg):\n c = config.default()\n c.train.seed = 'x'\n return c",
            "config.train.seed: expected a whole number, got 'x'",
        ),
        ("import sys\nsys.exit(0)", "config file {file} does not run: SystemExit: 0"),
        ("import sys\ndef get_config(arg): sys.exit()", "{file}: get_config('') failed: SystemExit:"),
        ("def get_config(arg): raise GeneratorExit", "{file}: get_config('') failed: GeneratorExit:"),
        ("def get_config(arg): yield {{}}", "{file}: get_config('') returned a value of type generator, not a config"),
        ("def get_config(arg): return [1]", "{file}: get_config('') returned a value of type list, not a config"),
        ("get_config = 5", "{file}: get_config('') failed: TypeError: 'int' object is not callable"),
        ("x = '\xff'", "config file {file} does not run: SyntaxError: (unicode error) 'utf-8' codec can't decode byte"),
        ("x = '\0'", "config file {file} does not run: "),
        ("x = " + "[" * 100_000, "config file {file} does not run: SyntaxError: too many nested parentheses"),
        ("def get_config(arg):\n c = {{}}\n c['data'] = c\n return c", "config.data contains itself, which no"),
        (
            "def get_config(arg):\n c = [1]\n c.append(c)\n return {{'model': {{'architecture': {{'a': c}}}}}}",
            "config.model.architecture.a.1 contains itself, which no setting can",
        ),
        (
            "from jax_it import config\ndef get_config(arg):\n c = config.default()\n c.data.train = [c]\n return c",
            "config.data.train.0 contains itself, which no setting can",
        ),
        (
            "from jax_it import config\ndef get_config(arg):\n c = config.default()\n"
            " c.train.seed = c.data.get_ref('seed')\n c.data.seed = c.train.get_ref('seed')\n return c",
            "{file}: get_config('') failed: MutabilityError: Found cycle in reference graph.",
        ),
        (
            "def get_config(arg):\n c = []\n for _ in range(10 ** 5): c = [c]\n return {{'data': {{'train': c}}}}",
            "config.data.train.0.0.0",
        ),
        ("def get_config(arg): return {{'train': {{'seed': 10 ** 5000}}}}", "config.train.seed: a number of thou"),
        (
            "class Odd:\n def __repr__(self): raise ValueError('no')\n"
            "def get_config(arg): return {{'train': {{'seed': Odd()}}}}",
            "config.train.seed: expected a whole number, got a value of type Odd (no)",
        ),
        (
            "import numpy as np\ndef get_config(arg): return {{'train': {{'loss': np.array(['a', 'b'])}}}}",
            "config.train.loss: array(['a', 'b'], dtype='<U1') is not one of",
        ),
        (
            "def get_config(arg): return {{'model': {{'path': 'a', 'architecture': {{'x': {{1}}}}}}}}",
            "config.model.architecture.x: {{1}} is of type set, which JSON cannot represent",
        ),
    ],
)  # fmt: skip
def test_a_config_file_that_does_not_work_is_one_clear_line(tmp_path, content, message):
    file = tmp_path / "broken.py"
    file.write_bytes(content.replace("{{", "{").replace("}}", "}").encode("latin-1"))
    with pytest.raises(UserError) as caught:
        settings.load(str(file))
    assert str(caught.value).startswith(message.format(file=file)) and "\n" not in str(caught.value)


def test_a_config_file_that_is_absent_or_no_python_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"config file .*/absent\.py does not exist"):
        settings.load(f"{tmp_path}/absent.py:arg")
    os.mkfifo(tmp_path / "fifo.py")
    (tmp_path / "folder.py").mkdir()
    (tmp_path / "loop.py").symlink_to(tmp_path / "loop.py")
    for name, message in {
        "fifo.py": "is not a file, but a device or pipe", "folder.py": "is not a file, but a folder",
        "loop.py": "Too many levels of symbolic links",
        "x" * 300 + ".py": "File name too long", "a\0.py": "no file can have a name with a null byte",
    }.items():  # fmt: skip
        with pytest.raises(UserError, match=f"^config file .* {message}"):
            settings.load(f"{tmp_path}/{name}")
    with pytest.raises(UserError, match=r"^config file /dev/null is not a file, but a device or pipe"):
        settings.load("/dev/null")
    (tmp_path / "config.yaml").write_text("a: 1")
    with pytest.raises(UserError, match=r"config file .*/config\.yaml is not Python; its name must end in \.py"):
        settings.load(f"{tmp_path}/config.yaml")


def test_a_config_file_is_read_again_whenever_it_is_loaded(file):
    text, saved = file.read_text(), file.stat()
    for name in ("one/model", "two/model"):  # of one length, and with one time: bytecode would be taken for the same
        file.write_text(text.replace("some/model", name))
        os.utime(file, (saved.st_atime, saved.st_mtime))
        assert settings.load(str(file)).model.path == name
    assert not (file.parent / "__pycache__").exists()


def test_a_file_may_set_durations_as_numbers_and_sections_as_plain_dicts(tmp_path):
    file = tmp_path / "plain.py"
    file.write_text(
        "def get_config(arg=''):\n"
        "    return {'model': {'path': 'some/model'}, 'train': {'duration': 100, 'log_every': 5},\n"
        "            'data': {'train': ({'path': 'a.jsonl'},)}}\n"
    )
    config = settings.load(str(file), {"train.seed": "3"})
    assert (str(config.train.duration), str(config.train.log_every), config.train.seed) == ("100 steps", "5 steps", 3)
    file.write_text(
        "from jax_it import config as defaults\n"
        "def get_config(arg=''):\n"
        "    config = defaults.default()\n"
        "    config.model.path = 'some/model'\n"
        "    config.data.train = [{'path': 'a.jsonl'}]\n"
        "    config.train.duration = 100\n"
        "    return config\n"
    )
    assert str(settings.load(str(file)).train.duration) == "100 steps"
