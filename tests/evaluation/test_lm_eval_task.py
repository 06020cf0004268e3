"""Tasks of lm_eval within an evaluation: its own scores, in our results."""

import dataclasses
import json

import pytest

from jax_it import config as settings
from jax_it.config import Source, Task
from jax_it.errors import UserError
from jax_it.evaluation import Stopped, table
from jax_it.evaluation.evaluators import TASK
from tests.evaluation.suites import make_suite

lm_eval = pytest.importorskip("lm_eval", reason="pip install 'jax-it[harness]'")
pytest.importorskip("lm_eval.tasks")

pytestmark = pytest.mark.filterwarnings("default")  # lm_eval's own

QUESTIONS = [
    ("say red", ["red", "green"]),
    ("say blue and grey", ["grey", "blue grey"]),
    ("say teal", ["pink", "teal"]),
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder with the tasks `choose` and `write`, and the group `both`."""
    root = tmp_path_factory.mktemp("tasks")
    rows = [
        {"question": question, "options": options, "gold": i % 2} for i, (question, options) in enumerate(QUESTIONS)
    ]
    (root / "data.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    data = {
        "dataset_path": "json", "dataset_kwargs": {"data_files": {"test": str(root / "data.jsonl")}},
        "test_split": "test", "doc_to_text": "{{question}}", "metadata": {"version": 1.0},
    }  # fmt: skip
    made = {
        "choose": {
            "output_type": "multiple_choice", "doc_to_target": "{{gold}}", "doc_to_choice": "{{options}}",
            "metric_list": [{"metric": "acc"}, {"metric": "acc_norm"}],
        },
        "write": {
            "output_type": "generate_until", "doc_to_target": "{{options[gold]}}",
            "generation_kwargs": {"until": ["\n"], "max_gen_toks": 8}, "metric_list": [{"metric": "exact_match"}],
        },
    }  # fmt: skip
    for name, task in made.items():  # YAML takes JSON
        (root / f"{name}.yaml").write_text(json.dumps({"task": name, **data, **task}))
    group = {"group": "both", "task": ["choose", "write"], "aggregate_metric_list": [{"metric": "acc"}]}
    (root / "both.yaml").write_text(json.dumps(group))
    return root


@pytest.fixture
def suite(opened):
    def suite(*tasks, **given):
        config, layout, model, _, tokenizer, mesh = opened
        config = dataclasses.replace(config, eval=dataclasses.replace(config.eval, tasks=tasks, **given))
        return make_suite(model, tokenizer, None, config, layout, mesh)

    return suite


def task(folder, name, **given):
    return Task(name, Source(str(folder)), "lm_eval", **given)


def test_scores_are_those_that_lm_eval_gives_the_same_model(opened, suite, folder, finished):
    from lm_eval.tasks import TaskManager

    from jax_it.harness.model import HarnessModel

    expected = lm_eval.simple_evaluate(
        HarnessModel(str(finished)), tasks=["choose", "write"], bootstrap_iters=1000,
        task_manager=TaskManager(include_path=str(folder), include_defaults=False),
    )["results"]  # fmt: skip
    result = suite(task(folder, "choose"), task(folder, "write"))(opened.params)
    assert result.errors == {}
    assert list(result.metrics["choose"]) == ["acc,none", "acc_norm,none", "n"]
    for name, metric in (("choose", "acc,none"), ("choose", "acc_norm,none"), ("write", "exact_match,none")):
        score, error = expected[name][metric], expected[name][metric.replace(",", "_stderr,")]
        assert result.metrics[name][metric] == pytest.approx(score) and result.metrics[name]["n"] == 3
        low, high = result.intervals[name][metric]
        assert (low + high) / 2 == pytest.approx(score) and high - low == pytest.approx(2 * 1.96 * error, rel=1e-3)


def test_predictions_are_rows_like_those_of_other_tasks(opened, suite, folder):
    result = suite(task(folder, "choose"), task(folder, "write"))(opened.params)
    assert [(row["id"], row["task"], row["prompt"]) for row in result.predictions] == [
        (f"{name}/{i}", name, question) for name in ("choose", "write") for i, (question, _) in enumerate(QUESTIONS)
    ]
    first, last = result.predictions[0], result.predictions[-1]
    assert first["options"] == [" red", " green"] and len(first["log_likelihoods"]) == 2
    assert first["references"] == ["0"] and isinstance(last["prediction"], str) and last["references"] == ["pink"]
    assert json.dumps(result.predictions)


def test_the_tasks_of_a_group_are_its_groups(opened, suite, folder):
    result = suite(task(folder, "both"), limit=2)(opened.params)
    assert set(result.metrics) == {"both", "both/choose", "both/write"}
    assert result.metrics["both"]["n"] == 4 and result.metrics["both/write"]["n"] == 2
    assert result.metrics["both"]["acc,none"] == result.metrics["both/choose"]["acc,none"]
    assert {row["group"] for row in result.predictions} == {"choose", "write"}
    assert "acc,none" in table(result)


def test_one_model_serves_all_params_and_another_evaluation_gives_the_same(opened, suite, folder):
    one = suite(task(folder, "choose"))
    assert one(opened.params) == one(opened.params)


def test_it_stops_between_two_batches(opened, suite, folder):
    answers = iter([False, True])
    with pytest.raises(Stopped):
        suite(task(folder, "choose"), batch_size=1)(opened.params, lambda: next(answers))


def test_a_task_that_is_not_there_costs_only_its_own_scores(opened, suite, folder):
    result = suite(task(folder, "absent"), task(folder, "choose"))(opened.params)
    assert result.errors == {"absent": {TASK: f"the folder {folder} has no task 'absent'"}}
    assert list(result.metrics) == ["choose"]


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"metrics": ("rougeL",)}, "config.eval.tasks.0.metrics has no effect with score='lm_eval'; leave it out"),
        ({"data": Source("x", split="test")}, "config.eval.tasks.0.data: score='lm_eval' reads only its path"),
    ],
)
def test_settings_that_lm_eval_does_not_read_are_refused(changes, message):
    given = {"name": "gsm8k", "score": "lm_eval", **changes}
    with pytest.raises(UserError, match=message.replace(".", r"\.")):
        settings.resolve(settings.to_dict(settings.Config(
            model=settings.Model(path="x"), eval=settings.Eval(tasks=(Task(**given),))
        )), training=False)  # fmt: skip
