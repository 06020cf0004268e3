"""Results of an evaluation: as files of the run's folder, as TensorBoard events, and as text."""

import math
import sys
from collections import Counter
from collections.abc import Mapping
from contextlib import suppress
from typing import Any

from etils import epath

from jax_it import hosts, tensorboard
from jax_it.errors import UserError, shorten
from jax_it.evaluation.evaluators import ALL, TASK, TRUNCATED, UNFINISHED, WITHOUT_REFERENCE
from jax_it.files import remedy, to_json, write_atomically, written_locally
from jax_it.metrics import Result
from jax_it.run_dir import SCORES, read_scores, with_checksum

PREDICTIONS = "predictions.jsonl"
GROUPS = 12  # of a task, that a table shows


def write(folder: epath.Path, result: Result, tensorboard_dir: epath.Path | None = None, step: int = 0) -> None:
    """Write predictions.jsonl, then metrics.json, whose presence says that the step is scored, then the events.

    The first host writes; all return when the files are there, since they decide which checkpoints are kept.
    """
    with hosts.first_then_others():
        if not hosts.is_first():
            return
        try:
            folder.mkdir(parents=True, exist_ok=True)
            lines = [to_json(row) for row in result.predictions]
            write_atomically(folder / PREDICTIONS, "".join(f"{line}\n" for line in lines))
            scores = {task: _as_json(result, task) for task in dict.fromkeys([*result.metrics, *result.errors])}
            write_atomically(folder / SCORES, with_checksum(scores))
            if tensorboard_dir is not None:
                write_events(tensorboard_dir, step, scores)
        except OSError as error:
            reason = error.strerror or error
            raise UserError(f"cannot write {folder}: {reason}; {remedy(reason)} and evaluate again") from error


def _as_json(result: Result, task: str) -> dict[str, Any]:
    """Return a task's scores with "rougeL_ci": [low, high] after "rougeL", and with its "errors"."""
    values: dict[str, Any] = {}
    intervals, errors = result.intervals.get(task, {}), result.errors.get(task, {})
    for name, value in result.metrics.get(task, {}).items():
        values[name] = value
        if name in intervals:
            values[f"{name}_ci"] = list(intervals[name])
    return values | ({"errors": dict(errors)} if errors else {})


def read(folder: epath.Path) -> dict[str, dict[str, Any]] | None:
    """Read metrics.json in a folder; None where there is none. A null is a NaN.

    Raises OSError where it cannot be read, and ValueError where it is damaged.
    """
    try:
        found = read_scores(folder)
    except (FileNotFoundError, NotADirectoryError):
        return None
    return {task: {name: _number(value) for name, value in values.items()} for task, values in found.items()}


def _number(value: Any) -> Any:
    """Return a score, or the bounds of its interval; those that are not finite were written as null."""
    if isinstance(value, list):
        return [_number(item) for item in value]
    if isinstance(value, int) and abs(value) > sys.float_info.max:
        raise ValueError("a number is too large")
    return math.nan if value is None else value


def failures(result: Result) -> dict[str, str]:
    """Return the tasks that failed as a whole, and why."""
    return {task: errors[TASK] for task, errors in result.errors.items() if TASK in errors}


def write_events(tensorboard_dir: epath.Path, step: int, found: Mapping[str, Mapping[str, Any]]) -> None:
    """Write a step's scores for TensorBoard, as "eval/TASK/METRIC".

    Each step has a file of its own, which is replaced as a whole: a step that is evaluated again is not shown twice,
    and no other process writes to the file.
    """
    values = {
        f"eval/{task}/{name}": float(value)
        for task, scores in found.items()
        for name, value in scores.items()
        if isinstance(value, (int, float))
    }
    with written_locally(tensorboard_dir) as folder:
        part = folder / f".{step}.part"  # TensorBoard would read one whose name contains that of the file
        part.write_bytes(tensorboard.point(step, values))
        part.replace(folder / _events_file(step))


def _events_file(step: int) -> str:
    return f"events.out.tfevents.{step:010d}.scores"  # TensorBoard reads a folder's files in the order of their names


