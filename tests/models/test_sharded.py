"""Which axes of a weight are split, on meshes of any shape."""

import jax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jax_it import config, sharding
from jax_it.models import build
from jax_it.models.weights import flatten, is_matrix
from tests.parity import cases

SIZES = st.sampled_from([1, 2, 3, 4, 6, 8, 16])


@settings(max_examples=500, deadline=None, database=None, derandomize=True)
@given(
    st.lists(st.tuples(st.sampled_from("BTSDNKHFVLREXG"), st.integers(1, 97)), min_size=1, max_size=5),
    st.tuples(SIZES, SIZES, SIZES, SIZES, SIZES),
)
def test_an_axis_that_does_not_divide_stays_whole_and_no_part_of_the_mesh_is_used_twice(axes, sizes):
    mesh = jax.sharding.AbstractMesh(sizes, sharding.AXES)
    letters, shape = zip(*axes, strict=True)
    spec = sharding.spec(" ".join(letters), shape, mesh)
    assert len(spec) == len(shape)
    used = []
    for letter, size, entry in zip(letters, shape, spec, strict=True):
        names = (entry,) if isinstance(entry, str) else entry or ()
        parts = 1
        for name in names:
            parts *= mesh.shape[name]
        assert size % parts == 0
        assert set(names) <= set(sharding.RULES.get(letter, ()))
        used += names
    assert len(used) == len(set(used))
    jax.sharding.NamedSharding(mesh, spec).shard_shape(shape)  # and JAX agrees


@pytest.mark.parametrize(
    "letters, shape, wanted",
    [
        ("L D N H", (2, 32, 6, 8), [None, ("fsdp",), ("tensor",), None]),
        ("L D N H", (2, 32, 3, 8), [None, ("fsdp",), None, None]),  # three heads on two devices
        ("V D", (97, 32), [None, ("fsdp",)]),
        ("B T D", (8, 5, 32), [("data", "fsdp"), None, None]),  # the batch took fsdp before
        ("B T D", (2, 5, 32), [("data",), None, ("fsdp",)]),  # too small a batch leaves it
        ("D", (31,), [None]),
    ],
)
def test_axes_are_split_from_the_left_by_their_letters(letters, shape, wanted):
    mesh = jax.sharding.AbstractMesh((2, 2, 1, 1, 2), sharding.AXES)
    assert [(entry,) if isinstance(entry, str) else entry for entry in sharding.spec(letters, shape, mesh)] == wanted


def test_letters_that_do_not_name_every_axis_are_an_error():
    mesh = jax.sharding.AbstractMesh((2, 2, 1, 1, 2), sharding.AXES)
    with pytest.raises(ValueError, match="'V D' does not name the axes of shape \\(4,\\)"):
        sharding.spec("V D", (4,), mesh)


@pytest.mark.parametrize("case", cases.ALL, ids=lambda case: case.name)
def test_every_large_weight_of_every_family_is_split_over_fsdp_and_tensor(case):
    mesh = jax.sharding.AbstractMesh((1, 2, 1, 1, 2), sharding.AXES)
    model = build(case.values, case.name, config.Model())
    shapes = flatten(model.shapes)
    for path, weight in model.weights.items():
        shape = shapes[path].shape
        parts = shapes[path].size
        for size in jax.sharding.NamedSharding(mesh, sharding.spec(weight.logical_axes, shape, mesh)).shard_shape(
            shape
        ):
            parts //= size
        small = not is_matrix(weight.logical_axes) or weight.logical_axes in ("L D X", "P D")
        odd = any(size % 2 for size, letter in zip(shape, weight.logical_axes.split(), strict=True) if letter in "NKV")
        assert parts == 4 or small or (parts == 2 and odd), path
