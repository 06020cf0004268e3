"""`evaluate` of a finished run: the files that it writes hold what can be computed from them and from the data."""

import dataclasses
import json

import jax
import numpy as np
import pytest

from jax_it import config as settings
from jax_it import data, evaluate, metrics, sharding
from jax_it.data.encoded import Encoded
from jax_it.data.formats import Seq2SeqFormat
from jax_it.data.packing import Layout, Shape
from jax_it.errors import UserError
from jax_it.evaluation import table
from jax_it.generation import Engine, Sampling, generate
from jax_it.run import make_format
from jax_it.run_dir import RunDir
from tests.evaluation.suites import make_suite
from tests.tiny_run import STEPS, copy


@pytest.fixture(scope="module")
def evaluated(finished, tmp_path_factory):
    """(the run's folder, what `evaluate` returned)"""
    run = copy(finished, tmp_path_factory.mktemp("evaluated") / "run")
    step, scored = evaluate(run)
    assert step == STEPS
    return run, scored


@pytest.fixture(scope="module")
def parts(opened):
    """(config, layout, model, params on one device, tokenizer, examples, mesh) of the run."""
    config, layout, model, params, tokenizer, mesh = opened
    examples = data.build_eval(config.data, tokenizer, make_format(model, tokenizer), 0)
    return config, layout, model, params, tokenizer, examples, mesh


def read(file):
    return [json.loads(line) for line in file.read_text().splitlines()]


def test_predictions_are_written_with_their_task_prompt_and_references_in_the_order_of_the_data(finished, evaluated):
    run, scored = evaluated
    rows = read(run / "eval" / "60" / "predictions.jsonl")
    expected = [
        {"id": row["id"], "task": row["task"], "prompt": row["prompt"], "references": row["completion"]}
        for row in read(finished.parent / "test.jsonl")
    ]
    assert [{name: value for name, value in row.items() if name != "prediction"} for row in rows] == expected
    assert all(isinstance(row["prediction"], str) for row in rows) and rows == scored.predictions


def test_the_metrics_of_a_task_are_those_of_its_rows(evaluated):
    run, scored = evaluated
    written = json.loads((run / "eval" / "60" / "metrics.json").read_text())
    assert isinstance(written.pop("checksum"), str)
    for task, intervals in scored.intervals.items():
        assert list(intervals) == ["rougeL", "exact_match"]
        for name, (low, high) in intervals.items():
            assert written[task].pop(f"{name}_ci") == [low, high]
            assert low <= scored.metrics[task][name] <= high
    assert written == scored.metrics and list(written) == list(scored.intervals) == ["first", "last", "all"]
    rows = read(run / "eval" / "60" / "predictions.jsonl")
    for task, values in written.items():
        chosen = [row for row in rows if task in (row["task"], "all")]
        expected = metrics.score(
            ["rougeL", "exact_match"],
            [row["prediction"] for row in chosen],
            [row["references"] for row in chosen],
        )
        left_out = {"without_reference": 0, "truncated": 0} if task == "all" else {}
        scores = {name: value for name, value in values.items() if name not in ("loss", "perplexity")}
        assert scores == expected | {"n": len(chosen), "unfinished": 0} | left_out
        assert ("loss" in values) == (task == "all")


def test_predictions_are_those_of_greedy_decoding_one_token_after_another(evaluated, parts):
    """Without a cache, packing or batch: the likeliest next token after all tokens so far."""
    config, _, model, params, tokenizer, examples, _ = parts
    format = Seq2SeqFormat(model.config.decoder_start_token_id, model.config.pad_token_id)
    length = config.data.max_target_length

    @jax.jit
    def next_token(batch, place):
        return model.logits(model.head(params), model.hidden_states(params, batch)[0][0, place]).argmax()

    rows = read(evaluated[0] / "eval" / "60" / "predictions.jsonl")
    for row, example in zip(rows, examples.examples, strict=True):
        tokens = []
        while len(tokens) < length and (not tokens or tokens[-1] != tokenizer.end):
            target = np.array([*tokens, *[0] * (length - len(tokens))])
            batch = format.batch([[Encoded(np.array(example.prompt_tokens), target, 0)]], Shape(1, 32, length))
            tokens.append(int(next_token(batch, len(tokens))))
        assert row["prediction"] == tokenizer.decode(tokens)


def test_the_loss_is_that_of_every_example_alone(evaluated, parts):
    _, _, model, params, _, examples, _ = parts
    format = Seq2SeqFormat(model.config.decoder_start_token_id, model.config.pad_token_id)

    @jax.jit
    def log_probabilities(batch):
        return jax.nn.log_softmax(model.logits(model.head(params), model.hidden_states(params, batch)[0][0]))

    total, count = 0.0, 0
    for example in examples.examples:
        placed = Encoded(example.encoded.source, example.encoded.target, 0)
        found = np.asarray(log_probabilities(format.batch([[placed]], Shape(1, 32, 16))))
        total -= sum(float(found[t, token]) for t, token in enumerate(example.encoded.target))
        count += len(example.encoded.target)
    assert evaluated[1].metrics["all"]["loss"] == pytest.approx(total / count, rel=1e-5)


