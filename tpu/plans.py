"""The tables of plans in tpu/README.md: `python tpu/plans.py tpu/README.md [--plans FOLDER] [--made]`.

Each plan is compiled once and kept as JSON in the folder, so an interrupted command continues where it stopped.
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
    rows: int = 0  # per step; 0 for the config's batch_size
    model: str = ""  # replaces the config's


# One row of 4096 tokens per chip: what packing makes of several short conversations.
MODELS = [
    Row("flan_t5_xxl", "Flan-T5-XXL", "flan_t5:xxl", "v5e:8x8"),
    Row("flan_ul2", "Flan-UL2", "flan_t5:ul2", "v5e:8x8"),
    Row("llama3_1_8b", "Llama-3.1-8B", "causal_lm:llama-3.1-8b", "v5e:4x4", rows=16),
    Row("llama3_1_70b_v5p", "Llama-3.1-70B", "causal_lm:llama-3.1-70b", "v5p:4x4x4", rows=64),
    Row("llama3_1_70b_v6e", "Llama-3.1-70B", "causal_lm:llama-3.1-70b", "v6e:16x16", rows=256),
]
SCALING = [
    Row(f"flan_t5_xl_{chips}", "Flan-T5-XL", f"flan_t5:xl,{chips}", topology)
    for chips, topology in ((16, "v5e:4x4"), (64, "v5e:8x8"), (256, "v5e:16x16"))
]
SMALL = Row("flan_t5_small", "Flan-T5-small", "flan_t5:xxl", "v5e:8x8", model="google/flan-t5-small")
COMPILED: list[tuple[Row, ...]] = [(SMALL, MODELS[0])]  # and both on fake devices
COMPILED += [tuple(dataclasses.replace(row, name=f"{row.name}_cpu", topology="cpu:8") for row in COMPILED[0])]


def load(rows: Iterable[Row], folder: Path) -> list[tuple[Row, dict[str, Any]]]:
    """Return those of the rows whose plans are in the folder, with their plans."""
    files = [(row, folder / f"{row.name}.json") for row in rows]
    return [(row, json.loads(file.read_text())) for row, file in files if file.is_file()]


def lines(folder: Path) -> Iterator[str]:
    """Yield the tables of the plans in the folder, line by line."""
    plans = load(MODELS, folder)
    yield from _head(
        "model chips mesh rows_a_step GiB_a_chip seconds_at_least arithmetic memory collectives_beside_it that_wait "
        "utilization_at_most"
    )
    for row, found in plans:
        mesh = " × ".join(f"{axis}={size}" for axis, size in found["mesh"].items()) or "data=1"
        size = _gib(found) + ("" if found["fits"] else ", DOES NOT FIT")
        seconds = [f"{seconds:.2f}" for seconds in (found["seconds"], *found["time"].values())]
        rows = f"{found['rows']} of {found['row']}"
        yield _line(row.title, found["topology"], mesh, rows, size, *seconds, f"{found['utilization']:.0%}")
    yield ""
    yield "Bottlenecks: what keeps these bounds below the peak, as shares of the step's time:"
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
        "model chips GiB_a_chip GB_sent_beside_compute that_wait a_step_takes_at_least utilization_at_most"
    )
    for row, found in load(SCALING, folder):
        sent = {True: 0.0, False: 0.0}
        for each in found["traffic"]:
            sent[each["overlapped"]] += each["bytes"] / 1e9
        bound = f"{found['seconds']:.2f}", f"{found['utilization']:.0%}"
        yield _line(row.title, found["topology"], _gib(found), f"{sent[True]:.1f}", f"{sent[False]:.1f}", *bound)
    yield ""
    yield "Layers are one loop, however many there are. Compiling took, in seconds of one processor core:"
    yield ""
    yield from _head("compiled_for Flan-T5-small,_8_+_8_layers Flan-T5-XXL,_24_+_24_layers ratio")
    for pair in COMPILED:
        if len(both := load(pair, folder)) == 2:
            short, long = (found["compile_work"] for _, found in both)
            yield _line(pair[0].topology, f"{short:.0f}", f"{long:.0f}", f"{long / short:.1f}")
    yield ""
    yield "The published figures that the bounds are made of, one way where a link or network has two:"
    yield ""
    yield from _head("chip bfloat16_FLOP/s memory its_rate links each between_slices")
    for chip in {chip.name: chip for chip in CHIPS.values() if chip.links}.values():
        memory = f"{chip.memory / GIB:.0f} GiB", f"{chip.memory_rate / 1e9:.0f} GB/s"
        networks = str(chip.links), f"{chip.link_rate / 1e9:.0f} GB/s", f"{chip.network_rate / 1e9:.3g} GB/s"
        yield _line(chip.name, f"{chip.flops / 1e12:.0f} T", *memory, *networks)


def _line(*cells: str) -> str:
    return f"| {' | '.join(cells)} |"


def _head(columns: str) -> Iterator[str]:
    names = [name.replace("_", " ") for name in columns.split()]
    yield _line(*names)
    yield "|" + "---|" * len(names)


def _gib(found: dict[str, Any]) -> str:
    memory = found["memory"]
    return f"{memory['total'] / 2**30:.1f} of {memory['limit'] / 2**30:.0f}"


def _traffic_lines(row: Row, found: dict[str, Any]) -> Iterator[str]:
    small, where = [0.0, 0.0, 0], (row.title, found["topology"])
    for each in sorted(found["traffic"], key=lambda each: -each["bytes"]):
        sent, seconds, runs = each["bytes"] / 1e9, each["seconds"], each["runs"]
        if sent < 0.05:
            small = [a + b for a, b in zip(small, (sent, seconds, runs), strict=True)]
            continue
        kind = f"{each['kind']} {each['dtype']} among {each['devices']}"
        how = "beside compute" if each["overlapped"] else "asynchronous" if each["asynchronous"] else "waits"
        how += ", only part of the result is used" if each["wasteful"] else ""
        yield _line(*where, each["network"], kind, f"{sent:.2f}", f"{seconds:.3f}", str(runs), how)
    if small[2]:
        yield f"| {' | '.join(where)} | | all others | {small[0]:.2f} | {small[1]:.3f} | {small[2]} | |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("readme", type=Path)
    parser.add_argument("--plans", type=Path, default=Path("runs/plans"), help="the folder of the plans, as JSON")
    parser.add_argument(
        "--made", action="store_true", help="compile nothing; only make tables of the plans in the folder"
    )
    options = parser.parse_args()
    for row in [] if options.made else [*MODELS, *SCALING, *(row for pair in COMPILED for row in pair)]:
        file = options.plans / f"{row.name}.json"
        if not file.is_file():
            print(f"{row.title} on {row.topology} …", flush=True)
            file.parent.mkdir(parents=True, exist_ok=True)
            config = settings.load(row.config, {"model.path": row.model} if row.model else {})
            found = plan(config, find(row.topology), row.rows, file.with_suffix(".hlo"))
            write_atomically(file, to_json(found))
    before, _, rest = options.readme.read_text().partition(BEGIN)
    _, _, after = rest.partition(END)
    write_atomically(options.readme, "\n".join([before + BEGIN, *lines(options.plans), END + after]))


if __name__ == "__main__":
    main()
