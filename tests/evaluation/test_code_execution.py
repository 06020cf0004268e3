"""HumanEval's pass@k: the estimator, the programs that are run, and the task as a whole."""

import itertools
import json
import math
import os
from unittest.mock import ANY

import pytest

import jax_it
from jax_it import config, hosts, sharding
from jax_it.config import Task
from jax_it.data.evaluation_set import EvalExample
from jax_it.errors import UserError
from jax_it.evaluation import code_execution, sandbox
from jax_it.evaluation.code_execution import CodeExecution, pass_at_k, program
from jax_it.evaluation.evaluators import Stopped
from jax_it.evaluation.sandbox import Outcome
from tests.evaluation.suites import make_run, make_suite

PROMPTS = {
    "double": 'import math\n\n\ndef double(x: int) -> int:\n    """ Twice x.\n    >>> double(2)\n    4\n    """\n',
    "area": 'import math\n\n\ndef area(r):\n    """ Of a circle. """\n',
}
SOLUTIONS = {"double": "    return 2 * x\n", "area": "    return math.pi * r**2\n"}
TESTS = {
    "double": "\n\nMETADATA = {}\n\ndef check(candidate):\n    assert candidate(2) == 4\n    assert candidate(0) == 0",
    "area": "def check(candidate):\n    assert abs(candidate(1) - 3.14159) < 1e-3\n",
}
RECORDS = [{"prompt": PROMPTS[name], "test": TESTS[name], "entry_point": name} for name in PROMPTS]


def outcome(record, text):
    return sandbox.run(program(record, text))


# pass@k


def test_pass_at_k_is_the_share_of_all_subsets_that_hold_a_right_program():
    for n in range(1, 8):
        for c in range(n + 1):
            right = [True] * c + [False] * (n - c)
            for k in range(1, n + 1):
                subsets = list(itertools.combinations(right, k))
                assert pass_at_k(n, c, k) == pytest.approx(sum(map(any, subsets)) / len(subsets), abs=1e-12)


def test_pass_at_k_of_many_programs_is_that_of_exact_fractions():
    for c, k in [(1, 1), (1, 100), (37, 10), (150, 100), (0, 100), (200, 1)]:
        exact = 1 - math.comb(200 - c, k) / math.comb(200, k)
        assert pass_at_k(200, c, k) == pytest.approx(exact, abs=1e-12)


@pytest.mark.parametrize("n, c, k", [(2, 3, 1), (2, -1, 1), (2, 1, 3), (2, 1, 0), (0, 0, 1)])
def test_pass_at_k_of_what_cannot_be_is_refused(n, c, k):
    with pytest.raises(ValueError, match="expected 0 <= c <= n and 1 <= k <= n"):
        pass_at_k(n, c, k)


# Programs


@pytest.mark.parametrize("record", RECORDS, ids=list(PROMPTS))
def test_a_right_body_passes_and_an_empty_or_wrong_one_does_not(record):
    name = record["entry_point"]
    assert outcome(record, SOLUTIONS[name]) == (True, "")
    assert not outcome(record, "").passed
    assert outcome(record, "    pass\n").reason.startswith(("AssertionError", "TypeError"))
    assert outcome(record, "    return x x\n").reason.startswith("SyntaxError")


@pytest.mark.parametrize(
    "text",
    [
        "def double(x):\n    return 2 * x",
        "Here it is:\n\n```python\ndef double(x):\n    return x + x\n```\nIt adds.\n```python\nwrong\n```",
        "```\n    return 2 * x\n```",
        "```python\nimport math\ndef double(x: int) -> int:\n    return 2 * x",  # cut at the greatest length
        "    return 2 * x\n\n\ndef other():\n    pass\n",
        "    return helper(x)\n\n\ndef helper(x):\n    return 2 * x",
    ],
)
def test_a_body_a_whole_function_and_a_block_of_code_are_all_answers(text):
    assert outcome(RECORDS[0], text) == (True, "")


@pytest.mark.parametrize(
    "text",
    [
        "    return 2 * x\n\nimport sys\nsys.exit(0)",
        "    return 2 * x\n\nimport os\nos._exit(0)",
        "    return 2 * x\n\nraise SystemExit",
        "    import sys\n    sys.exit(0)",
        "    import os\n    os._exit(0)",
        "    raise KeyboardInterrupt",
        '    return 2 * x\n\nx = """',
        "    return 2 * x\n\ndef check(candidate):\n    pass\n\nexit()",
        "    return 2 * x\n\ndel double",
    ],
)
def test_a_program_that_ends_before_its_tests_has_failed(text):
    assert not outcome(RECORDS[0], text).passed


