"""What a run's evaluation needs is read before the first step."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from jax_it.config import Config, Data, Duration, Eval, Source, Task
from jax_it.data.evaluation_set import EvalSet
from jax_it.data.formats import Seq2SeqFormat
from jax_it.errors import UserError
from jax_it.evaluation import suite
from tests.data.letters import Letters, pairs, write
from tests.tiny_run import fails, write_recipe

FORMAT = Seq2SeqFormat(0, 0)


def read(config: Config) -> dict[str, EvalSet]:
    return suite.read_examples(SimpleNamespace(config=config, tokenizer=Letters(), format=FORMAT))


@pytest.fixture
def path(tmp_path: Path) -> str:
    return write(tmp_path / "quiz.jsonl", pairs("a>x", "b>y"))


def test_all_that_evaluation_needs_is_read_and_nothing_else(path):
    task = Task("t", Source(path), metrics=("exact_match",), num_fewshot=1, fewshot=Source(path))
    needed = read(Config(data=Data(eval=(Source(path),)), eval=Eval(tasks=(task,))))
    assert list(needed) == ["all", "t"] and len(needed["all"].examples) == 2
    assert [example.prompt for example in needed["t"].examples] == ["b y\n\na", "a x\n\nb"]
    held_out = Config(data=Data(train=(Source("absent.jsonl"),), validation_size=1))
    assert read(held_out) == {}  # it is part of the training data, which is read anyway


@pytest.mark.parametrize(
    "change, message",
    [
        ({"data": Source("absent.jsonl")}, "config.eval.tasks.0.data: data file absent.jsonl does not exist"),
        (
            {"fewshot": Source("absent.jsonl"), "num_fewshot": 1},
            "config.eval.tasks.0.fewshot: data file absent.jsonl does",
        ),
        ({"metrics": ("nonsense",)}, "nonsense"),
    ],
)
def test_a_task_s_files_and_metrics_are_looked_at(path, change, message):
    given: dict[str, Any] = {"name": "t", "data": Source(path), "metrics": ("exact_match",), **change}
    with pytest.raises(UserError) as caught:
        read(Config(eval=Eval(tasks=(Task(**given),))))
    assert message in str(caught.value)


def test_evaluation_within_training_needs_examples():
    with pytest.raises(UserError, match=r"config\.eval\.every needs examples"):
        read(Config(eval=Eval(every=Duration(1, "steps"))))


@pytest.mark.parametrize("damage", ["missing", "empty", "malformed"])
def test_a_validation_file_that_cannot_be_read_is_refused_before_there_is_a_run(tmp_path, capfd, damage):
    config = write_recipe(tmp_path)
    file = tmp_path / "test.jsonl"
    if damage == "missing":
        file.unlink()
    else:
        file.write_text("" if damage == "empty" else file.read_text() + "{")
    said = fails(capfd, "train", "--config", config, "--workdir", tmp_path / "run")
    expected = {"missing": "does not exist", "empty": "holds no records", "malformed": "line 8: not valid JSON"}
    assert expected[damage] in said and str(file) in said
    assert not (tmp_path / "run").exists()
