"""The tables of plans in tpu/README.md."""

import dataclasses
import json
import re
import sys
from pathlib import Path

import pytest

from jax_it.plan import to_json
from jax_it.plan.cost import RegionTime, Traffic
from jax_it.plan.plan import Memory, Plan
from tpu import plans

README = Path(__file__).parents[2] / "tpu" / "README.md"
GIB = 1 << 30
PLAN = Plan(
    topology="v5e:8x8", chip="v5e", devices=64, slices=1, mesh={"fsdp": 64}, model="t5", parameters=10, trained=10,
    rows=1024, row="1 x 512 + 128 tokens", tokens=655360,
    memory=Memory(GIB, 0, 2 * GIB, 0, GIB, 0, GIB, 0, 5 * GIB, 16 * GIB),
    model_flops=3e15, hardware_flops=4e15, memory_bytes=10**12,
    traffic=[
        Traffic("all-gather", "ICI", "bf16", 64, 24, 2 * 10**9, 0.5, True, True, False),
        Traffic("all-gather", "ICI", "bf16", 64, 24, 10**9, 0.25, True, True, False),
        Traffic("all-reduce", "DCN", "f32", 128, 1, 4 * 10**9, 0.25, False, False, True),
        Traffic("all-reduce", "ICI", "f32", 64, 1, 1000, 0.0, False, False, False),
    ],
    regions=[RegionTime("loop", 24, 1.0, 0.5, 0.75, 0.25)], unknown_trip_counts=[], seconds=1.25, utilization=0.6,
    compile_seconds=9.0, compile_work=90.0, tries=[],
)  # fmt: skip


@pytest.fixture
def folder(tmp_path):
    rows = [*plans.MODELS, *plans.SCALING, *(row for pair in plans.COMPILED for row in pair)]
    for row in rows:
        made = dataclasses.replace(PLAN, topology=row.topology, compile_work=30.0 if "small" in row.name else 90.0)
        (tmp_path / f"{row.name}.json").write_text(json.dumps(to_json(made)))
    return tmp_path


def test_the_tables_replace_what_stood_between_their_marks(folder, monkeypatch):
    readme = folder / "README.md"
    readme.write_text(f"before\n{plans.BEGIN}\nold\n{plans.END}\nafter\n")
    monkeypatch.setattr(sys, "argv", ["plans.py", str(readme), "--plans", str(folder)])
    plans.main()
    text = readme.read_text()
    assert text.startswith(f"before\n{plans.BEGIN}\n") and text.endswith(f"\n{plans.END}\nafter\n")
    assert "old" not in text
    plans.main()
    assert readme.read_text() == text


def test_what_was_not_made_is_left_out_on_demand(folder, monkeypatch):
    (folder / "flan_ul2.json").unlink()
    readme = folder / "README.md"
    readme.write_text(f"{plans.BEGIN}\n{plans.END}\n")
    monkeypatch.setattr(sys, "argv", ["plans.py", str(readme), "--plans", str(folder), "--made"])
    plans.main()
    assert "Flan-UL2" not in readme.read_text() and "Flan-T5-XXL" in readme.read_text()


def test_a_model_has_its_bound_and_all_its_collectives(folder):
    text = "\n".join(plans.lines(folder))
    assert (
        "| Flan-UL2 | v5e:8x8 | fsdp=64 | 1024 of 1 x 512 + 128 tokens | 5.0 of 16 | 1.25 | 1.00 | 0.50 | 0.75 | 0.25 |"
        " 60% |"
    ) in text
    assert "| Flan-UL2 | v5e:8x8 | ICI | all-gather bf16 among 64 | 3.00 | 0.750 | 48 | beside compute |" in text
    waits = "waits, only part of the result is used"
    assert f"| Flan-UL2 | v5e:8x8 | DCN | all-reduce f32 among 128 | 4.00 | 0.250 | 1 | {waits} |" in text
    assert "| Flan-UL2 | v5e:8x8 | | all others | 0.00 | 0.000 | 1 | |" in text
    assert "| v5e:8x8 | 30 | 90 | 3.0 |" in text
    assert "| v6e | 918 T | 32 GiB | 1640 GB/s | 4 | 100 GB/s | 12.5 GB/s |" in text


def test_every_table_has_as_many_cells_in_each_row(folder):
    columns = 0
    for line in plans.lines(folder):
        cells = len(re.findall(r"(?<!\\)\|", line))
        assert not columns or not cells or cells == columns
        columns = cells


def test_the_readme_has_a_place_for_the_tables():
    text = README.read_text(encoding="utf-8")
    assert text.count(plans.BEGIN) == text.count(plans.END) == 1


@pytest.mark.parametrize("row", [*plans.MODELS, *plans.SCALING, plans.SMALL], ids=lambda row: row.name)
def test_the_configs_of_the_tables_are_there(row):
    from jax_it import config

    assert config.load(row.config, {"model.path": row.model} if row.model else {}).model.path
