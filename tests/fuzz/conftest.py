"""Seeded cases that try to break jax_it: `make fuzz`, and a short part of each suite among the default tests.

A suite calls `seeds.fuzz_cases` to parametrize its test over chunks of case seeds, runs each case, and
hands `tally` a kind and a description of each. `make fuzz SEED=7` draws other cases; the table at the end counts them.
"""

import os
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.fuzz.commands import Commands, Kind

KINDS = ("refused", "ran", "fault")


@pytest.fixture(scope="session")
def commands(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Commands]:
    """Runs `jax-it` commands in forked children."""
    server = Commands(Path(tmp_path_factory.mktemp("commands")))
    yield server
    server.close()


@pytest.fixture
def tally(record_property: Any, request: pytest.FixtureRequest) -> Callable[[Iterable[tuple[Kind, str]]], None]:
    """Counts (kind, description) of each case for the table, and fails with the descriptions of all faults."""

    def count(cases: Iterable[tuple[Kind, str]]) -> None:
        counts, faults = Counter[str](), []
        for kind, description in cases:
            counts[kind] += 1
            if kind == "fault":
                faults.append(description)
        record_property("fuzz", (request.function.__name__, dict(counts)))
        assert not faults, f"{len(faults)} fault(s):\n" + "\n".join(faults)

    return count


def pytest_terminal_summary(terminalreporter: Any) -> None:
    table: dict[str, Counter[str]] = {}
    for kind in ("passed", "failed"):
        for report in terminalreporter.stats.get(kind, []):
            for name, value in getattr(report, "user_properties", []):
                if name == "fuzz" and report.when == "call":
                    table.setdefault(value[0], Counter()).update(value[1])
    if not table:
        return
    terminalreporter.section(f"fuzzing, seed {os.environ.get('FUZZ_SEED', '0')}")
    for suite, counts in table.items():
        columns = "  ".join(f"{kind} {counts[kind]:5}" for kind in KINDS)
        terminalreporter.line(f"{suite:45} tried {sum(counts.values()):5}  {columns}")
