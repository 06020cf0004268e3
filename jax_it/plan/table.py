"""The tables of plans in tpu/README.md: `python -m jax_it.plan.table tpu/README.md [--plans FOLDER] [--only NAME]`.

Each plan is compiled once and kept as JSON in the folder, so that the command can go on where it was stopped.
"""

import argparse
import dataclasses
import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jax_it import config as settings
from jax_it.chips import CHIPS, GIB
from jax_it.files import write_atomically
from jax_it.plan.plan import plan
from jax_it.plan.text import to_json
from jax_it.plan.topology import find

BEGIN, END = "<!-- plans: begin -->", "<!-- plans: end -->"


@dataclass(frozen=True)
class Row:
    """A plan of the tables."""

    name: str
    title: str
    config: str
    topology: str
    rows: int = 0  # of a step; 0: the config's batch_size
    model: str = ""  # in place of the config's


# Rows of 4096 tokens are as many as the chips: what packing makes of several short conversations each.
MODELS = [
    Row("flan_t5_xxl", "Flan-T5-XXL", "configs/flan_t5_xxl.py", "v5e:8x8"),
    Row("flan_ul2", "Flan-UL2", "configs/flan_ul2.py", "v5e:8x8"),
    Row("llama3_1_8b", "Llama-3.1-8B", "configs/llama3_1_8b.py", "v5e:4x4", rows=16),
    Row("llama3_1_70b_v5p", "Llama-3.1-70B", "configs/llama3_1_70b.py", "v5p:4x4x4", rows=64),
    Row("llama3_1_70b_v6e", "Llama-3.1-70B", "configs/llama3_1_70b.py", "v6e:16x16", rows=256),
]
SCALING = [
    Row(f"flan_t5_xl_{chips}", "Flan-T5-XL", f"configs/flan_t5_xl.py:{chips}", topology)
    for chips, topology in ((16, "v5e:4x4"), (64, "v5e:8x8"), (256, "v5e:16x16"))
]
SMALL = Row("flan_t5_small", "Flan-T5-small", "configs/flan_t5_xxl.py", "v5e:8x8", model="google/flan-t5-small")
ON_CPU = "cpu:8"
COMPILED = [
    (SMALL, MODELS[0]),
    (
        dataclasses.replace(SMALL, name="flan_t5_small_cpu", topology=ON_CPU),
        dataclasses.replace(MODELS[0], name="flan_t5_xxl_cpu", topology=ON_CPU),
    ),
]


def compile_row(row: Row, folder: Path) -> None:
    """Writes a row's plan into the folder, if it is not there."""
    file = folder / f"{row.name}.json"
    if file.is_file():
        return
    print(f"{row.title} on {row.topology} …", flush=True)
    folder.mkdir(parents=True, exist_ok=True)
    config = settings.load(row.config, {"model.path": row.model} if row.model else {})
    write_atomically(file, to_json(plan(config, find(row.topology), row.rows, file.with_suffix(".hlo"))))


def made(rows: Iterable[Row], folder: Path) -> list[tuple[Row, dict[str, Any]]]:
    """The rows whose plans are in the folder, and these."""
    files = [(row, folder / f"{row.name}.json") for row in rows]
    return [(row, json.loads(file.read_text())) for row, file in files if file.is_file()]


def lines(folder: Path) -> Iterator[str]:
    """The tables of the plans that are in the folder, a line at a time."""
    plans = made(MODELS, folder)
    yield from _head(
        "model chips mesh rows_a_step GiB_a_chip seconds_at_least arithmetic memory collectives_beside_it that_wait "
        "utilisation_at_most"
    )
    yield from (_model_line(row, found) for row, found in plans)
    yield ""
    yield "What stands between these bounds and the peak, as shares of the step's time:"
    yield ""
    for row, found in plans:
        yield f"- {row.title} on {found['topology']}: {'; '.join(' '.join(o.split()) for o in found['obstacles'])}."
    yield ""
    yield "Every collective of these steps, in GB that a chip sends in a step:"
    yield ""
    yield from _head("model chips network kind GB seconds runs how")
    for row, found in plans:
        yield from _traffic_lines(row, found)
    yield ""
    yield "Weak scaling, 16 rows a chip:"
    yield ""
    yield from _head(
        "model chips GiB_a_chip GB_sent_beside_compute that_wait a_step_takes_at_least utilisation_at_most"
    )
    for row, found in made(SCALING, folder):
        beside, wait = _sent(found)
        bound = f"{found['seconds']:.2f} | {found['utilisation']:.0%}"
        yield f"| {row.title} | {found['topology']} | {_gib(found)} | {beside:.1f} | {wait:.1f} | {bound} |"
    yield ""
    yield "Layers are one loop, however many there are. Compiling took, in seconds of one processor core:"
    yield ""
    yield from _head("compiled_for Flan-T5-small,_8_+_8_layers Flan-T5-XXL,_24_+_24_layers ratio")
    for pair in COMPILED:
        if len(both := made(pair, folder)) == 2:
            short, long = (found["compile_work"] for _, found in both)
            yield f"| {pair[0].topology} | {short:.0f} | {long:.0f} | {long / short:.1f} |"
    yield ""
    yield "The published figures that the bounds are made of, one way where a link or network has two:"
    yield ""
    yield from _head("chip bfloat16_FLOP/s memory its_rate links each between_slices")
    for chip in {chip.name: chip for chip in CHIPS.values() if chip.links}.values():
        memory = f"{chip.memory / GIB:.0f} GiB | {chip.memory_rate / 1e9:.0f} GB/s"
        networks = f"{chip.links} | {chip.link_rate / 1e9:.0f} GB/s | {chip.network_rate / 1e9:.3g} GB/s"
        yield f"| {chip.name} | {chip.flops / 1e12:.0f} T | {memory} | {networks} |"


