"""What an evaluation found: as files of the run's folder, for TensorBoard, and as text for people."""

import math
import sys
from collections import Counter
from collections.abc import Mapping
from contextlib import suppress
from typing import Any

from etils import epath

from jax_it import hosts, tensorboard
from jax_it.errors import UserError
from jax_it.evaluation.evaluator import ALL, TASK, TRUNCATED, UNFINISHED, WITHOUT_REFERENCE, Scored
from jax_it.files import remedy, to_json, write_atomically, written_locally
from jax_it.run_dir import SCORES, read_scores, with_checksum

PREDICTIONS = "predictions.jsonl"
GROUPS = 12  # of a task, that a table shows


def write(folder: epath.Path, scored: Scored, board: epath.Path | None = None, step: int = 0) -> None:
    """predictions.jsonl and then metrics.json, whose presence says that the step is scored.

    `board` is a folder of TensorBoard's, which gets them as well. The first host writes; all return when the files
    are there, since they decide which checkpoints stay.
    """
    with hosts.first_then_others():
        if not hosts.is_first():
            return
        try:
            folder.mkdir(parents=True, exist_ok=True)
            lines = [to_json(row) for row in scored.predictions]
            write_atomically(folder / PREDICTIONS, "".join(f"{line}\n" for line in lines))
            tasks = dict.fromkeys([*scored.metrics, *scored.errors])
            found = {task: _with_intervals(scored, task) for task in tasks}
            write_atomically(folder / SCORES, with_checksum(found))
            if board is not None:
                show(board, step, found)
        except OSError as error:
            reason = error.strerror or error
            raise UserError(f"cannot write {folder}: {reason}; {remedy(reason)} and evaluate again") from error


def _with_intervals(scored: Scored, task: str) -> dict[str, Any]:
    """A task's scores, "rougeL_ci": [low, high] beside each "rougeL", and why a metric has none under "errors"."""
    values: dict[str, Any] = {}
    intervals, errors = scored.intervals.get(task, {}), scored.errors.get(task, {})
    for name, value in scored.metrics.get(task, {}).items():
        values[name] = value
        if name in intervals:
            values[f"{name}_ci"] = list(intervals[name])
    return values | ({"errors": dict(errors)} if errors else {})


def read(folder: epath.Path) -> dict[str, dict[str, Any]] | None:
    """What metrics.json in a folder holds; None where there is none. A null is a NaN.

    Raises OSError where it cannot be read, and ValueError where it is damaged.
    """
    try:
        found = read_scores(folder)
    except (FileNotFoundError, NotADirectoryError):
        return None
    return {task: {name: _read(value) for name, value in values.items()} for task, values in found.items()}


def _read(value: Any) -> Any:
    """A score, or the bounds of its interval, of which those that are not finite were written as null."""
    if isinstance(value, list):
        return [_read(item) for item in value]
    if isinstance(value, int) and abs(value) > sys.float_info.max:
        raise ValueError("a number is too large")
    return math.nan if value is None else value


def failures(scored: Scored) -> dict[str, str]:
    """The tasks that failed as a whole, and why."""
    return {task: errors[TASK] for task, errors in scored.errors.items() if TASK in errors}


def show(board: epath.Path, step: int, found: Mapping[str, Mapping[str, Any]]) -> None:
    """A step's scores for TensorBoard, as "eval/TASK/METRIC".

    Each step has a file of its own, which is written whole: evaluated again it is not shown twice, and no
    other process writes to it.
    """
    values = {
        f"eval/{task}/{name}": float(value)
        for task, scores in found.items()
        for name, value in scores.items()
        if isinstance(value, (int, float))
    }
    with written_locally(board) as folder:
        part = folder / f".{step}.part"  # TensorBoard would read one that has the name of the file in it
        part.write_bytes(tensorboard.point(step, values))
        part.replace(folder / _point(step))


def _point(step: int) -> str:
    return f"events.out.tfevents.{step:010d}.scores"  # TensorBoard reads a folder's files by their names