@pytest.mark.parametrize("devices, layout", [(1, Layout(Shape(1, 32, 16), 1, 1.0, 1.0, 1.0)), (8, None)])
def test_the_scores_do_not_depend_on_rows_devices_or_batches(evaluated, parts, devices, layout):
    config, own, model, params, tokenizer, examples, _ = parts
    mesh = sharding.make_mesh(settings.Mesh(tensor=min(devices, 2)), jax.devices()[:devices])
    params = jax.device_put(params, sharding.shardings(model.logical_axes, params, mesh))
    config = dataclasses.replace(config, eval=dataclasses.replace(config.eval, batch_size=3))
    scored = make_suite(model, tokenizer, examples, config, layout or own, mesh)(params)
    assert scored.predictions == evaluated[1].predictions
    for task, values in evaluated[1].metrics.items():
        assert scored.metrics[task] == pytest.approx(values, rel=1e-5)


def test_a_run_evaluated_twice_gives_the_same_files(evaluated):
    run, _ = evaluated
    files = [run / "eval" / "60" / name for name in ("metrics.json", "predictions.jsonl")]
    before = [file.read_bytes() for file in files]
    evaluate(run)
    assert [file.read_bytes() for file in files] == before
    assert sorted((run / "eval" / "60").iterdir()) == files


def test_the_scores_choose_the_best_checkpoint(evaluated, tmp_path):
    run = copy(evaluated[0], tmp_path / "run")
    assert evaluate(run, "45")[0] == 45
    scores = {step: json.loads((run / "eval" / str(step) / "metrics.json").read_text())["all"] for step in (45, 60)}
    best = min(scores, key=lambda step: scores[step]["loss"])
    assert RunDir(run).choose_step("best", "loss") == best
    assert evaluate(run, "best")[0] == best


def test_without_generation_there_is_the_loss_alone(evaluated, parts):
    config, layout, model, params, tokenizer, examples, mesh = parts
    config = dataclasses.replace(config, eval=dataclasses.replace(config.eval, generate=False))
    scored = make_suite(model, tokenizer, examples, config, layout, mesh)(params)
    assert scored.predictions == [] and list(scored.metrics) == ["all"]
    loss = evaluated[1].metrics["all"]["loss"]
    expected = {"loss": loss, "perplexity": np.exp(loss), "n": 7, "without_reference": 0, "truncated": 0}
    assert scored.metrics["all"] == pytest.approx(expected, rel=1e-5)


def test_texts_are_generated_as_the_settings_say(parts):
    config, layout, model, params, tokenizer, examples, mesh = parts
    short = dataclasses.replace(config.eval, metrics=("rougeL",), max_new_tokens=2, min_new_tokens=2)
    scored = make_suite(model, tokenizer, examples, dataclasses.replace(config, eval=short), layout, mesh)(params)
    assert {task: values["unfinished"] for task, values in scored.metrics.items()} == {"first": 4, "last": 3, "all": 7}
    assert "texts that reached max_new_tokens before they ended: first 4, last 3, all 7" in table(scored)
    chosen = {"num_beams": 3, "length_penalty": 2.0, "min_new_tokens": 4, "forced_bos_token": "\u2581teal"}
    config = dataclasses.replace(config, eval=dataclasses.replace(config.eval, metrics=("rougeL",), **chosen))
    scored = make_suite(model, tokenizer, examples, config, layout, mesh)(params)
    first = tokenizer.id_of("\u2581teal", "the test")
    sampling = Sampling(num_beams=3, length_penalty=2.0, min_new_tokens=4, forced_bos_token=first)
    length = config.eval.max_new_tokens or config.data.max_target_length
    texts = generate(
        Engine(model, mesh, length, 7, sampling), params, [example.prompt_tokens for example in examples.examples]
    )
    assert [row["prediction"] for row in scored.predictions] == [
        tokenizer.decode(text.tokens) for text in sorted(texts, key=lambda text: text.request_id)
    ]
    assert all(row["prediction"].startswith("teal") for row in scored.predictions)


def test_a_metric_of_ones_own_that_fails_costs_only_its_own_value(parts, tmp_path):
    (tmp_path / "own.py").write_text(
        "def fails(predictions, references):\n    raise LookupError('not there')\n"
        "def lengths(predictions, references):\n    return [len(text) for text in predictions]\n"
    )
    config, layout, model, params, tokenizer, examples, mesh = parts
    fails, lengths = f"{tmp_path}/own.py:fails", f"{tmp_path}/own.py:lengths"
    names = (fails, "rougeL", lengths)
    config = dataclasses.replace(config, eval=dataclasses.replace(config.eval, metrics=names))
    scored = make_suite(model, tokenizer, examples, config, layout, mesh)(params)
    assert fails not in scored.metrics["all"] and scored.metrics["all"]["rougeL"] > 0
    expected = np.mean([len(row["prediction"]) for row in scored.predictions])
    assert scored.metrics["all"][lengths] == pytest.approx(expected)
    assert list(scored.intervals["all"]) == ["rougeL", lengths]
    assert table(scored).count("raised LookupError: not there (own.py, line 2)") == 1
    missing = dataclasses.replace(config, eval=dataclasses.replace(config.eval, metrics=(f"{fails}_not",)))
    with pytest.raises(UserError, match="has no function 'fails_not'"):
        make_suite(model, tokenizer, examples, missing, layout, mesh)