def test_tests_of_the_models_own_do_not_take_the_place_of_the_real_ones():
    text = "    return 0\n\n\ndef check(candidate):\n    pass\n"
    assert outcome(RECORDS[0], text).reason.startswith("AssertionError")


# The task


@pytest.fixture(scope="module")
def opened_run(finished):
    model, params, tokenizer = jax_it.load(str(finished))
    mesh = sharding.inference_mesh(model.parameter_count)
    settings = config.Config(eval=config.Eval(run_model_code=True, batch_size=4))
    return make_run(settings, None, model, tokenizer, mesh), params


def examples(*records):
    return [
        EvalExample(f"t{i}", "", record.get("prompt"), [3, 1], (), fields=record) for i, record in enumerate(records)
    ]


@pytest.fixture
def answers(monkeypatch):
    """`answers(texts)` are what the model writes for each example."""

    def answers(*texts):
        class Samples:
            def __init__(self, *_):
                pass

            def __call__(self, params, should_stop):
                return [list(each) for each in texts], [0] * len(texts)

        monkeypatch.setattr(code_execution, "Samples", Samples)

    return answers


def no():
    return False


def test_a_task_counts_the_problems_that_are_solved(opened_run, answers):
    answers(["    return 2 * x", "    return 3 * x", "    return x + x"], ["    return r", "", "    return 3"])
    task = Task("code", score="code_execution", samples=3, temperature=1.0, metrics=("pass@1", "pass@2", "pass@3"))
    found = CodeExecution(task, examples(*RECORDS), opened_run[0])({}, no)
    assert found.metrics["code"] == {
        "pass@1": pytest.approx(100 * (2 / 3 + 0) / 2),
        "pass@2": pytest.approx(100 * (1 + 0) / 2),
        "pass@3": pytest.approx(100 * (1 + 0) / 2),
        "n": 2,
        "unfinished": 0,
    }
    assert set(found.intervals["code"]) == {"pass@1", "pass@2", "pass@3"}
    first, second = found.predictions
    assert first["passed"] == [True, False, True] and second["passed"] == [False] * 3
    assert first["reason"][1].startswith("AssertionError") and first["reason"][0] == ""
    assert first["prediction"][0] == "    return 2 * x"


def test_one_program_each_is_pass_at_1(opened_run, answers):
    answers(["    return 2 * x"], ["    return r"])
    found = CodeExecution(Task("code", score="code_execution"), examples(*RECORDS), opened_run[0])({}, no)
    assert found.metrics["code"] == {"pass@1": 50, "n": 2, "unfinished": 0}
    assert [row["passed"] for row in found.predictions] == [True, False]
    assert found.predictions[0]["prediction"] == "    return 2 * x"


def test_what_the_machine_does_not_limit_is_said_beside_the_scores(opened_run, answers, monkeypatch):
    answers(["    return 2 * x"])
    score = CodeExecution(Task("code", score="code_execution"), examples(RECORDS[0]), opened_run[0])
    monkeypatch.setattr(sandbox, "gaps", lambda: ())
    assert score({}, no).advice == ""
    monkeypatch.setattr(sandbox, "gaps", lambda: ("its memory is not limited", "it could read"))
    assert score({}, no).advice.endswith("cannot fully enforce: its memory is not limited; it could read")


def test_without_the_users_word_nothing_is_run(opened_run, tmp_path, monkeypatch):
    monkeypatch.setattr(sandbox, "run_all", lambda *_, **__: pytest.fail("a program was run"))
    model, tokenizer, mesh = opened_run[0].model, opened_run[0].tokenizer, opened_run[0].mesh
    (tmp_path / "data.jsonl").write_text("".join(f"{json.dumps(record)}\n" for record in RECORDS))
    task = {
        "name": "code",
        "data": {"path": str(tmp_path / "data.jsonl"), "template": ["prompt"]},
        "score": "code_execution",
    }
    settings = config.resolve({"model": {"path": "x"}, "eval": {"tasks": [task]}}, training=False)
    scored = make_suite(model, tokenizer, None, settings, None, mesh)(opened_run[1])
    assert scored.errors == {
        "code": {"task": "it runs programs that the model writes; add --run-model-code to allow that"}
    }
    assert scored.metrics == {}


