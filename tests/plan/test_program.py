"""What is read in compiled programs, against counts made by other means: by hand, by numpy, by XLA itself."""

# ruff: noqa: E501 (programs, as XLA writes them)

import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from jax_it.models import splash_attention
from jax_it.plan.program import arrays_of, groups_of, parse, read


@pytest.fixture(scope="module")
def mesh():
    return jax.make_mesh((2, 4), ("a", "b"), axis_types=(jax.sharding.AxisType.Auto,) * 2)


def program(f, *shapes, mesh=None, specs=None, out=None):
    placed = {} if mesh is None else {"in_shardings": jax.tree.map(lambda s: NamedSharding(mesh, s), specs)}
    if out is not None:
        placed["out_shardings"] = NamedSharding(mesh, out)
    compiled = jax.jit(f, **placed).lower(*shapes).compile()
    return read(compiled.as_text(), 8 if mesh else 1), compiled


def array(*dims, dtype=jnp.float32):
    return jax.ShapeDtypeStruct(dims, dtype)


def collectives(program):
    return [(c.kind, c.runs, c) for region in program.regions for c in region.collectives]


def test_a_collective_in_a_loop_counts_once_for_each_turn(mesh):
    def f(x):
        return jax.lax.fori_loop(0, 7, lambda i, x: jax.lax.psum(x, "b") * 0.5, x)

    mapped = jax.shard_map(f, mesh=mesh, in_specs=P("a"), out_specs=P("a"), check_vma=False)
    found, _ = program(mapped, array(16, 32))
    ((kind, runs, each),) = collectives(found)
    assert (kind, runs, each.result_bytes, each.dtype) == ("all-reduce", 7, 8 * 32 * 4, "f32")
    assert sorted(map(sorted, each.groups)) == [[0, 1, 2, 3], [4, 5, 6, 7]]
    assert not each.asynchronous and not each.overlapped


def test_loops_within_loops_multiply(mesh):
    def f(x):
        def inner(x, _):
            return jnp.tanh(jax.lax.psum(x, "a")), None

        def outer(x, _):
            return jax.lax.ppermute(jax.lax.scan(inner, x, None, 3)[0], "b", [(i, (i + 1) % 4) for i in range(4)]), None

        return jax.lax.scan(outer, x, None, 5)[0]

    mapped = jax.shard_map(f, mesh=mesh, in_specs=P(), out_specs=P(), check_vma=False)
    found, _ = program(mapped, array(4, 4))
    counted = {kind: runs for kind, runs, _ in collectives(found)}
    assert counted == {"all-reduce": 15, "collective-permute": 5}
    (permuted,) = [each for kind, _, each in collectives(found) if kind == "collective-permute"]
    assert set(permuted.groups) == {(4 * a + i, 4 * a + (i + 1) % 4) for a in range(2) for i in range(4)}


@pytest.mark.parametrize(
    "operation, kind, size",
    [
        (lambda x: jax.lax.all_gather(x, "b", tiled=True), "all-gather", 8 * 4 * 6 * 4),
        (lambda x: jax.lax.psum_scatter(x, "b", tiled=True), "reduce-scatter", 2 * 6 * 4),
        (lambda x: jax.lax.all_to_all(x, "b", 0, 0, tiled=True), "all-to-all", 8 * 6 * 4),
    ],
)
def test_each_kind_has_the_size_of_its_result(mesh, operation, kind, size):
    mapped = jax.shard_map(operation, mesh=mesh, in_specs=P(), out_specs=P(), check_vma=False)
    found, _ = program(mapped, array(8, 6))
    ((named, runs, each),) = collectives(found)
    assert (named, runs, each.result_bytes) == (kind, 1, size)


