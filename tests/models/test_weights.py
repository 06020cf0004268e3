"""The weight table: what a line says of the two layouts, and that any part of an array can be cut out by itself."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jax_it import config, sharding
from jax_it.models import build
from jax_it.models.weights import Weight, flatten, unflatten
from tests.parity import cases

SIZES = {"L": 3, "V": 12, "D": 8, "N": 6, "H": 5, "F": 10, "E": 7}


def table():
    """One weight of each letters and layout that any family has."""
    lines = {}
    for case in cases.CASES:
        for weight in build(case.values, case.name, config.Model()).weights.values():
            lines[weight.letters, weight.layout] = weight
    return list(lines.values())


TABLE = table()
ANY_WEIGHT = pytest.mark.parametrize("weight", TABLE, ids=lambda weight: f"{weight.letters} <- {weight.layout}")


def example(weight):
    """Its shape, and Transformers' tensors with entries that are all different."""
    shape = tuple(SIZES[letter] for letter in weight.letters.split())
    one = weight.tensor_shape(shape)
    size = math.prod(one)
    return shape, {
        name: np.arange(i * size, (i + 1) * size, dtype=np.float32).reshape(one)
        for i, name in enumerate(weight.names(shape))
    }


def whole(shape):
    return tuple(slice(None) for _ in shape)


def test_the_table_has_every_letter_that_sharding_splits_and_t5_has():
    assert {letter for weight in TABLE for letter in weight.letters.split()} >= set(sharding.RULES) - {"B", "K"}


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
    ],
)
def test_each_entry_comes_from_the_place_that_the_layout_says(letters, layout, place):
    weight = Weight(letters, "layer.{L}" if letters.startswith("L ") else "layer", layout)
    assert (letters, layout) in {(line.letters, line.layout) for line in TABLE}
    shape, tensors = example(weight)
    array = weight.cut(shape, whole(shape), lambda name, slices: tensors[name][slices])
    assert array.shape == shape
    for index in np.ndindex(shape):
        tensor = tensors[weight.name.format(L=index[0])]
        assert array[index] == tensor[place(*index)]


@st.composite
def parts(draw):
    """A weight and a slice of each of its axes that may be split, empty ones left out."""
    weight = draw(st.sampled_from(TABLE))
    index = []
    for letter in weight.letters.split():
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
    assert numbers_read == cut.size


@pytest.mark.parametrize("letters, layout", [("L D N H", "(N H) D"), ("L N H D", "D (N H)")])
def test_an_axis_inside_a_merged_one_may_not_be_cut(letters, layout):
    weight = Weight(letters, "layer.{L}", layout)
    shape, tensors = example(weight)
    index = tuple(slice(0, 2) if letter == "H" else slice(None) for letter in letters.split())
    with pytest.raises(ValueError, match="may be cut along N only"):
        weight.cut(shape, index, lambda name, slices: tensors[name][slices])


@ANY_WEIGHT
def test_restoring_gives_transformers_tensors_back(weight):
    shape, tensors = example(weight)
    array = weight.cut(shape, whole(shape), lambda name, slices: tensors[name][slices])
    for i, (name, tensor) in enumerate(tensors.items()):
        restored = weight.restore(array[i] if weight.stacked else array)
        assert restored.flags.c_contiguous, name
        np.testing.assert_array_equal(restored, tensor)


@pytest.mark.parametrize("case", cases.CASES, ids=lambda case: case.name)
def test_the_table_names_every_tensor_of_the_family_once(case):
    model = build(case.values | {"tie_word_embeddings": not case.untied}, case.name, config.Model())
    shapes = flatten(model.shapes)
    named = [
        (name, weight.tensor_shape(shapes[path].shape))
        for path, weight in model.weights.items()
        for name in weight.names(shapes[path].shape)
    ]
    assert len(named) == len(dict(named))
    assert dict(named) == {name: s for name, s in cases.tensor_shapes(case).items() if name not in case.dead}


def test_unflattening_undoes_flattening():
    tree = {"a": {"b": 1, "c": {"d": 2}}, "e": 3}
    assert flatten(tree) == {"a.b": 1, "a.c.d": 2, "e": 3}
    assert unflatten(flatten(tree)) == tree
