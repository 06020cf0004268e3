"""The scores of all steps of a run in one table."""

import csv
import io
import math
from pathlib import Path
from typing import Any, NamedTuple

from jax_it import files
from jax_it.errors import UserError, shorten
from jax_it.evaluation.evaluate import OWN, EvalOptions
from jax_it.evaluation.evaluators import ALL, TRUNCATED, UNFINISHED, WITHOUT_REFERENCE
from jax_it.evaluation.results import cell, read
from jax_it.run_dir import SCORES, RunDir, score_in

WIDTH = 160  # of the table, in characters; the files have all columns
NAME = 20  # of a task
HIDDEN = (WITHOUT_REFERENCE, TRUNCATED, UNFINISHED, "n")

Scores = dict[str, dict[str, Any]]  # by task and metric


class Summary(NamedTuple):
    """The scores of a run's steps, in their order."""

    scores: dict[int, Scores]
    unreadable: dict[str, str]  # files that cannot be read, and why
    metric: str  # that ranks steps
    best: int | None  # the step that is best by it
    kept: list[int]  # steps that have a checkpoint
    names: list[str]  # of the run's other evaluations


def summarize(workdir: str | Path, options: EvalOptions = OWN) -> Summary:
    """Read the scores of the run's own evaluation, or of the one that the options name.

    Raises UserError if the directory does not hold a run.
    """
    run_dir = RunDir(files.locate(workdir))
    metric = options.resolve(run_dir.open()[0]).eval.best
    if (run_dir.path / "model").is_dir():  # a copy of the scores alone has none
        run_dir.check_files("model")
    scores: dict[int, Scores] = {}
    unreadable: dict[str, str] = {}
    for step in _steps(run_dir, options):
        folder = options.folder(run_dir, step)
        try:
            if (found := read(folder)) is not None:
                scores[step] = found
        except (OSError, ValueError) as error:
            unreadable[str(folder / SCORES)] = str(error)
    ranked = {step: score for step in scores if (score := score_in(scores[step], metric)) is not None}
    ranked = {step: score for step, score in ranked.items() if not math.isnan(score)}
    best = max(ranked, key=lambda step: ranked[step]) if ranked else None
    return Summary(scores, unreadable, metric, best, run_dir.checkpoints().steps(), _names(run_dir))


def _steps(run_dir: RunDir, options: EvalOptions) -> list[int]:
    if not options.output:
        return run_dir.scored_steps()
    folder = files.locate(options.output)
    if not folder.is_dir():
        raise UserError(f"{folder} is not a folder; --output names the folder of the scores")
    return sorted(int(item.name) for item in folder.iterdir() if item.name.isdecimal())


def _names(run_dir: RunDir) -> list[str]:
    folders = (item for step in run_dir.scored_steps() for item in run_dir.eval(step).iterdir())
    return sorted({folder.name for folder in folders if (folder / SCORES).is_file()})


def text(summary: Summary) -> str:
    """Return a row for each step: the metrics over all examples, then the main metric of each task."""
    columns = [(ALL, name) for name in _metrics(summary, ALL)]
    tasks = [task for task in _tasks(summary) if task != ALL and task.split("/")[0] not in {*_tasks(summary)} - {task}]
    for task in tasks:
        names = _metrics(summary, task)
        wanted = summary.metric.removeprefix(f"{task}/")
        columns += [(task, name) for name in names if name == wanted] or [(task, name) for name in names[:1] or [""]]
    table = [["", "step", *(("* " if step == summary.best else "  ") + str(step) for step in summary.scores)]]
    over = ""
    for number, (task, name) in enumerate(columns):
        head = "" if number and columns[number - 1][0] == task else shorten(task, NAME)
        table.append([head, name, *(_shown(scores.get(task, {}), name) for scores in summary.scores.values())])
        if sum(_width(column) + 2 for column in table) > WIDTH and task != ALL:
            table.pop()
            over = f"{len(columns) - number} more tasks are in the files of --csv and --json"
            break
    rows = zip(*([f"{text:>{_width(column)}}" for text in column] for column in table), strict=True)
    lines = ["  ".join(row).rstrip() for row in rows] if summary.scores else []
    return "\n".join(lines + _notes(summary, over))


def _width(column: list[str]) -> int:
    return max(map(len, column))


def _notes(summary: Summary, over: str) -> list[str]:
    lines = []
    if not summary.scores:
        lines.append("no step is scored yet")
    elif summary.best is None:
        lines.append(f"no step has a score by {summary.metric} (config.eval.best)")
    else:
        is_kept = "is kept" if summary.best in summary.kept else "is not kept"
        lines.append(f"* best by {summary.metric}: step {summary.best}, whose checkpoint {is_kept}")
    if over:
        lines.append(over)
    for step, scores in summary.scores.items():
        for task, values in scores.items():
            lines += [f"step {step}: {task}: {why}" for why in values.get("errors", {}).values()]
    lines += [f"{file} cannot be read: {why}" for file, why in summary.unreadable.items()]
    if waiting := [step for step in summary.kept if step not in summary.scores]:
        lines.append(f"checkpoints without scores: {', '.join(map(str, waiting))}")
    if summary.names:
        lines.append(f"scores by other config files (--config): {', '.join(summary.names)}")
    return lines


def _tasks(summary: Summary) -> list[str]:
    return list(dict.fromkeys(task for scores in summary.scores.values() for task in scores))


def _metrics(summary: Summary, task: str) -> list[str]:
    """Return the metrics of a task in any step, without intervals and counts."""
    found = dict.fromkeys(name for scores in summary.scores.values() for name in scores.get(task, {}))
    return [name for name in found if name not in (*HIDDEN, "errors") and not name.endswith("_ci")]


def _shown(values: dict[str, Any], name: str) -> str:
    value = values.get(name)
    return cell(value, name) if isinstance(value, (int, float)) else "failed" if "errors" in values else ""


def to_json(summary: Summary) -> list[dict[str, Any]]:
    """Return a list with an object for each step."""
    return [
        {"step": step, "best": step == summary.best, "checkpoint": step in summary.kept, "scores": scores}
        for step, scores in summary.scores.items()
    ]


def to_csv(summary: Summary) -> str:
    """Return a row for each step, with columns "TASK/METRIC"."""
    rows = []
    for step, scores in summary.scores.items():
        row: dict[str, Any] = {"step": step, "best": int(step == summary.best)}
        for task, values in scores.items():
            for name, value in values.items():
                if name.endswith("_ci"):
                    row |= {f"{task}/{name}_low": value[0], f"{task}/{name}_high": value[1]}
                elif name != "errors":
                    row[f"{task}/{name}"] = value
        rows.append(row)
    out = io.StringIO()
    writer = csv.DictWriter(out, dict.fromkeys(name for row in rows for name in row), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return out.getvalue()