def test_an_all_reduce_of_which_a_part_is_used_is_marked(mesh):
    text = """HloModule m
%add (a: f32[], b: f32[]) -> f32[] {
  %a = f32[] parameter(0)
  %b = f32[] parameter(1)
  ROOT %sum = f32[] add(%a, %b)
}
%cut (p: f32[64,8], i: s32[]) -> f32[8,8] {
  %p = f32[64,8]{1,0} parameter(0)
  %i = s32[] parameter(1)
  %z = s32[] constant(0)
  ROOT %d = f32[8,8]{1,0} dynamic-slice(%p, %i, %z), dynamic_slice_sizes={8,8}
}
ENTRY %main (x: f32[64,8], i: s32[]) -> f32[8,8] {
  %x = f32[64,8]{1,0} parameter(0)
  %i.1 = s32[] parameter(1)
  %r = f32[64,8]{1,0} all-reduce(%x), channel_id=1, replica_groups=[1,8]<=[8], to_apply=%add
  ROOT %f = f32[8,8]{1,0} fusion(%r, %i.1), kind=kLoop, calls=%cut
}
"""
    (region,) = read(text, 8).regions
    (each,) = region.collectives
    assert each.sliced and each.kind == "all-reduce" and each.result_bytes == 64 * 8 * 4
    # Read: the operand of the all-reduce, the slice and where it begins; written: the two results.
    assert region.memory_bytes == 2 * 64 * 8 * 4 + 2 * 8 * 8 * 4 + 4
    whole = text.replace(
        "ROOT %f = f32[8,8]{1,0} fusion(%r, %i.1), kind=kLoop, calls=%cut", "ROOT %f = f32[64,8]{1,0} negate(%r)"
    )
    assert not read(whole, 8).regions[0].collectives[0].sliced


def test_matmuls_in_loops_count_as_often_as_they_run():
    def f(w, x):
        return jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, w)[0]

    found, compiled = program(f, array(6, 32, 32), array(5, 32))
    assert sum(r.flops * r.runs for r in found.regions) == 6 * 2 * 5 * 32 * 32
    assert compiled.cost_analysis()["flops"] < 3 * 2 * 5 * 32 * 32  # which counts the loop's body once


@pytest.mark.parametrize("stride, pad, dilation", [(1, "SAME", 1), (2, "VALID", 1), (1, [(2, 1), (0, 3)], 2)])
def test_convolutions_cost_what_their_products_are(stride, pad, dilation):
    x, kernel = np.ones((2, 9, 11, 3), np.float32), np.ones((3, 2, 3, 4), np.float32)

    def f(x, kernel):
        return jax.lax.conv_general_dilated(
            x, kernel, (stride, stride), pad, lhs_dilation=(dilation, dilation),
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
        )  # fmt: skip

    found, compiled = program(f, x, kernel)
    assert any(op.kind == "convolution" for c in parse(compiled.as_text()).values() for op in c.ops)
    # With ones everywhere each result is the number of its products.
    assert sum(r.flops for r in found.regions) == 2 * float(f(x, kernel).sum())


def test_groups_are_read_in_every_form():
    assert groups_of("replica_groups={{0,2},{1,3}}, x={1}", 4) == ((0, 2), (1, 3))
    assert groups_of("replica_groups={}, x", 3) == ((0, 1, 2),)
    assert groups_of("replica_groups=[2,4]<=[8], x", 8) == ((0, 1, 2, 3), (4, 5, 6, 7))
    for dims, order in [((2, 4), (1, 0)), ((2, 2, 3), (2, 0, 1)), ((3, 4), (0, 1))]:
        ids = np.arange(math.prod(dims)).reshape(dims).transpose(order).reshape(-1, 2)
        text = f"replica_groups=[{len(ids)},2]<=[{','.join(map(str, dims))}]T({','.join(map(str, order))}), x"
        assert groups_of(text, ids.size) == tuple(map(tuple, ids.tolist()))