def write_missing_events(tensorboard_dir: epath.Path, folders: Mapping[int, epath.Path]) -> None:
    """Write the events of steps whose process was killed before it did. `folders` are those of their scores."""
    if not hosts.is_first():
        return
    for step, folder in folders.items():
        with suppress(OSError, ValueError):  # damaged scores are not shown
            if not (tensorboard_dir / _events_file(step)).is_file() and (found := read(folder)) is not None:
                write_events(tensorboard_dir, step, found)


def table(result: Result) -> str:
    """Return a table with a row for each task and one for "all", below it the bounds of its 95 % intervals."""
    overall = result.metrics.get(ALL, {})
    every = dict.fromkeys(name for values in (overall, *result.metrics.values()) for name in values)
    names = [name for name in every if name not in (WITHOUT_REFERENCE, TRUNCATED, UNFINISHED)]
    names.sort(key=lambda name: name == "n")
    many = _many_groups(result)
    rows: dict[str, Mapping[str, float]] = {
        task: values for task, values in result.metrics.items() if task.rpartition("/")[0] not in many
    }
    if bounds := result.intervals.get(ALL):
        for i, end in enumerate(("low", "high")):
            rows[f"  95% CI {end}"] = {name: pair[i] for name, pair in bounds.items()}
    width = max(map(len, rows), default=0)
    lines = [" " * width + "".join(f"  {name:>11}" for name in names)] if rows else []
    for row, values in rows.items():
        cells = ((cell(values.get(name), name), max(11, len(name))) for name in names)
        lines.append(f"{row:<{width}}" + "".join(f"  {text:>{wide}}" for text, wide in cells))
    reasons: dict[str, str] = {}  # one for each metric: it may fail in every task
    for errors in result.errors.values():
        if TASK not in errors:
            reasons = {**errors, **reasons}
    lines += [f"{task}: its {number} groups are in {SCORES}" for task, number in many.items()]
    lines += [f"{task}: {reason}" for task, reason in failures(result).items()]
    lines += reasons.values()
    if result.advice:
        lines.append(result.advice)
    if skipped := overall.get(WITHOUT_REFERENCE):
        lines.append(f"{skipped:.0f} examples without a reference were skipped")
    if truncated := overall.get(TRUNCATED):
        lines.append(f"{truncated:.0f} prompts were truncated")
    unfinished = {task: number for task, values in rows.items() if (number := values.get(UNFINISHED))}
    if unfinished:
        counts = ", ".join(f"{task} {number:.0f}" for task, number in unfinished.items())
        lines.append(f"texts that reached max_new_tokens before they ended: {counts}")
    return "\n".join(lines)


def _many_groups(result: Result) -> dict[str, int]:
    """Return the tasks that have more groups than a table shows, and how many."""
    numbers = Counter(task.rpartition("/")[0] for task in result.metrics)
    return {task: number for task, number in numbers.items() if task in result.metrics and number > GROUPS}


def cell(value: float | None, name: str) -> str:
    """Return a metric's value as a table shows it."""
    if value is None:
        return ""
    if ":" in name or "," in name:  # a user's metric or one of lm_eval, on a scale of its own
        return f"{value:.4g}"
    return f"{value:.0f}" if name == "n" else f"{value:.4f}" if name in ("loss", "loss_macro") else f"{value:.1f}"


def examples_text(result: Result) -> str:
    """Return the first prediction of each task with its reference."""
    first: dict[str, dict[str, Any]] = {}
    for row in result.predictions:
        first.setdefault(row["task"], row)
    lines = []
    for task, row in first.items():
        lines.append(f"[{task}] {_one_line(row['prompt'])}")
        if "prediction" in row:
            prediction = row["prediction"]
            prediction = prediction if isinstance(prediction, str) else next(iter(prediction), "")  # of several samples
            lines.append(f"    prediction: {_one_line(str(prediction))}")
        if row["references"]:
            lines.append(f"    reference:  {_one_line(row['references'][0])}")
    return "\n".join(lines)


def _one_line(text: str) -> str:
    return shorten(text.replace("\n", "\\n"), 200)
