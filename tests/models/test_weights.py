"""The weight table: what a line says of the two layouts, and that any part of an array can be cut out by itself."""

import math
import re

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jax_it import config, sharding
from jax_it.models import build
from jax_it.models.weights import WeightSpec, flatten, unflatten
from jax_it.pretrained.sharded import gather_tensors
from tests.parity import cases

SIZES = {"L": 3, "V": 12, "D": 8, "N": 6, "K": 2, "H": 5, "F": 10, "E": 7, "X": 4, "P": 9}


def table():
    """One weight of each letters and layout that any family has."""
    lines = {}
    for case in cases.ALL:
        for weight in build(case.values, case.name, config.Model()).weights.values():
            lines[weight.logical_axes, weight.layout] = weight
    return list(lines.values())


TABLE = table()
ANY_WEIGHT = pytest.mark.parametrize("weight", TABLE, ids=lambda weight: f"{weight.logical_axes} <- {weight.layout}")


def is_part(weight):
    """Whether other weights share its tensors."""
    return "+" in weight.layout or "/" in weight.layout


def example(weight):
    """Its shape, and Transformers' tensors with entries that are all different."""
    shape = tuple(SIZES[letter] for letter in weight.logical_axes.split())
    one = weight.tensor_shape(shape)
    size = math.prod(one)
    return shape, {
        name: np.arange(i * size, (i + 1) * size, dtype=np.float32).reshape(one)
        for i, name in enumerate(weight.names(shape))
    }


def whole(shape):
    return tuple(slice(None) for _ in shape)


def test_the_table_has_every_letter_that_sharding_splits_in_weights():
    assert {letter for weight in TABLE for letter in weight.logical_axes.split()} >= set(sharding.RULES) - {"B", "T"}


def kind(letters, layout):
    """A layout whatever the sizes of what is beside its part of a tensor."""
    return letters, re.sub(r"\d+(?=\+)|(?<=\+)\d+", "#", layout)


@pytest.mark.parametrize(
    "letters, layout, place",
    [
        ("V D", "V D", lambda v, d: (v, d)),
        ("D", "D", lambda d: (d,)),
        ("L D", "D", lambda layer, d: (d,)),
        ("E N", "E N", lambda e, n: (e, n)),
        ("L E N", "E N", lambda layer, e, n: (e, n)),
        ("L D F", "F D", lambda layer, d, f: (f, d)),
        ("L F D", "D F", lambda layer, f, d: (d, f)),
        ("L D N H", "(N H) D", lambda layer, d, n, h: (n * SIZES["H"] + h, d)),
        ("L N H D", "D (N H)", lambda layer, n, h, d: (d, n * SIZES["H"] + h)),
        ("L N H D", "(N H) D", lambda layer, n, h, d: (n * SIZES["H"] + h, d)),
        ("L D K H", "(K H) D", lambda layer, d, k, h: (k * SIZES["H"] + h, d)),
        ("P D", "P D", lambda p, d: (p, d)),
        # Experts, of which each has tensors of its own.
        ("L D X", "X D", lambda layer, d, x: (x, d)),
        ("L X D F", "F D", lambda layer, x, d, f: (f, d)),
        ("L X F D", "D F", lambda layer, x, f, d: (d, f)),
        # Parts of a tensor: what stands before and after, in whichever axis ...
        ("L D N H", "(N H)+8 D", lambda layer, d, n, h: (n * SIZES["H"] + h, d)),
        ("L D K H", "64+(K H)+32 D", lambda layer, d, k, h: (64 + k * SIZES["H"] + h, d)),
        ("L D K H", "7+(K H) D", lambda layer, d, k, h: (7 + k * SIZES["H"] + h, d)),
        ("L D F", "F+10 D", lambda layer, d, f: (f, d)),
        ("L D F", "10+F D", lambda layer, d, f: (10 + f, d)),
        ("L D K H", "D 11+(K H)+3", lambda layer, d, k, h: (d, 11 + k * SIZES["H"] + h)),
        ("L K H", "11+(K H)+3", lambda layer, k, h: (11 + k * SIZES["H"] + h,)),
        # ... and every third run of a head's entries.
        ("L D N H", "(N 0/3 H) D", lambda layer, d, n, h: (3 * n * SIZES["H"] + h, d)),
        ("L D K H", "(K 1/3 H) D", lambda layer, d, k, h: ((3 * k + 1) * SIZES["H"] + h, d)),
        ("L D K H", "(K 2/3 H) D", lambda layer, d, k, h: ((3 * k + 2) * SIZES["H"] + h, d)),
        ("L K H", "(K 2/3 H)", lambda layer, k, h: ((3 * k + 2) * SIZES["H"] + h,)),
    ],
)
def test_each_entry_comes_from_the_place_that_the_layout_says(letters, layout, place):
    name = "layer" + ".{L}" * letters.startswith("L ") + ".{X}" * letters.startswith("L X ")
    weight = WeightSpec(letters, name, layout)
    assert kind(letters, layout) in {kind(line.logical_axes, line.layout) for line in TABLE}
    shape, tensors = example(weight)
    array = weight.cut(shape, whole(shape), lambda name, slices: tensors[name][slices])
    assert array.shape == shape
    for index in np.ndindex(shape):
        tensor = tensors[weight.name.format(**dict(zip(letters.split(), index, strict=True)))]
        assert array[index] == tensor[place(*index)]