@pytest.mark.parametrize("chosen", [c for n in (1, 2) for c in itertools.combinations(range(3), n)])
def test_groups_of_mesh_axes_are_those_of_the_array_of_devices(chosen):
    sizes, order = (2, 4, 3), (1, 2, 0)
    ids = np.arange(24).reshape(3, 2, 4).transpose(order)  # of shape (2, 4, 3)
    rest = [axis for axis in range(3) if axis not in chosen]
    expected = ids.transpose([*rest, *chosen]).reshape(-1, math.prod(sizes[c] for c in chosen))
    axes = ",".join(f"'axis_{i}'={size}" for i, size in enumerate(sizes))
    names = ", ".join(f"'axis_{c}'" for c in chosen)
    text = f"replica_groups=mesh[{axes}], device_ids=([3,2,4]T(1,2,0)) {{{names}}}, use_global_device_ids=true"
    assert sorted(map(sorted, groups_of(text, 24))) == sorted(map(sorted, expected.tolist()))


def test_groups_of_a_part_of_a_mesh_axis():
    text = "replica_groups=mesh['x'=8] {'x':(2)2}, y"
    assert groups_of(text, 8) == ((0, 2), (1, 3), (4, 6), (5, 7))


TPU_LOOP = """HloModule m

%fused_start (p: bf16[8,64]) -> (bf16[8,64], bf16[64,64]) {
  %p = bf16[8,64]{1,0:T(8,128)(2,1)} parameter(0)
  %g.1 = bf16[64,64]{1,0:T(8,128)(2,1)S(1)} all-gather(%p), channel_id=5, replica_groups=[1,8]<=[8], dimensions={0}, frontend_attributes={chain_id="0"}
  ROOT %t.1 = (bf16[8,64]{1,0}, bf16[64,64]{1,0:T(8,128)(2,1)S(1)}) custom-call(%p, %g.1), custom_call_target="AsyncCollectiveStart"
}

%async_collective_fusion.1 (q: bf16[8,64], x: bf16[16,64], w: bf16[64,64]) -> bf16[16,64] {
  %q = bf16[8,64]{1,0:T(8,128)(2,1)} parameter(0)
  %x = bf16[16,64]{1,0:T(8,128)(2,1)} parameter(1)
  %w = bf16[64,64]{1,0:T(8,128)(2,1)} parameter(2)
  %g.2 = bf16[64,64]{1,0:T(8,128)(2,1)S(1)} all-gather(%q), channel_id=5, replica_groups=[1,8]<=[8], dimensions={0}, frontend_attributes={chain_id="0"}
  ROOT %c = bf16[16,64]{1,0:T(8,128)(2,1)} convolution(%x, %w), dim_labels=bf_io->bf
}

%body (s: (s32[], bf16[16,64], bf16[64,64])) -> (s32[], bf16[16,64], bf16[64,64]) {
  %s = (s32[]{:T(128)}, bf16[16,64]{1,0:T(8,128)(2,1)}, bf16[64,64]{1,0:T(8,128)(2,1)}) parameter(0)
  %i = s32[]{:T(128)} get-tuple-element(%s), index=0
  %one = s32[]{:T(128)} constant(1)
  %next = s32[]{:T(128)} add(%i, %one)
  %h = bf16[16,64]{1,0:T(8,128)(2,1)} get-tuple-element(%s), index=1
  %k = bf16[64,64]{1,0:T(8,128)(2,1)} get-tuple-element(%s), index=2
  %part = bf16[8,64]{1,0:T(8,128)(2,1)} slice(%k), slice={[0:8], [0:64]}
  %begin = (bf16[8,64]{1,0}, bf16[64,64]{1,0:T(8,128)(2,1)S(1)}) fusion(%part), kind=kCustom, calls=%fused_start
  %h.1 = bf16[16,64]{1,0:T(8,128)(2,1)} fusion(%part, %h, %k), kind=kOutput, calls=%async_collective_fusion.1
  ROOT %out = (s32[]{:T(128)}, bf16[16,64]{1,0:T(8,128)(2,1)}, bf16[64,64]{1,0:T(8,128)(2,1)}) tuple(%next, %h.1, %k)
}

%condition (s.1: (s32[], bf16[16,64], bf16[64,64])) -> pred[] {
  %s.1 = (s32[]{:T(128)}, bf16[16,64]{1,0:T(8,128)(2,1)}, bf16[64,64]{1,0:T(8,128)(2,1)}) parameter(0)
  %i.1 = s32[]{:T(128)} get-tuple-element(%s.1), index=0
  %n = s32[]{:T(128)} constant(24)
  ROOT %less = pred[]{:T(512)} compare(%i.1, %n), direction=LT
}

ENTRY %main (x.1: bf16[16,64], k.1: bf16[64,64]) -> bf16[16,64] {
  %x.1 = bf16[16,64]{1,0:T(8,128)(2,1)} parameter(0)
  %k.1 = bf16[64,64]{1,0:T(8,128)(2,1)} parameter(1)
  %zero = s32[]{:T(128)} constant(0)
  %start = (s32[]{:T(128)}, bf16[16,64]{1,0:T(8,128)(2,1)}, bf16[64,64]{1,0:T(8,128)(2,1)}) tuple(%zero, %x.1, %k.1)
  %loop = (s32[]{:T(128)}, bf16[16,64]{1,0:T(8,128)(2,1)}, bf16[64,64]{1,0:T(8,128)(2,1)}) while(%start), condition=%condition, body=%body
  ROOT %r = bf16[16,64]{1,0:T(8,128)(2,1)} get-tuple-element(%loop), index=1
}
"""


