"""The pages that users read, and the commands in them."""

import re
import shlex
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[2]
PAGES = sorted(
    file.relative_to(ROOT)
    for file in [*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md"), ROOT / "tpu" / "README.md"]
    if "_build" not in file.parts
)

FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
PLACEHOLDER = re.compile(r"\b[A-Z]{3,}\b|…")  # in a command that only shows its form: NAME, RUN


def blocks(page: Path, language: str) -> list[str]:
    """The fenced blocks of a language on a page, in their order."""
    return [body for found, body in FENCE.findall((ROOT / page).read_text(encoding="utf-8")) if found == language]


def commands(page: Path) -> Iterator[list[str]]:
    """The words of each jax-it and make command on a page, in blocks and in code within the text."""
    text = (ROOT / page).read_text(encoding="utf-8")
    lines = [line for _, body in FENCE.findall(text) for line in body.replace("\\\n", " ").splitlines()]
    lines += [" ".join(code.split()) for code in re.findall(r"`([^`]+)`", FENCE.sub("", text))]
    for line in lines:
        if re.match(r"(\S*/)?(jax-it|make) ", line.strip()):
            # A bucket's name is checked only where the libraries for it are installed.
            yield [word.replace("gs://", "runs/") for word in shlex.split(line, comments=True)]
