"""The config file of HumanEval, on records of its data set's form."""

import json
from pathlib import Path

import pytest

import jax_it
from jax_it import config, sharding
from jax_it.data import tasks
from jax_it.data import tokenizer_files as tokenizers
from jax_it.data.formats import CausalFormat
from jax_it.evaluation import code_execution
from tests.evaluation.suites import make_suite

CONFIGS = Path(__file__).parents[2] / "configs" / "benchmarks"

PROBLEM = {
    "task_id": "HumanEval/0",
    "prompt": '\n\ndef double(x: int) -> int:\n    """ Twice x. """\n',
    "canonical_solution": "    return 2 * x\n",
    "test": "def check(candidate):\n    assert candidate(2) == 4\n",
    "entry_point": "double",
}


def load(name, *changes):
    return config.resolve(
        config.override(config.read(f"{CONFIGS / name}"), {"model.path": "x", **dict(changes)}), training=False
    )


def read(settings):
    (task,) = settings.eval.tasks
    tokenizer = tokenizers.load("bytes")
    return tasks.read(task, "config.eval.tasks.0", settings.data, tokenizer, CausalFormat(tokenizer.pad))


@pytest.fixture
def problems(tmp_path):
    file = tmp_path / "problems.jsonl"
    file.write_text(f"{json.dumps(PROBLEM)}\n")
    return file


def test_humaneval_is_the_hubs_data_set_or_a_file_with_one_sample_or_many():
    (task,) = load("humaneval.py").eval.tasks
    assert (task.data.path, task.data.split) == ("openai/openai_humaneval", "test")
    assert (task.metrics, task.samples, task.temperature) == (("pass@1",), 1, 0)
    (task,) = load("humaneval.py:20,problems.jsonl").eval.tasks
    assert task.data.path == "problems.jsonl"
    assert (task.metrics, task.samples, task.temperature) == (("pass@1", "pass@10"), 20, 0.8)
    (task,) = load("humaneval.py:200,chat").eval.tasks
    assert task.metrics == ("pass@1", "pass@10", "pass@100") and task.chat and task.stop == ()


def test_a_model_goes_on_with_the_function_or_is_asked_for_it(problems):
    (example,) = read(load(f"humaneval.py:{problems}"))
    assert example.prompt == PROBLEM["prompt"].strip()
    (example,) = read(load(f"humaneval.py:{problems},chat"))
    assert f"```python{PROBLEM['prompt'].rstrip()}" in example.prompt.replace("```python\n\n\n", "```python\n\n")
    assert example.prompt.endswith("```")


@pytest.mark.parametrize("text, score", [("\n    return 2 * x\n", 100), ("\n    pass\n", 0), ("", 0)])
def test_humaneval_scores_what_a_model_writes(problems, finished, monkeypatch, text, score):
    class Samples:
        def __init__(self, *_):
            pass

        def __call__(self, params, should_stop):
            return [[text]], [0]

    monkeypatch.setattr(code_execution, "Samples", Samples)
    model, params, tokenizer = jax_it.load(str(finished))
    mesh = sharding.inference_mesh(model.parameter_count)
    settings = load(f"humaneval.py:{problems}", ("eval.run_model_code", "true"))
    assert make_suite(model, tokenizer, None, settings, None, mesh)(params).metrics == {
        "humaneval": {"pass@1": score, "n": 1, "unfinished": 0}
    }