def test_a_collective_in_steps_within_fusions_is_one_that_runs_beside_compute():
    entry, loop = read(TPU_LOOP, 8).regions
    assert not entry.collectives
    (each,) = loop.collectives
    assert (each.kind, each.runs, each.result_bytes) == ("all-gather", 24, 64 * 64 * 2)
    assert each.asynchronous and each.overlapped
    assert loop.flops == 2 * 16 * 64 * 64


def test_a_loop_whose_end_is_not_told_counts_once_and_is_named():
    found = read(TPU_LOOP.replace("constant(24)", "parameter(1)"), 8)
    assert found.unknown_trip_counts == ["loop"] and [region.runs for region in found.regions] == [1, 1]
    assert not read(TPU_LOOP, 8).unknown_trip_counts


@pytest.mark.parametrize(
    "start, limit, step, direction, trip_count", [(0, 24, 1, "LT", 24), (3, 24, 2, "LT", 11), (0, 9, 1, "LE", 10),
    (12, 0, -3, "GT", 4), (12, 0, -3, "GE", 5), (0, 6, 1, "NE", 6)],
)  # fmt: skip
def test_a_trip_count_is_that_of_running_the_loop(start, limit, step, direction, trip_count):
    text = TPU_LOOP.replace("constant(0)", f"constant({start})").replace("constant(24)", f"constant({limit})")
    text = text.replace("%one = s32[]{:T(128)} constant(1)", f"%one = s32[]{{:T(128)}} constant({step})").replace(
        "direction=LT", f"direction={direction}"
    )
    goes_on = {"LT": int.__lt__, "LE": int.__le__, "GT": int.__gt__, "GE": int.__ge__, "NE": int.__ne__}[direction]
    at, run = start, 0
    while goes_on(at, limit):
        at, run = at + step, run + 1
    assert run == trip_count and read(text, 8).regions[1].runs == trip_count


