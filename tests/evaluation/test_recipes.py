"""The benchmarks' recipes on a few records of their data's shape: the prompts are those that were published."""

import dataclasses
import json
from pathlib import Path

import pytest

from jax_it import config as settings
from jax_it.data import tasks
from jax_it.data.evaluation_set import EvalExample
from jax_it.data.formats import Seq2SeqFormat
from tests.data.letters import Letters
from tests.evaluation.suites import make_suite

RECIPES = Path(__file__).parents[2] / "configs" / "benchmarks"
MODEL = {"model": {"path": "a/model"}}


def recipe(name: str, folder: object) -> settings.Config:
    tree = settings.read(f"{RECIPES}/{name}.py:{folder}")
    return settings.resolve(tree | MODEL, training=False)


def examples(name: str, folder: object) -> list[EvalExample]:
    config = recipe(name, folder)
    (task,) = config.eval.tasks
    return tasks.read(task, "config.eval.tasks.0", config.data, Letters(), Seq2SeqFormat(0, 0))


@pytest.fixture
def super_ni(tmp_path):
    (tmp_path / "tasks").mkdir()
    (tmp_path / "splits" / "default").mkdir(parents=True)
    for number, category in enumerate(("Entailment", "Title Generation"), 1):
        shown = [{"input": f"in {i}", "output": f"out {i}", "explanation": "why"} for i in range(3)]
        instances = [{"id": f"task{number}-{i}", "input": f"say {i}", "output": [f"red {i}", "x"]} for i in range(120)]
        whole = {
            "Definition": [f"Do {category}."],
            "Categories": [category],
            "Positive Examples": shown,
            "Negative Examples": [],
            "Instances": instances,
        }
        (tmp_path / "tasks" / f"task{number}_x.json").write_text(json.dumps(whole, indent=4))
    (tmp_path / "tasks" / "task3_x.json").write_text("not to be read")
    (tmp_path / "splits" / "default" / "test_tasks.txt").write_text("task1_x\ntask2_x\n")
    return tmp_path


def test_super_ni_s_prompts_are_those_of_the_first_hundred_instances_of_the_listed_tasks(super_ni):
    found = examples("super_ni", super_ni)
    assert [example.id for example in found] == [f"task{task}-{i}" for task in (1, 2) for i in range(100)]
    assert found[100].prompt == (
        "Definition: Do Title Generation.\n\n"
        " Positive Example 1 -\nInput: in 0.\n Output: out 0.\n\n"
        " Positive Example 2 -\nInput: in 1.\n Output: out 1.\n\n"
        "Now complete the following example -\nInput: say 0.\nOutput:"
    )
    assert (found[100].references, found[100].group) == (("red 0", "x"), "Title Generation")


def test_super_ni_s_long_prompts_lose_examples_and_then_their_end(super_ni):
    file = super_ni / "tasks" / "task1_x.json"
    whole = json.loads(file.read_text())
    for number, length in enumerate((800, 840, 900, 1100)):
        whole["Instances"][number]["input"] = "a" * length
    file.write_text(json.dumps(whole))
    found = examples("super_ni", super_ni)
    assert [example.prompt.count("Positive Example") for example in found[:5]] == [2, 1, 0, 0, 2]
    assert [example.truncated for example in found[:5]] == [False, False, False, True, False]
    assert [len(example.prompt_tokens) <= 1024 for example in found[:5]] == [True] * 5


def test_a_model_is_scored_by_the_recipe(super_ni, opened):
    config, layout, model, params, tokenizer, mesh = opened
    (task,) = recipe("super_ni", super_ni).eval.tasks
    data = dataclasses.replace(task.data, max_per_file=2)
    task = dataclasses.replace(task, data=data, max_new_tokens=8)
    config = dataclasses.replace(config, eval=dataclasses.replace(config.eval, tasks=(task,)))
    scored = make_suite(model, tokenizer, None, config, layout, mesh)(params)
    assert scored.errors == {}
    means = ["rougeL_macro", "squad_exact_match_macro"]
    assert list(scored.metrics["super_ni"]) == [
        "rougeL", "squad_exact_match", "n", *means, "unfinished", "truncated",
    ]  # fmt: skip
    assert list(scored.metrics["super_ni/Entailment"]) == ["rougeL", "squad_exact_match", "n", "unfinished"]
    assert len(scored.predictions) == 4


def test_the_harness_s_tasks_are_named_in_the_argument_with_shots_and_chat():
    tasks = settings.resolve(settings.read("lm_eval:mmlu,ifeval,5,chat") | MODEL, training=False).eval.tasks
    assert [(task.name, task.score, task.num_fewshot, task.chat) for task in tasks] == [
        ("mmlu", "lm_eval", 5, True), ("ifeval", "lm_eval", 5, True),
    ]  # fmt: skip
    (task,) = settings.resolve(settings.read("lm_eval") | MODEL, training=False).eval.tasks
    assert (task.name, task.num_fewshot, task.chat) == ("mmlu", 0, False) and task.published


@pytest.mark.parametrize("name", ["super_ni", "humaneval"])
def test_a_recipe_names_its_data_its_command_and_the_score_to_reproduce(name):
    text = (RECIPES / f"{name}.py").read_text()
    assert f"configs/benchmarks/{name}.py" in text and "license" in text and "To reproduce: " in text
    assert recipe(name, "").eval.tasks[0].published
