"""What an evaluation found: as files of the run's folder, and as text for people."""

import json
from pathlib import Path

from jax_it.checkpoint import write_atomically
from jax_it.errors import UserError
from jax_it.evaluation.evaluator import ALL, TRUNCATED, WITHOUT_REFERENCE, Scored


def write(folder: Path, scored: Scored) -> None:
    """predictions.jsonl and then metrics.json, whose presence says that the step is scored."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lines = [json.dumps(row, ensure_ascii=False) for row in scored.predictions]
        write_atomically(folder / "predictions.jsonl", "".join(f"{line}\n" for line in lines))
        write_atomically(folder / "metrics.json", scored.metrics)
    except OSError as error:
        raise UserError(f"cannot write {folder}: {error.strerror}; free space and evaluate again") from error


def table(scored: Scored) -> str:
    """A line for each task, and one for all."""
    overall = scored.metrics[ALL]
    names = [name for name in overall if name not in (WITHOUT_REFERENCE, TRUNCATED)]
    names.sort(key=lambda name: name == "n")
    width = max(len(task) for task in scored.metrics)
    lines = [" " * width + "".join(f"  {name:>11}" for name in names)]
    for task, values in scored.metrics.items():
        cells = (_cell(values.get(name), name) for name in names)
        lines.append(f"{task:<{width}}" + "".join(f"  {cell:>11}" for cell in cells))
    if skipped := overall.get(WITHOUT_REFERENCE):
        lines.append(f"{skipped:.0f} examples without a reference are left out")
    if truncated := overall.get(TRUNCATED):
        lines.append(f"{truncated:.0f} prompts are cut to the source length")
    return "\n".join(lines)


def _cell(value: float | None, name: str) -> str:
    if value is None:
        return ""
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