SPLASH = """HloModule m

%other (p: f32[2]) -> f32[2] {
  ROOT %p = f32[2]{0} parameter(0)
}, execution_thread="sparsecore"

ENTRY %main (n: s8[1,GRID], q: bf16[3,4,LENGTH,128], k: bf16[3,2,LENGTH,128]) -> bf16[3,4,LENGTH,128] {
  %n = s8[1,GRID]{2,1,0:T(4,128)(4,1)S(1)} parameter(0)
  %q = bf16[3,4,LENGTH,128]{3,2,1,0} parameter(1)
  %k = bf16[3,2,LENGTH,128]{3,2,1,0} parameter(2)
  %a = bf16[3,4,LENGTH,128]{3,2,1,0} custom-call(%n, %n, %q, %k, %k), custom_call_target="tpu_custom_call", frontend_attributes={kernel_metadata={
"x":"{\\"block_q\\": 512}"
}}, metadata={op_name="jit(f)/splash_mha_KIND_segmented/pallas_call"}
  ROOT %r = bf16[3,4,LENGTH,128]{3,2,1,0} negate(%a)
}
"""


@pytest.mark.parametrize("length, window", [(4096, 0), (4096, 512), (4096, 513), (4096, 1024), (4096, 1500),
    (4096, 4096), (1024, 100), (768, 300), (512, 0), (384, 128)])  # fmt: skip
