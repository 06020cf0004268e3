"""The benchmarks' recipes on a few records of their data's shape: the prompts are those that were published."""

import dataclasses
import json
from pathlib import Path

import pytest

from jax_it import config as settings
from jax_it.data import tasks
from jax_it.data.evaluation_set import EvalExample
from jax_it.data.formats import Seq2SeqFormat
from jax_it.errors import UserError
from tests.data.letters import Letters
from tests.evaluation.suites import make_suite
from tests.tiny_run import write_rows

RECIPES = Path(__file__).parents[2] / "configs" / "benchmarks"
SUPER_NI = ("rougeL", "squad_exact_match")
MINE = ("mmlu", "gsm8k", "bbh", "super_ni")


def recipe(name: str, folder: object) -> settings.Config:
    tree = settings.read(f"{RECIPES}/{name}.py:{folder}")
    return settings.resolve(tree | {"model": {"path": "a/model"}}, training=False)


def examples(name: str, folder: object) -> list[EvalExample]:
    config = recipe(name, folder)
    (task,) = config.eval.tasks
    return tasks.read(task, "config.eval.tasks.0", config.data, Letters(), Seq2SeqFormat(0, 0))


@pytest.fixture
def mmlu(tmp_path):
    def question(subject: str, number: int) -> dict:
        return {"question": f"{subject} {number}?", "subject": subject, "choices": list("wxyz"), "answer": number % 4}

    subjects = ("abstract_algebra", "virology")
    write_rows(tmp_path / "dev.jsonl", [question(s, i) for i in range(5) for s in subjects])
    write_rows(tmp_path / "test.jsonl", [question(s, i) for s in subjects for i in (6, 7, 8)])
    return tmp_path


@pytest.fixture
def gsm8k(tmp_path):
    answer = "There are 2*3 = <<2*3=6>>6 eggs.\nHalf is 6/2=$<<6/2=3>>3.\n#### 3"
    write_rows(tmp_path / "train.jsonl", [{"question": f"How many {i}?", "answer": answer} for i in range(9)])
    write_rows(tmp_path / "test.jsonl", [{"question": f"And {i}?", "answer": "#### 1,000"} for i in range(2)])
    return tmp_path


@pytest.fixture
def bbh(tmp_path):
    for folder in ("bbh", "cot-prompts"):
        (tmp_path / folder).mkdir()
    for task in ("navigate", "word_sorting"):
        rows = [{"input": f"{task} {i}", "target": f"({i})"} for i in range(2)]
        (tmp_path / "bbh" / f"{task}.json").write_text(json.dumps({"canary": "BENCHMARK DATA", "examples": rows}))
        (tmp_path / "cot-prompts" / f"{task}.txt").write_text(
            f"BENCHMARK DATA\n-----\nAbout {task}.\n\nQ: one\nA: Let's think step by step.\nSo the answer is (1)."
        )
    (tmp_path / "bbh" / "README.md").write_text("The data")
    return tmp_path


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


def test_mmlu_s_prompt_has_five_questions_of_the_subject_with_their_letters(mmlu):
    found = examples("mmlu", mmlu)
    choices = "A. w\nB. x\nC. y\nD. z\n"
    shots = [f"virology {i}?\n{choices}Answer: {'ABCD'[i % 4]}\n\n" for i in range(5)]
    assert found[4].prompt == (
        "The following are multiple choice questions (with answers) about virology.\n\n"
        + "".join(shots)
        + f"virology 7?\n{choices}Answer:"
    )
    assert found[0].prompt.startswith(
        "The following are multiple choice questions (with answers) about abstract algebra"
    )
    assert [option.text for option in found[4].options] == ["A", "B", "C", "D"]
    assert (found[4].references, found[4].group) == (("D",), "virology")


def test_mmlu_refuses_a_subject_with_fewer_shots(mmlu):
    lines = (mmlu / "dev.jsonl").read_text().splitlines()[:9]
    (mmlu / "dev.jsonl").write_text("\n".join(lines))
    with pytest.raises(
        UserError, match=r"4 examples for .*line 4 where subject is 'virology', fewer than num_fewshot=5"
    ):
        examples("mmlu", mmlu)


def test_gsm8k_s_prompt_has_eight_solutions_without_the_calculator_s_marks(gsm8k):
    found = examples("gsm8k", gsm8k)
    solved = "There are 2*3 = 6 eggs.\nHalf is 6/2=$3.\n#### 3"
    shots = [f"Question: How many {i}?\nAnswer: {solved}\n\n" for i in range(8)]
    assert found[1].prompt == "".join(shots) + "Question: And 1?\nAnswer:"
    assert found[1].references == ("#### 1,000",)


def test_bbh_s_prompt_is_the_task_s_own_and_then_the_question(bbh):
    found = examples("bbh", bbh)
    assert [example.group for example in found] == ["navigate", "navigate", "word_sorting", "word_sorting"]
    assert found[3].prompt == (
        "About word_sorting.\n\nQ: one\nA: Let's think step by step.\nSo the answer is (1).\n\n"
        "Q: word_sorting 1\nA: Let's think step by step."
    )
    assert found[3].references == ("(1)",)


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


@pytest.mark.parametrize(
    "name, scores, predictions",
    [
        ("mmlu", {"mmlu": ["accuracy", "n", "accuracy_macro", "truncated"], "mmlu/virology": ["accuracy", "n"]}, 4),
        ("gsm8k", {"gsm8k": ["final_number", "n", "unfinished"]}, 2),
        (
            "bbh",
            {
                "bbh": ["exact_match", "n", "exact_match_macro", "unfinished"],
                "bbh/navigate": ["exact_match", "n", "unfinished"],
            },
            4,
        ),
        (
            "super_ni",
            {
                "super_ni": [
                    "rougeL",
                    "squad_exact_match",
                    "n",
                    "rougeL_macro",
                    "squad_exact_match_macro",
                    "unfinished",
                    "truncated",
                ],
                "super_ni/Entailment": ["rougeL", "squad_exact_match", "n", "unfinished"],
            },
            4,
        ),
    ],
)
def test_a_model_is_scored_by_the_recipe(name, scores, predictions, opened, request):
    config, layout, model, params, tokenizer, mesh = opened
    (task,) = recipe(name, request.getfixturevalue(name)).eval.tasks
    data = dataclasses.replace(task.data, max_per_file=2 if name != "mmlu" else 4)
    if task.score == "generate":
        task = dataclasses.replace(task, max_new_tokens=8)
    task = dataclasses.replace(task, data=data)
    config = dataclasses.replace(config, eval=dataclasses.replace(config.eval, tasks=(task,)))
    scored = make_suite(model, tokenizer, None, config, layout, mesh)(params)
    assert scored.errors == {}
    for group, values in scores.items():
        assert list(scored.metrics[group]) == values
    assert len(scored.predictions) == predictions


@pytest.mark.parametrize("name", MINE)
def test_a_recipe_names_its_data_its_command_and_the_score_to_reproduce(name):
    text = (RECIPES / f"{name}.py").read_text()
    assert f"configs/benchmarks/{name}.py" in text and "licence" in text and "To reproduce: " in text
    assert recipe(name, "").eval.tasks[0].published