def test_stacked_tensors_are_named_in_the_order_of_the_array():
    weight = WeightSpec("L X D F", "layer.{L}.expert.{X}", "F D")
    assert weight.stacked == ("L", "X") and weight.tensor_shape((2, 3, 8, 10)) == (10, 8)
    assert weight.names((2, 3, 8, 10)) == [f"layer.{i}.expert.{x}" for i in range(2) for x in range(3)]
    assert list(weight.tensors((2, 3, 8, 10)))[4] == ((1, 1), "layer.1.expert.1")


@pytest.mark.parametrize(
    "layout, shape", [("64+(K H)+32 D", (64 + 10 + 32, 8)), ("(K 1/3 H) D", (30, 8)), ("D 3+(K H)", (8, 13))]
)
def test_a_part_has_the_shape_of_the_tensor_that_it_is_part_of(layout, shape):
    assert WeightSpec("L D K H", "layer.{L}", layout).tensor_shape((3, 8, 2, 5)) == shape


@st.composite
def parts(draw):
    """A weight and a slice of each of its axes that may be split, empty ones left out."""
    weight = draw(st.sampled_from(TABLE))
    index = []
    for letter in weight.logical_axes.split():
        start = draw(st.integers(0, SIZES[letter] - 1))
        stop = draw(st.integers(start + 1, SIZES[letter]))
        index.append(slice(None) if letter == "H" or draw(st.booleans()) else slice(start, stop))
    return weight, tuple(index)


@settings(max_examples=300, deadline=None, database=None, derandomize=True)
@given(parts())
def test_any_part_is_the_same_part_of_the_whole_and_nothing_else_is_read(part):
    weight, index = part
    shape, tensors = example(weight)
    numbers_read = 0

    def read(name, slices):
        nonlocal numbers_read
        numbers_read += tensors[name][slices].size
        return tensors[name][slices]

    cut = weight.cut(shape, index, read)
    np.testing.assert_array_equal(
        cut, weight.cut(shape, whole(shape), lambda name, slices: tensors[name][slices])[index]
    )
    # Of a tensor with every n-th run of entries for the weight, the runs between are read along.
    assert numbers_read == cut.size * math.prod(int(n) for n in re.findall(r"/(\d+)", weight.layout))