def _head(columns: str) -> Iterator[str]:
    names = [name.replace("_", " ") for name in columns.split()]
    yield f"| {' | '.join(names)} |"
    yield "|" + "---|" * len(names)


def _model_line(row: Row, found: dict[str, Any]) -> str:
    mesh = " × ".join(f"{axis}={size}" for axis, size in found["mesh"].items()) or "data=1"
    fits = "" if found["fits"] else ", DOES NOT FIT"
    cells = [row.title, found["topology"], mesh, f"{found['rows']} of {found['row']}", _gib(found) + fits]
    cells += [f"{seconds:.2f}" for seconds in (found["seconds"], *found["time"].values())]
    return f"| {' | '.join(cells)} | {found['utilisation']:.0%} |"


def _gib(found: dict[str, Any]) -> str:
    memory = found["memory"]
    return f"{memory['total'] / 2**30:.1f} of {memory['limit'] / 2**30:.0f}"


def _sent(found: dict[str, Any]) -> tuple[float, float]:
    """GB that a chip sends: in collectives that run beside other work, and in those that wait."""
    sums = {True: 0, False: 0}
    for each in found["traffic"]:
        sums[each["overlapped"]] += each["bytes"]
    return sums[True] / 1e9, sums[False] / 1e9


def _traffic_lines(row: Row, found: dict[str, Any]) -> Iterator[str]:
    sums: dict[tuple[str, ...], list[float]] = {}
    for each in found["traffic"]:
        way = "beside compute" if each["overlapped"] else "asynchronous" if each["asynchronous"] else "waits"
        note = way + (", of its result a part is used" if each["wasteful"] else "")
        key = (each["network"], f"{each['kind']} {each['dtype']} among {each['devices']}", note)
        entry = sums.setdefault(key, [0.0, 0.0, 0])
        entry[0] += each["bytes"] / 1e9
        entry[1] += each["seconds"]
        entry[2] += each["runs"]
    small, where = [0.0, 0.0, 0.0], f"{row.title} | {found['topology']}"
    for (network, kind, note), (sent, seconds, runs) in sorted(sums.items(), key=lambda pair: -pair[1][0]):
        if sent < 0.05:
            small = [a + b for a, b in zip(small, (sent, seconds, runs), strict=True)]
            continue
        yield f"| {where} | {network} | {kind} | {sent:.2f} | {seconds:.3f} | {runs:.0f} | {note} |"
    if small[2]:
        yield f"| {where} | | all others | {small[0]:.2f} | {small[1]:.3f} | {small[2]:.0f} | |"


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m jax_it.plan.table", description=__doc__)
    parser.add_argument("readme", type=Path)
    parser.add_argument("--plans", type=Path, default=Path("runs/plans"), help="where plans are kept as JSON")
    parser.add_argument("--only", help="compile this plan alone, and write no table")
    parser.add_argument("--made", action="store_true", help="compile nothing: tables of the plans that are there")
    options = parser.parse_args()
    for row in [*MODELS, *SCALING, *(row for pair in COMPILED for row in pair)]:
        if not options.made and options.only in (None, row.name):
            compile_row(row, options.plans)
    if options.only:
        return
    before, _, rest = options.readme.read_text().partition(BEGIN)
    _, _, after = rest.partition(END)
    write_atomically(options.readme, "\n".join([before + BEGIN, *lines(options.plans), END + after]))


if __name__ == "__main__":
    main()