def complete(board: epath.Path, folders: Mapping[int, epath.Path]) -> None:
    """Shows the steps whose process was killed before it did. `folders` are those of the scores."""
    if not hosts.is_first():
        return
    for step, folder in folders.items():
        with suppress(OSError, ValueError):  # a damaged one is not shown
            if not (board / _point(step)).is_file() and (found := read(folder)) is not None:
                show(board, step, found)


def table(scored: Scored) -> str:
    """A line for each task, and one for all, with the bounds of its 95 % intervals where there are any."""
    overall = scored.metrics.get(ALL, {})
    every = dict.fromkeys(name for values in (overall, *scored.metrics.values()) for name in values)
    names = [name for name in every if name not in (WITHOUT_REFERENCE, TRUNCATED, UNFINISHED)]
    names.sort(key=lambda name: name == "n")
    many = _many_groups(scored)
    rows: dict[str, Mapping[str, float]] = {
        task: values for task, values in scored.metrics.items() if task.rpartition("/")[0] not in many
    }
    if bounds := scored.intervals.get(ALL):
        rows |= {f"  {end}": {name: pair[i] for name, pair in bounds.items()} for i, end in enumerate(("from", "to"))}
    width = max(map(len, rows), default=0)
    lines = [" " * width + "".join(f"  {name:>11}" for name in names)] if rows else []
    for row, values in rows.items():
        cells = ((cell(values.get(name), name), max(11, len(name))) for name in names)
        lines.append(f"{row:<{width}}" + "".join(f"  {text:>{wide}}" for text, wide in cells))
    reasons: dict[str, str] = {}  # one for each metric: it may fail in every task
    for errors in scored.errors.values():
        if TASK not in errors:
            reasons = {**errors, **reasons}
    lines += [f"{task}: its {number} groups are in {SCORES}" for task, number in many.items()]
    lines += [f"{task}: {reason}" for task, reason in failures(scored).items()]
    lines += reasons.values()
    if scored.advice:
        lines.append(scored.advice)
    if skipped := overall.get(WITHOUT_REFERENCE):
        lines.append(f"{skipped:.0f} examples without a reference are left out")
    if truncated := overall.get(TRUNCATED):
        lines.append(f"{truncated:.0f} prompts were truncated")
    unfinished = {task: number for task, values in rows.items() if (number := values.get(UNFINISHED))}
    if unfinished:
        counts = ", ".join(f"{task} {number:.0f}" for task, number in unfinished.items())
        lines.append(f"texts that reached max_new_tokens before they ended: {counts}")
    return "\n".join(lines)


def _many_groups(scored: Scored) -> dict[str, int]:
    """The tasks that have more groups than a table shows, and how many."""
    numbers = Counter(task.rpartition("/")[0] for task in scored.metrics)
    return {task: number for task, number in numbers.items() if task in scored.metrics and number > GROUPS}


def cell(value: float | None, name: str) -> str:
    """A metric's value as a table shows it."""
    if value is None:
        return ""
    if ":" in name:  # a user's metric, on a scale of its own
        return f"{value:.4g}"
    return f"{value:.0f}" if name == "n" else f"{value:.4f}" if name in ("loss", "loss_macro") else f"{value:.1f}"


def examples_text(scored: Scored, each: int = 1) -> str:
    """The first few predictions of each task beside their references."""
    shown: dict[str, int] = {}
    lines = []
    for row in scored.predictions:
        if shown.setdefault(row["task"], 0) == each:
            continue
        shown[row["task"]] += 1
        lines.append(f"[{row['task']}] {_short(row['prompt'])}")
        if "prediction" in row:
            prediction = row["prediction"]
            prediction = prediction if isinstance(prediction, str) else next(iter(prediction), "")  # of several samples
            lines.append(f"    prediction: {_short(str(prediction))}")
        if row["references"]:
            lines.append(f"    reference:  {_short(row['references'][0])}")
    return "\n".join(lines)


def _short(text: str, length: int = 200) -> str:
    text = text.replace("\n", "\\n")
    return text if len(text) <= length else text[: length - 1] + "…"