def test_a_model_that_writes_no_program_solves_nothing(opened_run, tmp_path):
    """From the file to the scores, by way of a model."""
    model, tokenizer, mesh = opened_run[0].model, opened_run[0].tokenizer, opened_run[0].mesh
    (tmp_path / "data.jsonl").write_text("".join(f"{json.dumps(record)}\n" for record in RECORDS))
    task = {
        "name": "code", "data": {"path": str(tmp_path / "data.jsonl"), "template": ["prompt"]},
        "score": "code_execution", "metrics": ["pass@1", "pass@2"], "samples": 2, "temperature": 1.0,
        "max_new_tokens": 4, "max_prompt_length": 400,
    }  # fmt: skip
    settings = config.resolve(
        {"model": {"path": "x"}, "eval": {"tasks": [task], "run_model_code": True}}, training=False
    )
    scored = make_suite(model, tokenizer, None, settings, None, mesh)(opened_run[1])
    assert scored.errors == {}
    # Random weights decide how many texts end by themselves.
    assert scored.metrics == {"code": {"pass@1": 0, "pass@2": 0, "n": 2, "unfinished": ANY}}
    assert [len(row["prediction"]) for row in scored.predictions] == [2, 2]
    assert [row["passed"] for row in scored.predictions] == [[False, False]] * 2


@pytest.mark.parametrize(
    "changes, records, message",
    [
        ({"metrics": ("pass@2",)}, RECORDS, "pass@2 needs samples=2 or more; the task has 1"),
        ({"metrics": ("exact_match",)}, RECORDS, "measures pass@1, pass@10 and the like, not 'exact_match'"),
        ({"metrics": ("pass@0",)}, RECORDS, "not 'pass@0'"),
        (
            {},
            [{"prompt": "a", "test": "b"}],
            "example t0: no text in the field 'entry_point'; its fields: prompt, test",
        ),
        ({}, [{**RECORDS[0], "test": None}], "example t0: no text in the field 'test'"),
    ],
)
def test_what_cannot_be_scored_is_said_before_anything_is_generated(opened_run, changes, records, message):
    with pytest.raises(UserError) as error:
        CodeExecution(Task("code", score="code_execution", **changes), examples(*records), opened_run[0])
    assert message in str(error.value)


def test_programs_are_left_where_the_evaluation_is_stopped(opened_run, answers, monkeypatch):
    answers(["    return 2 * x"], ["    return r"])
    monkeypatch.setattr(code_execution, "CHUNK", 1)
    calls, ran = [], []
    monkeypatch.setattr(sandbox, "run_all", lambda programs, done: ran.append(programs) or [Outcome(True, "")])
    with pytest.raises(Stopped):
        CodeExecution(Task("code", score="code_execution"), examples(*RECORDS), opened_run[0])(
            {}, lambda: calls.append(1) or len(calls) == 2
        )
    assert len(ran) == 1


def test_a_machine_that_can_run_no_program_is_one_tasks_error_on_all_hosts(monkeypatch):
    """The first host's error goes to the others as text, and ends none of them."""

    def fails(*_, **__):
        raise UserError("no program can be run")

    shared = []
    monkeypatch.setattr(sandbox, "run_all", fails)
    monkeypatch.setattr(hosts, "from_first", lambda make: shared.append(make()) or shared[-1])
    with pytest.raises(UserError, match="no program can be run"):
        code_execution._run(Task("code"), ["pass"], no)
    monkeypatch.setattr(hosts, "from_first", lambda make: shared[-1])  # as another host
    with pytest.raises(UserError, match="no program can be run"):
        code_execution._run(Task("code"), ["pass"], no)


DATA = os.environ.get("HUMANEVAL", "")


@pytest.mark.skipif(not DATA, reason="HUMANEVAL names the file HumanEval.jsonl.gz")
def test_all_of_humanevals_solutions_pass_and_no_empty_body_does():
    import gzip

    with gzip.open(DATA, "rt") as file:
        records = [json.loads(line) for line in file]
    right = sandbox.run_all([program(record, record["canonical_solution"]) for record in records])
    assert [record["task_id"] for record, found in zip(records, right, strict=True) if not found.passed] == []
    empty = sandbox.run_all([program(record, "    pass\n") for record in records])
    assert not any(found.passed for found in empty)
