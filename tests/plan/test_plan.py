"""Plans of small models for fake CPU devices, and for TPU slices where libtpu is installed."""

import dataclasses
import json
import math
import os
import re
import time
from collections import Counter

import jax
import jax.numpy as jnp
import pytest

from jax_it import config as settings
from jax_it import pretrained
from jax_it.chips import Chip
from jax_it.data.packing import Shape
from jax_it.errors import UserError
from jax_it.models import flash_attention, splash_attention
from jax_it.models.attention import Scores
from jax_it.models.relative_bias import RelativeBias
from jax_it.plan import compile as compiling
from jax_it.plan import cost, find, plan, text, to_json
from jax_it.plan import topology as topologies
from jax_it.plan.compile import TooLarge, build_step, bytes_of, compile_step
from jax_it.plan.cost import Traffic
from jax_it.plan.program import Collective, parse, read
from jax_it.plan.published import PUBLISHED
from jax_it.training import opening, step, train
from tests.tiny_run import fails

T5 = {
    "model_type": "t5", "vocab_size": 128, "d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 2, "num_heads": 4,
    "feed_forward_proj": "gated-gelu", "tie_word_embeddings": False, "dropout_rate": 0.0,
    "decoder_start_token_id": 0,
}  # fmt: skip
LLAMA = {
    "model_type": "llama", "vocab_size": 128, "hidden_size": 32, "head_dim": 8, "intermediate_size": 64,
    "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
}  # fmt: skip
needs_libtpu = pytest.mark.skipif(not topologies.has_libtpu(), reason="libtpu is not installed")


def make_config(architecture=T5, **changes):
    tree = settings.to_dict(settings.Config())
    tree["model"] |= {"pretrained": False, "architecture": architecture, "tokenizer": "bytes"}
    tree["data"] |= {
        "train": [{"path": "builtin:instructions"}],
        "packing": False,
    }
    seq2seq = architecture.get("model_type", "t5") == "t5"
    tree["data"] |= {"max_source_length": 32, "max_target_length": 16} if seq2seq else {"max_seq_length": 48}
    tree["train"] |= {"batch_size": 16, "duration": "100 steps"}
    tree["mesh"] |= {"data": 2, "fsdp": 2, "tensor": 2}
    for name, value in changes.items():
        *sections, field = name.split("__")
        section = tree
        for each in sections:
            section = section[each]
        section[field] = value
    return settings.resolve(tree)


@pytest.mark.parametrize(
    "architecture, changes",
    [
        (T5, {}),
        (LLAMA, {"train__optimizer__name": "adafactor"}),
        (LLAMA, {"model__lora__rank": 4}),
        (LLAMA, {"model__lora__rank": 4, "model__quantize": "nf4"}),
    ],
    ids=["t5", "llama", "lora", "qlora"],
)
def test_memory_by_parts_is_what_the_arrays_of_a_state_take(architecture, changes):
    config = make_config(architecture, **changes)
    topology = find("cpu:8")
    found = plan(config, topology).memory
    built = build_step(config, topology)
    with jax.set_mesh(built.mesh):
        _, params = pretrained.load(config.model, built.mesh)
        trained, frozen = built.model.split(params)
        start = jax.jit(
            lambda trained, frozen: step.start(trained, frozen, built.prepared.optimizer),
            out_shardings=built.prepared.shardings,
        )
        state = start(trained, frozen)

    def on_one_device(tree):
        return sum(leaf.addressable_shards[3].data.nbytes for leaf in jax.tree.leaves(tree))

    assert found.parameters == on_one_device(state.params)
    assert found.frozen == on_one_device(state.frozen)
    assert found.optimizer == on_one_device(state.optimizer)
    parts = (
        found.parameters, found.frozen, found.optimizer, found.batch, found.activations, found.gradients, found.other,
        found.code,
    )  # fmt: skip
    assert sum(parts) == found.total and min(parts) >= 0
    assert found.batch - on_one_device([state.step, state.skipped]) < 16 // 4 * (3 * 32 + 5 * 16) * 4 + 3000