@pytest.mark.parametrize(
    "letters, layout",
    [("L D N H", "(N H) D"), ("L N H D", "D (N H)"), ("L D N H", "5+(N H)+7 D"), ("L D N H", "(N 1/3 H) D")],
)
def test_an_axis_inside_a_merged_one_may_not_be_cut(letters, layout):
    weight = WeightSpec(letters, "layer.{L}", layout)
    shape, tensors = example(weight)
    index = tuple(slice(0, 2) if letter == "H" else slice(None) for letter in letters.split())
    with pytest.raises(ValueError, match=r"axis N (1/3 )?H may be cut along N only"):
        weight.cut(shape, index, lambda name, slices: tensors[name][slices])


@ANY_WEIGHT
def test_restoring_gives_transformers_tensors_back(weight):
    shape, tensors = example(weight)
    array = weight.cut(shape, whole(shape), lambda name, slices: tensors[name][slices])
    for index, name in weight.tensors(shape):
        restored = weight.restore(array[index])
        assert restored.flags.c_contiguous, name
        mine = np.zeros(restored.shape, bool)
        weight.part_of(mine, array[index].shape)[...] = True
        assert mine.sum() == array[index].size and mine.all() != is_part(weight)
        np.testing.assert_array_equal(restored[mine], tensors[name][mine])


@ANY_WEIGHT
def test_restoring_into_a_tensor_leaves_the_rest_of_it_as_it_is(weight):
    shape, tensors = example(weight)
    array = weight.cut(shape, whole(shape), lambda name, slices: tensors[name][slices])
    for index, name in weight.tensors(shape):
        into = np.full(tensors[name].shape, -1, np.float32)  # all entries of the example are 0 or more
        assert weight.restore(array[index], into) is into
        written = into >= 0
        assert written.sum() == array[index].size
        np.testing.assert_array_equal(into[written], tensors[name][written])


@pytest.mark.parametrize("case", cases.ALL, ids=lambda case: case.name)
def test_the_table_has_every_entry_of_every_tensor_of_the_family_once(case):
    model = build(case.values | {"tie_word_embeddings": not case.untied}, case.name, config.Model())
    shapes = {path: shape.shape for path, shape in flatten(model.shapes).items()}
    wanted = {name: shape for name, shape in cases.tensor_shapes(case).items() if name not in case.dead}
    counts = {cases.plain(name): np.zeros(shape, int) for name, shape in wanted.items()}
    named = []
    for path, weight in model.weights.items():
        for _, name in weight.tensors(shapes[path]):
            named.append(cases.plain(name))
            assert weight.tensor_shape(shapes[path]) == counts[named[-1]].shape, name
            weight.part_of(counts[named[-1]], shapes[path][len(weight.stacked) :])[...] += 1
    assert set(named) == counts.keys()
    assert all((count == 1).all() for count in counts.values())
    shared = any(is_part(weight) for weight in model.weights.values())
    assert (len(named) > len(counts)) == shared


@pytest.mark.parametrize("name", ["t5_1_1", "gpt2", "gpt_neox", "phi3", "mixtral"])
def test_what_is_cut_out_of_tensors_is_written_back_as_these_tensors(name):
    case = cases.BY_NAME[name]
    model = build(case.values, name, config.Model())
    tensors = {cases.plain(name): tensor for name, tensor in cases.tensors(case).items() if name not in case.dead}
    shapes = {path: shape.shape for path, shape in flatten(model.shapes).items()}
    leaves = {
        path: weight.cut(shapes[path], whole(shapes[path]), lambda name, slices: tensors[cases.plain(name)][slices])
        for path, weight in model.weights.items()
    }
    written = list(gather_tensors(model.weights, leaves, np.float32))
    assert len(written) == len(dict(written)) == len(tensors)
    for name, tensor in written:
        assert tensor.flags.c_contiguous
        np.testing.assert_array_equal(tensor, tensors[cases.plain(name)], err_msg=name)


def test_unflattening_undoes_flattening():
    tree = {"a": {"b": 1, "c": {"d": 2}}, "e": 3}
    assert flatten(tree) == {"a.b": 1, "a.c.d": 2, "e": 3}
    assert unflatten(flatten(tree)) == tree
