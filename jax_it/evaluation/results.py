"""What an evaluation found: as files of the run's folder, and as text for people."""

import json
from collections.abc import Mapping
from typing import Any

from jax_it import hosts
from jax_it.errors import UserError
from jax_it.evaluation.evaluator import ALL, TRUNCATED, WITHOUT_REFERENCE, Scored
from jax_it.files import write_atomically


def write(folder: Any, scored: Scored) -> None:
    """predictions.jsonl and then metrics.json, whose presence says that the step is scored.

    The first host writes them; all return when they are there, since they decide which checkpoints stay.
    """
    with hosts.first_then_others():
        if not hosts.is_first():
            return
        try:
            folder.mkdir(parents=True, exist_ok=True)
            lines = [json.dumps(row, ensure_ascii=False) for row in scored.predictions]
            write_atomically(folder / "predictions.jsonl", "".join(f"{line}\n" for line in lines))
            write_atomically(folder / "metrics.json", {task: _with_intervals(scored, task) for task in scored.metrics})
        except OSError as error:
            reason = error.strerror or error
            raise UserError(f"cannot write {folder}: {reason}; free space and evaluate again") from error


def _with_intervals(scored: Scored, task: str) -> dict[str, Any]:
    """A task's scores, "rougeL_ci": [low, high] beside each "rougeL", and why a metric has none under "errors"."""
    values: dict[str, Any] = {}
    intervals, errors = scored.intervals.get(task, {}), scored.errors.get(task, {})
    for name, value in scored.metrics[task].items():
        values[name] = value
        if name in intervals:
            values[f"{name}_ci"] = list(intervals[name])
    return values | ({"errors": dict(errors)} if errors else {})


def table(scored: Scored) -> str:
    """A line for each task, and one for all, with the bounds of its 95 % intervals where there are any."""
    overall = scored.metrics[ALL]
    every = dict.fromkeys(name for values in (overall, *scored.metrics.values()) for name in values)
    names = [name for name in every if name not in (WITHOUT_REFERENCE, TRUNCATED)]
    names.sort(key=lambda name: name == "n")
    rows: dict[str, Mapping[str, float]] = dict(scored.metrics)
    if bounds := scored.intervals.get(ALL):
        rows |= {f"  {end}": {name: pair[i] for name, pair in bounds.items()} for i, end in enumerate(("from", "to"))}
    width = max(map(len, rows))
    lines = [" " * width + "".join(f"  {name:>11}" for name in names)]
    for row, values in rows.items():
        cells = ((_cell(values.get(name), name), max(11, len(name))) for name in names)
        lines.append(f"{row:<{width}}" + "".join(f"  {cell:>{wide}}" for cell, wide in cells))
    reasons: dict[str, str] = {}  # one for each metric: it may fail in every task
    for errors in scored.errors.values():
        reasons = {**errors, **reasons}
    lines += reasons.values()
    if scored.advice:
        lines.append(scored.advice)
    if skipped := overall.get(WITHOUT_REFERENCE):
        lines.append(f"{skipped:.0f} examples without a reference are left out")
    if truncated := overall.get(TRUNCATED):
        lines.append(f"{truncated:.0f} prompts are cut to the source length")
    return "\n".join(lines)


def _cell(value: float | None, name: str) -> str:
    if value is None:
        return ""
    if ":" in name:  # a user's metric, on a scale of its own
        return f"{value:.4g}"
    return f"{value:.0f}" if name == "n" else f"{value:.4f}" if name == "loss" else f"{value:.1f}"


def examples_text(scored: Scored, each: int = 1) -> str:
    """The first few predictions of each task beside their references."""
    shown: dict[str, int] = {}
    lines = []
    for row in scored.predictions:
        if shown.setdefault(row["task"], 0) == each:
            continue
        shown[row["task"]] += 1
        lines += [
            f"[{row['task']}] {_short(row['prompt'])}",
            f"    prediction: {_short(row['prediction'])}",
            f"    reference:  {_short(row['references'][0])}",
        ]
    return "\n".join(lines)


def _short(text: str, length: int = 200) -> str:
    text = text.replace("\n", "\\n")
    return text if len(text) <= length else text[: length - 1] + "…"