def test_the_arithmetic_of_a_step_without_recomputation_is_the_models():
    found = plan(make_config(), find("cpu:8"))
    # Beside the matrix products XLA makes products of vectors of some sums, which do not depend on the layers' width.
    assert 1 <= found.hardware_flops / found.model_flops < 1.005
    again = plan(make_config(model__remat="layer"), find("cpu:8"))
    assert 1.2 < again.hardware_flops / found.hardware_flops < 4 / 3 + 0.005  # the head is not computed again
    assert again.memory.activations < found.memory.activations


def test_the_planned_step_is_the_step_of_the_loop(tmp_path, monkeypatch):
    config = make_config(
        T5 | {"num_layers": 1},
        data__packing=True, data__packed_source_length=64, data__packed_target_length=32,
        data__cache_dir=str(tmp_path / "cache"), train__duration="1 steps", train__gradient_accumulation_steps=2,
    )  # fmt: skip
    config = dataclasses.replace(
        config,
        model=dataclasses.replace(config.model, tokenizer="train", tokenizer_size=120),
        data=dataclasses.replace(config.data, max_truncated=1.0, train=config.data.train),
    )
    lowered, schedule = [], []

    def prepare(*arguments):
        schedule.extend(arguments[4:])  # how long the run is, which a plan need not know
        prepared = step.prepare(*arguments)

        def first(state, batch):
            lowered.append(prepared.step.lower(state, batch))
            return prepared.step(state, batch)

        return dataclasses.replace(prepared, step=first)

    monkeypatch.setattr(opening, "prepare", prepare)
    monkeypatch.setattr(compiling, "prepare", lambda *arguments: step.prepare(*arguments[:4], *schedule))
    train(config, tmp_path / "run")
    rows = jax.tree.leaves(lowered[0].in_avals)[-1].shape[0]
    built = build_step(config, find("cpu:8"), rows)
    assert built.rows == rows and built.shape == Shape(2, 32, 32)
    with jax.set_mesh(built.mesh):
        planned = built.prepared.step.lower(built.prepared.shapes, built.batch)

    def operations(lowered):
        """How many there are of each kind and shape; their names and order may differ."""
        computations = parse(lowered.compile().as_text()).values()
        return Counter((op.kind, re.sub(r"\{.*?\}", "", op.shape)) for c in computations for op in c.ops)

    assert operations(planned) == operations(lowered[0])


@pytest.mark.parametrize(
    "changes, rows, shape, number",
    [
        ({}, 0, Shape(1, 32, 16), 16),
        ({"train__batch_size": 9}, 0, Shape(1, 32, 16), 12),
        ({"train__gradient_accumulation_steps": 3}, 0, Shape(1, 32, 16), 24),
        (
            {"data__packed_source_length": 96, "data__packed_target_length": 24, "data__packing": True},
            5, Shape(3, 32, 24), 8,
        ),
    ],
)  # fmt: skip
def test_rows_are_full_and_padded_to_what_divides(changes, rows, shape, number):
    built = build_step(make_config(**changes), find("cpu:8"), rows)
    assert (built.shape, built.rows) == (shape, number)
    assert built.batch.targets_BT.shape == (number, shape.target)


def test_a_causal_row_is_a_sequence():
    built = build_step(make_config(LLAMA), find("cpu:8"))
    assert built.batch.tokens_BT.shape == (16, 48)


def small(memory):
    """Eight fake devices with so many bytes of memory each."""
    return dataclasses.replace(find("cpu:8"), chip=Chip("small", 1e12, memory, 1e11, 1e9, 2, 0, 1e9))


