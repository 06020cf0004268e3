"""Plots a run's training loss and held-out scores: `python docs/plot_loss.py RUN FILE.svg`.

    make quickstart && .venv/bin/python docs/plot_loss.py runs/quickstart docs/quickstart.svg

The picture has no background and its colors are readable on white and on black, so one file serves light and dark.
"""

import json
import sys
from pathlib import Path

import matplotlib

matplotlib.use("svg")
import matplotlib.pyplot as plt

TEXT, LOSS, SCORE = "#737b85", "#3b82c4", "#d9772b"
METRIC = "rougeL"


def read(run: Path) -> tuple[list[tuple[int, float]], list[tuple[int, float]]]:
    """Returns (step, loss) of metrics.jsonl and (step, score over all examples) of eval/STEP/metrics.json."""
    lines = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    losses = [(line["step"], line["loss"]) for line in lines if "loss" in line]
    files = sorted((run / "eval").glob("*/metrics.json"), key=lambda file: int(file.parent.name))
    scores = [(int(file.parent.name), json.loads(file.read_text())["all"][METRIC]) for file in files]
    return losses, scores


def main(run: str, output: str) -> None:
    losses, scores = read(Path(run))
    plt.rcParams |= {
        "svg.fonttype": "none",  # text stays text
        "svg.hashsalt": "jax_it",  # the same run gives the same file
        "font.family": "sans-serif",
        "font.size": 12,
        "text.color": TEXT,
        "axes.labelcolor": TEXT,
        "axes.edgecolor": TEXT,
        "xtick.color": TEXT,
        "ytick.color": TEXT,
    }
    figure, left = plt.subplots(figsize=(6.2, 2.9))
    left.plot(*zip(*losses, strict=True), color=LOSS, linewidth=2)
    left.set_xlabel("step")
    left.set_ylabel("training loss (nats per token)", color=LOSS)
    left.set_yscale("log")
    left.yaxis.set_major_formatter("{x:g}")
    right = left.twinx()
    right.plot(*zip(*scores, strict=True), color=SCORE, linewidth=1, linestyle=":", marker="o")
    for step, score in scores:
        right.annotate(f"{score:.0f}", (step, score), (0, 7), textcoords="offset points", color=SCORE, ha="center")
    right.set_ylabel("ROUGE-L, held-out", color=SCORE)
    right.set_ylim(-4, 118)
    right.set_yticks(range(0, 101, 25))
    for axes in (left, right):
        axes.set_facecolor("none")
        axes.spines["top"].set_visible(False)
    figure.tight_layout()
    figure.savefig(output, transparent=True, metadata={"Date": None})


if __name__ == "__main__":
    main(*sys.argv[1:])