def test_splash_attention_multiplies_the_blocks_that_its_mask_visits(length, window):
    kernel = splash_attention._kernel(length, 4, window, 0.0, False)
    block = kernel.kwargs["block_sizes"].block_q
    distance = np.arange(length)[:, None] - np.arange(length)
    seen = (distance >= 0) & (distance < (window or length))
    visited = seen.reshape(length // block, block, length // block, block).any((1, 3)).sum()
    infos = {"fwd": (2, kernel.fwd_mask_info), "dq": (3, kernel.dq_mask_info), "dkv": (4, kernel.dkv_mask_info)}
    for kind, (products, info) in infos.items():
        grid = ",".join(map(str, info.data_next.shape[1:]))
        text = SPLASH.replace("KIND", kind).replace("GRID", grid).replace("LENGTH", str(length))
        (region,) = read(text, 8).regions
        assert region.flops == products * 2 * 3 * 4 * 128 * visited * block**2
        # The products' operands, and its result, which is read again and written negated.
        assert region.memory_bytes == 2 * 128 * length * (4 * (3 * 4) + 3 * 2)


def test_a_kernel_that_tells_its_flops_is_counted_by_them():
    cost = 'backend_config={"custom_call_config":{"cost_estimate":{"flops":"85899345920","transcendentals":"7"}}}'
    text = SPLASH.replace("GRID", "1,1").replace("LENGTH", "256").replace("splash_mha_KIND", "flash_attention_forward")
    (region,) = read(text.replace('/pallas_call"}', f'/pallas_call"}}, {cost}'), 8).regions
    assert region.flops == 85899345920


def test_a_collective_that_goes_on_within_a_loop_counts_where_it_began():
    begin = "%begin.0 = (bf16[8,64]{1,0}, bf16[64,64]{1,0:T(8,128)(2,1)S(1)}) fusion(%k.2), kind=kCustom, calls=%fused_start\n"
    text = TPU_LOOP.replace(
        "  %zero =", f"  %k.2 = bf16[8,64]{{1,0}} slice(%k.1), slice={{[0:8], [0:64]}}\n  {begin}  %zero ="
    )
    entry, loop = read(text, 8).regions
    assert [each.runs for each in entry.collectives] == [1] and not loop.collectives


SEND = """HloModule m
ENTRY %main (x: f32[64,8], y: f32[8,8]) -> f32[64,8] {
  %x = f32[64,8]{1,0} parameter(0)
  %y = f32[8,8]{1,0} parameter(1)
  %t = token[] after-all()
  %r = (f32[64,8]{1,0}, u32[], token[]) recv(%t), channel_id=1, is_host_transfer=true, frontend_attributes={_xla_host_transfer_rendezvous="all-reduce.7_0",_xla_megascale_transfer_type="ALL_REDUCE"}
  %s = (f32[64,8]{1,0}, u32[], token[]) send(%x, %t), channel_id=2, is_host_transfer=true, frontend_attributes={_xla_host_transfer_rendezvous="all-reduce.7_0",_xla_megascale_transfer_type="ALL_REDUCE"}
  BETWEEN
  %rd = (f32[64,8]{1,0}, token[]) recv-done(%r), channel_id=1, is_host_transfer=true
  ROOT %o = f32[64,8]{1,0} get-tuple-element(%rd), index=0
}
"""


@pytest.mark.parametrize(
    "between, overlapped", [("%m = f32[64,8]{1,0} dot(%x, %y), lhs_contracting_dims={1}", True), ("", False)]
)
def test_what_chips_hand_to_hosts_is_a_collective_between_slices(between, overlapped):
    (region,) = read(SEND.replace("BETWEEN", between), 8).regions
    (each,) = region.collectives
    assert (each.kind, each.groups, each.result_bytes) == ("all-reduce", (), 64 * 8 * 4)
    assert each.asynchronous and each.overlapped == overlapped


def test_memory_on_the_chip_is_no_traffic_of_main_memory():
    far = arrays_of("(bf16[4,8]{1,0:T(8,128)(2,1)}, f32[2]{0:T(128)S(1)}, /*index=2*/s32[]{:T(128)})")
    assert [(a.dtype, a.dims, a.on_chip, a.bytes) for a in far] == [
        ("bf16", (4, 8), False, 64), ("f32", (2,), True, 8), ("s32", (), False, 4)
    ]  # fmt: skip


@pytest.mark.parametrize("operation, moved", [
    ("(f32[64,8]{1,0:S(1)}, f32[64,8]{1,0}, u32[]{:S(2)}) copy-start(%x)", 64 * 8 * 4),
    ("(f32[64,8]{1,0}, f32[64,8]{1,0}, u32[]{:S(2)}) copy-start(%x)", 2 * 64 * 8 * 4),
    ("((f32[64,8]{1,0}), f32[16,8]{1,0:S(1)}, s32[]{:S(2)}) slice-start(%x), slice={[0:16], [0:8]}", 16 * 8 * 4),
    ("((f32[64,8]{1,0}), f32[16,8]{1,0}, s32[]{:S(2)}) slice-start(%x), slice={[0:16], [0:8]}", 2 * 16 * 8 * 4),
    ("((f32[64,8]{1,0:S(1)}), f32[16,8]{1,0}, s32[]{:S(2)}) slice-start(%near), slice={[0:16], [0:8]}", 16 * 8 * 4),
])  # fmt: skip
def test_an_asynchronous_copy_moves_what_it_copies(operation, moved):
    text = f"""HloModule m
ENTRY %main (x: f32[64,8], near: f32[64,8]) -> f32[64,8] {{
  %x = f32[64,8]{{1,0}} parameter(0)
  %near = f32[64,8]{{1,0:S(1)}} parameter(1)
  %c = {operation}
  ROOT %same = f32[64,8]{{1,0}} bitcast(%x)
}}
"""
    (region,) = read(text, 1).regions
    assert region.memory_bytes == moved


@pytest.mark.parametrize(
    "between, overlapped",
    [("%m = f32[64,8]{1,0} dot(%x, %y), lhs_contracting_dims={1}, rhs_contracting_dims={0}", True), ("", False)],
)
def test_a_started_collective_is_overlapped_if_something_runs_before_its_end(between, overlapped):
    text = f"""HloModule m
ENTRY %main (x: f32[64,8], y: f32[8,8]) -> f32[64,8] {{
  %x = f32[64,8]{{1,0}} parameter(0)
  %y = f32[8,8]{{1,0}} parameter(1)
  %s = (f32[8,8]{{1,0}}, f32[64,8]{{1,0}}) all-gather-start(%y), channel_id=1, replica_groups=[1,8]<=[8], dimensions={{0}}
  {between}
  ROOT %d = f32[64,8]{{1,0}} all-gather-done(%s)
}}
"""
    (region,) = read(text, 8).regions
    (each,) = region.collectives
    assert (each.asynchronous, each.overlapped, each.result_bytes) == (True, overlapped, 64 * 8 * 4)