def test_a_plan_that_does_not_fit_proposes_settings_of_which_it_does():
    config = make_config(LLAMA, data__max_seq_length=256, train__batch_size=64)
    needed = plan(config, find("cpu:8")).memory.total
    topology = small(needed // 3)
    found = plan(config, topology)
    assert not found.fits and "IT DOES NOT FIT" in text(found)
    assert found.tries and found.tries[-1].fits and not any(tried.fits for tried in found.tries[:-1])
    proposed = config
    for name, value in found.tries[-1].settings.items():
        section, field = name.rsplit(".", 1)
        inner = getattr(proposed, section)
        proposed = dataclasses.replace(proposed, **{section: dataclasses.replace(inner, **{field: value})})
    again = plan(proposed, topology)
    assert again.fits and again.memory.total == found.tries[-1].total
    assert f"--config.{name}={value}" in text(found)


def test_what_no_settings_make_fit_is_said():
    found = plan(make_config(), small(1000))
    assert not found.fits and not found.tries
    assert "no settings were found that fit" in text(found)


def device(id, coords=None, slice_index=None):
    fields = {"id": id, "platform": "tpu"} | ({} if coords is None else {"coords": coords})
    fields |= {} if slice_index is None else {"slice_index": slice_index}
    return type("Device", (), fields)()


def one(kind, result_bytes, groups, devices, chip, **more):
    topology = topologies.Topology("t", tuple(devices), chip)
    collective = Collective(kind, "f32", result_bytes, groups, 3, False, False, **more)
    return list(cost.of_collective(collective, topology, devices))


CHIP = Chip("v", 1e12, 1, 1e12, 10.0, 4, 4, 2.0)  # a dimension of 4 is a ring; links of 10 B/s, the network 2 B/s
GRID = [device(8 * x + y, (x, y, 0)) for x in range(4) for y in range(8)]


@pytest.mark.parametrize(
    "kind, size, members, sent, seconds",
    [
        # 8 in a dimension that is a ring (a multiple of 4): both directions
        ("all-gather", 80, range(8), 70, 70 / 20),
        ("reduce-scatter", 10, range(8), 70, 70 / 20),
        ("all-reduce", 80, range(8), 140, 140 / 20),
        ("all-to-all", 80, range(8), 70, 80 * 8 / 8 / 10),
        # half of that dimension is a line
        ("all-gather", 80, range(4), 60, 60 / 10),
        ("all-to-all", 80, range(4), 60, 80 * 4 / 4 / 10),
        # both dimensions: the links of both
        ("all-gather", 320, range(32), 310, 310 / 40),
    ],
)
def test_a_collective_takes_as_long_as_the_links_of_its_group_need(kind, size, members, sent, seconds):
    (found,) = one(kind, size, (tuple(members),), GRID, CHIP)
    assert found.network == "ICI"
    assert (found.bytes, found.seconds) == (pytest.approx(3 * sent), pytest.approx(3 * seconds))


def test_between_slices_each_chip_sends_its_part_over_the_network():
    devices = [device(i, (i % 4, 0, 0), i // 4) for i in range(8)]
    within, between = one("all-reduce", 80, (tuple(range(8)),), devices, CHIP)
    assert (within.network, within.bytes) == ("ICI", 3 * 2 * 60)
    assert (between.network, between.bytes, between.seconds) == ("DCN", 3 * 2 * 10, pytest.approx(3 * 20 / 2))
    (alone,) = one("all-reduce", 80, ((0, 4), (1, 5)), devices, CHIP)
    assert (alone.network, alone.bytes) == ("DCN", 3 * 80)
    (moved,) = one("collective-permute", 80, ((0, 4), (4, 0)), devices, CHIP)
    assert moved.network == "DCN"
    (moved,) = one("collective-permute", 80, ((0, 1), (1, 0)), devices, CHIP)
    assert (moved.network, moved.seconds) == ("ICI", 3 * 8)
    assert not one("collective-permute", 80, ((0, 0), (1, 1)), devices, CHIP)
    (handed,) = one("all-reduce", 80, (), devices, CHIP)
    assert (handed.network, handed.bytes, handed.seconds) == ("DCN", 3 * 80, pytest.approx(3 * 80 / 2))


def test_the_bound_is_the_slowest_of_what_overlaps_and_all_that_waits():
    share = cost.RegionTime("loop", 2, compute=3.0, memory=2.0, overlapped=1.0, blocking=0.5)
    assert share.seconds == 3.5
    assert dataclasses.replace(share, memory=4.0).seconds == 4.5
    assert dataclasses.replace(share, overlapped=5.0).seconds == 5.5


def test_a_plan_is_written_as_json_too(tmp_path, capsys):
    from tests.tiny_run import write_recipe

    recipe = write_recipe(tmp_path)
    from jax_it.cli import main

    command = ["plan", "--config", str(recipe), "--topology", "cpu:8", "--config.mesh.fsdp=4"]
    with pytest.raises(SystemExit) as exit:
        main([*command, "--json", str(tmp_path / "plan.json"), "--hlo", str(tmp_path / "plan.hlo")])
    assert exit.value.code == 0
    assert "cpu:8: 8 devices (cpu), data=2 x fsdp=4" in capsys.readouterr().out
    found = json.loads((tmp_path / "plan.json").read_text())
    assert found["fits"] and found["mesh"] == {"data": 2, "fsdp": 4}
    assert all(isinstance(each["bytes"], int) for each in found["traffic"])
    assert (tmp_path / "plan.hlo").read_text().startswith("HloModule")


@pytest.mark.parametrize(
    "arguments, message",
    [
        (("--topology", "v5e"), "--topology v5e is not one; write for example v5e:8x8"),
        (("--topology", "cpu:x"), "--topology cpu:x with --slices 1 is not 1 to"),
        (("--topology", "cpu:8", "--config.mesh.tensor=3"), "config.mesh: tensor=3 does not fit 8 device(s)"),
        (("--topology", "cpu:4096"), "--topology cpu:4096: this process has 8 CPU device(s), and 4096 are needed"),
    ],
)
def test_what_cannot_be_planned_is_said_in_one_line(tmp_path, capsys, arguments, message):
    from tests.tiny_run import write_recipe

    assert message in fails(capsys, "plan", "--config", str(write_recipe(tmp_path)), *arguments)


def test_without_libtpu_a_tpu_cannot_be_planned(monkeypatch):
    monkeypatch.setattr(topologies, "has_libtpu", lambda: False)
    with pytest.raises(UserError, match=r"v5e:8x8 needs libtpu.*pip install 'jax-it\[tpu\]'"):
        find("v5e:8x8")


@needs_libtpu
@pytest.mark.parametrize("name", ["v9:2x2", "v5e:3x4x5x6", "v5p:3x3x3"])
def test_a_slice_that_is_not_made_is_refused(name):
    with pytest.raises(UserError, match=f"--topology {name} is "):
        find(name)


@needs_libtpu
@pytest.mark.parametrize(
    "name, slices, shape, chip, rings",
    [
        ("v5e:4x4", 2, (4, 4, 1), "v5e", []),
        ("v5e:16x16", 1, (16, 16, 1), "v5e", [0, 1]),
        ("v4:2x2x4", 1, (2, 2, 4), "v4", [2]),
        ("v5p:4x4x4", 1, (4, 4, 4), "v5p", [0, 1, 2]),
        ("v6e:1x1", 1, (1, 1, 1), "v6e", []),
    ],
)
def test_a_described_slice_has_its_chips_and_rings(name, slices, shape, chip, rings):
    found = find(name, slices)
    assert len(found.devices) == slices * math.prod(shape)  # one a chip
    assert (found.shape, found.slices, found.chip.name) == (shape, slices, chip)
    assert [d for d in range(3) if found.is_ring(d)] == rings


@needs_libtpu
def test_a_step_compiles_for_a_slice_that_is_not_there():
    length = 128  # the kernel's tiles
    config = make_config(
        mesh__data=1, mesh__fsdp=4, mesh__tensor=1, data__max_source_length=length, data__max_target_length=length
    )
    found = plan(config, find("v5e:2x2"))
    assert found.fits and found.devices == 4 and 0 < found.utilization < 1
    # The kernel computes the scores again for the gradients: one product for each of three attentions of both layers.
    again = 2 * 16 * T5["num_heads"] * T5["d_kv"] * length**2 * (3 * T5["num_layers"])
    assert found.hardware_flops == pytest.approx(found.model_flops + again, rel=0.02)
    assert {t.network for t in found.traffic} == {"ICI"}
    # Each chip must at least be sent the weights that it lacks, in bfloat16, and send its gradients as such.
    weights = 2 * found.parameters * 3 // 4
    assert sum(t.bytes for t in found.traffic) > 2 * weights
    assert "a step takes at least" in text(found) and to_json(found)["fits"]


@needs_libtpu
@pytest.mark.parametrize("window, visited", [(0, 10), (300, 7), (1024, 9)])
def test_fused_attention_as_a_tpu_runs_it_counts_the_blocks_that_it_visits(window, visited):
    on_one = jax.sharding.SingleDeviceSharding(find("v5e:2x2").devices[0])
    shapes = [((2, 2048, heads, 128), jnp.bfloat16) for heads in (4, 2, 2)] + [((2, 2048), jnp.int32)]

    def loss(query, key, value, segments):
        return splash_attention.attend(query, key, value, segments, window=window).astype(jnp.float32).sum()

    lowered = jax.jit(jax.grad(loss, (0, 1, 2))).lower(*(jax.ShapeDtypeStruct(*s, sharding=on_one) for s in shapes))
    regions = read(lowered.compile().as_text(), 1).regions
    products = 2 + 3 + 4  # forward, gradient of queries, gradients of keys and values
    one = 2 * (2 * 4) * 512 * 512 * 128
    assert sum(region.flops * region.runs for region in regions) == products * visited * one


@needs_libtpu
@pytest.mark.parametrize("chip", ["v5e", *(pytest.param(chip, marks=pytest.mark.slow) for chip in ("v5p", "v6e"))])
def test_t5s_attention_compiles_for_a_tpu_in_one_kernel(chip):
    on_one = jax.sharding.SingleDeviceSharding(find(f"{chip}:2x2x1" if chip == "v5p" else f"{chip}:2x2").devices[0])
    rows, heads, head_dim = 2, 4, 64

    def flops(length, keys, causal, bias):
        relative, scores = RelativeBias(32, 128, not causal, per_layer=False), Scores(dropout=0.1)

        def loss(query, key, value, table, segments, key_segments, dropout_key):
            return flash_attention.attend(
                query, key, value, scores, segments, key_segments, causal=causal, dropout_key=dropout_key,
                bias=relative.by_distance(table, length) if bias else None,
            ).astype(jnp.float32).sum()  # fmt: skip

        query, key = ((rows, positions, heads, head_dim) for positions in (length, keys))
        shapes = [(shape, jnp.bfloat16) for shape in (query, key, key)] + [((32, heads), jnp.float32)]
        shapes += [((rows, length), jnp.int32), ((rows, keys), jnp.int32), ((2,), jnp.uint32)]
        lowered = jax.jit(jax.grad(loss, (0, 1, 2, 3))).lower(
            *(jax.ShapeDtypeStruct(*shape, sharding=on_one) for shape in shapes)
        )
        text = lowered.compile().as_text()
        assert not re.search(rf"\[({rows},)?{heads},{length},{keys}\]", text)
        return sum(region.flops * region.runs for region in read(text, 1).regions)

    one = (2 + 5) * 2 * rows * heads * head_dim  # products of a score, forward and backward
    bias = 2 * 2 * 32 * heads  # of a distance: its bucket's number, and the gradient of that
    # An encoder, three quarters of whose four tiles are on or below the diagonal; a decoder of that length; a source.
    assert flops(1024, 1024, False, True) == pytest.approx(one * 1024**2 + bias * 2048, rel=0.01)
    assert flops(1024, 1024, True, True) == pytest.approx(one * 3 * 512**2 + bias * 2048, rel=0.01)
    assert flops(232, 1536, False, False) == pytest.approx(one * 256 * 1536, rel=0.01)


@needs_libtpu
def test_a_described_slice_leaves_the_environment_as_it_was():
    before = dict(os.environ)
    find("v5e:2x2")
    assert dict(os.environ) == before


@needs_libtpu
def test_between_slices_go_the_gradients_of_each_chips_part():
    found = plan(make_config(mesh__data=2, mesh__fsdp=4, mesh__tensor=1), find("v5e:2x2", 2))
    assert (found.slices, found.devices) == (2, 8)
    sent = sum(each.bytes for each in found.traffic if each.network == "DCN")
    # In bfloat16 or float32; besides, few numbers.
    assert 2 * found.parameters / 4 < sent < 1.1 * 4 * found.parameters / 4
    assert all(each.kind == "all-reduce" for each in found.traffic if each.network == "DCN")
    assert any(each.network == "ICI" for each in found.traffic)


@needs_libtpu
def test_auto_means_bfloat16_on_a_tpu():
    on_tpu = build_step(make_config(mesh__tensor=1, mesh__fsdp=-1, mesh__data=1), find("v5e:2x2"))
    assert on_tpu.model.options.dtype == jnp.bfloat16
    assert build_step(make_config(), find("cpu:8")).model.options.dtype == jnp.float32


@pytest.mark.slow
def test_a_larger_number_of_layers_makes_no_larger_program():
    sizes, seconds = [], []
    for layers in (8, 24):
        config = make_config(T5 | {"num_layers": layers}, model__remat="layer")
        built = build_step(config, find("cpu:8"))
        tries = []
        for _ in range(2):
            jax.clear_caches()
            begin = time.process_time()
            compiled = compile_step(built)
            tries.append(time.process_time() - begin)
        seconds.append(min(tries))
        sizes.append(sum(len(c.ops) for c in parse(compiled.text).values()))
    assert sizes[1] <= 1.02 * sizes[0]
    assert seconds[1] <= 1.5 * seconds[0]


@pytest.mark.parametrize("name, billions", [
    ("google/flan-t5-small", 0.077), ("google/flan-t5-xxl", 11.1), ("google/flan-ul2", 19.5),
    ("meta-llama/Llama-3.1-8B", 8.03), ("meta-llama/Llama-3.1-70B-Instruct", 70.6),
])  # fmt: skip
def test_known_models_have_their_published_size(name, billions):
    config = make_config({}, model__path=name)
    from jax_it.plan.compile import find_model

    assert name in PUBLISHED
    assert find_model(config, find("cpu:1")).parameter_count / 1e9 == pytest.approx(billions, rel=0.01)


@pytest.mark.parametrize(
    "message",
    [
        "Ran out of memory on HBM, the memory required for HLO temporaries (27.95G) exceeds available HBM (15.75G).",
        "Ran out of memory in memory space hbm. Used 27.95G of 15.75G hbm. Exceeded hbm capacity by 12.2G.",
    ],
)
def test_a_compilers_refusal_is_read(message):
    class Lowered:
        def lower(self, *arguments):
            return self

        def compile(self):
            raise RuntimeError(f"RESOURCE_EXHAUSTED: {message}")

    built = build_step(make_config(), find("cpu:8"))
    refused = dataclasses.replace(built, prepared=dataclasses.replace(built.prepared, step=Lowered()))
    with pytest.raises(TooLarge) as error:
        compile_step(refused)
    assert (error.value.needed, error.value.limit) == (int(27.95 * 2**30), int(15.75 * 2**30))
    message = "something else"
    with pytest.raises(RuntimeError, match="something else"):
        compile_step(refused)


def test_bytes_are_those_of_one_shard():
    mesh = jax.make_mesh((2, 4), ("a", "b"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
    place = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("a", "b"))
    assert bytes_of([jax.ShapeDtypeStruct((6, 8), "bfloat16")], [place]) == 3 * 2 * 2


def test_collectives_of_one_kind_are_summed():
    from jax_it.plan.text import by_kind

    each = Traffic("all-gather", "ICI", "bf16", 8, 24, 100, 1.0, True, True, False)
    (found,) = by_kind([each, dataclasses.replace(each, bytes=50)])
    assert (found.bytes, found.seconds, found.runs, found.ops) == (150, 2.0, 48, 2)
