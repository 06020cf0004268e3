"""The cache against lists of what each row has seen."""

import jax.numpy as jnp
import numpy as np
import pytest

from jax_it.models import kv_cache, sections
from jax_it.models.config import LayerKind
from jax_it.models.kv_cache import CrossKeyValue, KeyValue, KVCache, LayerCache, LongTexts, Source
from jax_it.models.sections import LayerRun, Section

ROWS, HEADS, DIM = 2, 3, 4


def stream(length, seed=0):
    """Keys and values [B, T, K, H] of texts."""
    random = np.random.default_rng(seed)
    return (jnp.float32(random.standard_normal((ROWS, length, HEADS, DIM))) for _ in range(2))


def add(layer, keys, values, window):
    """Add the tokens at the layer's positions, and compare what each sees with the positions that it may see."""
    at_BT = np.asarray(layer.positions_BT)
    new = (jnp.stack([x[row, at] for row, at in enumerate(at_BT)]) for x in (keys, values))
    layer, cached = layer.add(*new)
    key_BKHS, value_BKSH, mask_BTS = cached.key_LBKHS[cached.layer], cached.value_LBKSH[cached.layer], cached.mask_BTS
    assert not any(mask_BTS[row, :, end:].any() for row, end in enumerate(cached.end_B))
    for row, positions in enumerate(at_BT):
        for t, last in enumerate(positions):
            seen = list(range(max(0, last - window + 1) if window else 0, last + 1))
            found = np.moveaxis(np.asarray(key_BKHS[row])[..., mask_BTS[row, t]], -1, 0)
            order = [int(np.flatnonzero((found == keys[row, at]).all((1, 2)))[0]) for at in seen]
            assert len(found) == len(seen) == len(set(order))
            found = np.swapaxes(np.asarray(value_BKSH[row])[:, mask_BTS[row, t]], 0, 1)
            np.testing.assert_array_equal(found[order], values[row, np.array(seen)])
    return layer


def add_axis(group):
    """The group of one layer, with its axis L."""
    return KeyValue(group.key[None], group.value[None])


@pytest.mark.parametrize("window", [0, 1, 3, 8, 20])
def test_a_prompts_cache_holds_what_its_last_position_sees(window):
    keys, values = stream(8)
    last_B = jnp.array([7, 2])
    group = add_axis(kv_cache.from_prompt(keys, values, last_B, window))
    assert group.value.shape[3] == (window if 0 < window < 8 else 8)
    add(LayerCache(group, 0, last_B[:, None], 8), keys, values, window)  # the last one once more: it sees itself


@pytest.mark.parametrize("window", [0, 3])
def test_steps_write_to_their_own_layer_at_each_rows_position(window):
    keys, values = stream(9)
    start_B, capacity = np.array([0, 2]), window or 9
    group = kv_cache.init_group(2, ROWS, HEADS, DIM, capacity, jnp.float32)
    untouched = group.key[0]
    group = KeyValue(  # the second row has two positions already
        group.key.at[1, 1, :, :, :2].set(jnp.moveaxis(keys[1, :2], 0, -1)),
        group.value.at[1, 1, :, :2].set(jnp.swapaxes(values[1, :2], 0, 1)),
    )
    for step in range(7):
        group = add(LayerCache(group, 1, jnp.asarray(start_B + step)[:, None], 9), keys, values, window).group
    np.testing.assert_array_equal(group.key[0], untouched)


@pytest.mark.parametrize("window", [0, 4, 6, 9, 20])
def test_a_cache_that_grew_continues_where_the_prompt_ended(window):
    keys, values = stream(12)
    last_B = jnp.array([5, 5])
    group = add_axis(kv_cache.from_prompt(keys[:, :6], values[:, :6], last_B, window))
    cache = kv_cache.grow(KVCache((group,), 6, (window,)), 6)
    assert (cache.capacity, cache.prompt_capacity) == (12, 12)
    assert cache.groups[0].key.shape[-1] == (min(window, 12) if window else 12)
    for position in range(6, 12):
        layer = add(LayerCache(cache.groups[0], 0, jnp.full((ROWS, 1), position), 12), keys, values, window)
        cache = KVCache((layer.group,), 12, (window,))


@pytest.mark.parametrize("window", [0, 3, 5])
@pytest.mark.parametrize("chunk", [2, 4])
def test_tokens_that_are_added_together_see_what_each_sees_alone(window, chunk):
    keys, values = stream(12)
    start_B = np.array([0, 3])
    group = kv_cache.init_group(1, ROWS, HEADS, DIM, window or 12, jnp.float32)
    for at in range(3):  # the second row has three positions already
        row = LayerCache(group, 0, jnp.array([[0], [at]]), 12).add(keys[:, at : at + 1], values[:, at : at + 1])
        group = row[0].group
    for step in range(8 // chunk):
        at_BT = jnp.asarray(start_B)[:, None] + step * chunk + jnp.arange(chunk)
        group = add(LayerCache(group, 0, at_BT, 12), keys, values, window).group


def whole(rows=4, sources=2, seed=0):
    """A cache with everything that there may be: two groups, a source for every two rows, and long texts."""
    random = np.random.default_rng(seed)

    def draw(*shape):
        return jnp.float32(random.standard_normal(shape))

    groups = tuple(KeyValue(draw(n, rows, HEADS, DIM, 5), draw(n, rows, HEADS, 5, DIM)) for n in (2, 1))
    cross = tuple(CrossKeyValue(draw(n, sources, HEADS, DIM, 6), draw(n, sources, HEADS, 6, DIM)) for n in (2, 1))
    texts = LongTexts(jnp.int32(random.integers(0, 9, (rows, 5))), jnp.arange(rows) % 2 == 0)
    return KVCache(groups, 5, (0, 0), Source(cross, jnp.int32(random.integers(0, 2, (sources, 6)))), texts)


def arrays(cache):
    """(array with rows first, whether it is a source's) for each array."""
    for group in cache.groups:
        yield from ((np.moveaxis(np.asarray(x), 1, 0), False) for x in (group.key, group.value))
    for group in cache.source.groups:
        yield from ((np.moveaxis(np.asarray(x), 1, 0), True) for x in (group.key, group.value))
    yield np.asarray(cache.source.segments), True
    yield from ((np.asarray(x), False) for x in (cache.long_texts.tokens, cache.long_texts.is_long))


def test_rows_are_taken_and_sources_stay():
    old = whole()
    new = kv_cache.take_rows(old, jnp.array([1, 1, 2]))
    for (found, is_source), (before, _) in zip(arrays(new), arrays(old), strict=True):
        np.testing.assert_array_equal(found, before if is_source else before[[1, 1, 2]])


def test_a_selection_has_the_rows_of_each_of_its_sources():
    old = whole()
    new = kv_cache.select(old, jnp.array([1, 0, 1]), copies=2)
    for (found, is_source), (before, _) in zip(arrays(new), arrays(old), strict=True):
        np.testing.assert_array_equal(found, before[[1, 0, 1]] if is_source else before[[2, 3, 0, 1, 2, 3]])


def test_inserted_sources_replace_the_rows_of_their_places_and_no_others():
    old, new = whole(rows=6, sources=3), whole(rows=2, sources=2, seed=1)
    # The second prompt goes to place 2 and the first to place 0; place 3 does not exist.
    found = kv_cache.insert(old, new, jnp.array([2, 0, 3]), jnp.array([1, 0, 0]), copies=2)
    for (after, is_source), (before, _), (given, _) in zip(arrays(found), arrays(old), arrays(new), strict=True):
        wanted = before.copy()
        for place, prompt in ((2, 1), (0, 0)):
            rows = [place] if is_source else [2 * place, 2 * place + 1]
            wanted[rows] = given[prompt]
        np.testing.assert_array_equal(after, wanted)


def test_a_source_grows_along_its_positions_alone():
    old = whole()
    new = kv_cache.grow(old, 3)
    assert (new.capacity, new.prompt_capacity, old.prompt_capacity) == (5, 9, 6)
    for before, after in zip(old.source.groups, new.source.groups, strict=True):
        np.testing.assert_array_equal(after.key, np.pad(before.key, [(0, 0)] * 4 + [(0, 3)]))
        np.testing.assert_array_equal(after.value, np.pad(before.value, [(0, 0)] * 3 + [(0, 3), (0, 0)]))
    np.testing.assert_array_equal(new.source.segments, np.pad(old.source.segments, [(0, 0), (0, 3)]))
    assert new.groups[0] is old.groups[0]


def test_rows_of_a_source_lie_side_by_side():
    np.testing.assert_array_equal(kv_cache.rows_of(jnp.array([2, 0]), 3), [6, 7, 8, 0, 1, 2])


def test_each_array_comes_with_its_own_axes():
    found = []
    kv_cache.map_axes(lambda axes, array: found.append((axes, array.ndim)) or array, whole())
    assert [axes for axes, _ in found] == [*["LBKHT", "LBKTH"] * 2, *["LBKHS", "LBKSH"] * 2, "BS", "BT", "B"]
    assert all(len(axes) == ndim for axes, ndim in found)


def test_unstacked_layers_come_in_the_order_of_layers():
    local, full = LayerKind(5), LayerKind()
    layout = (Section(2, (LayerRun(local, 2), LayerRun(full, 1))), Section(1, (LayerRun(local, 1),)))
    # Each layer's entries are its number: layers 0, 1, 3, 4 and then 2, 5 in the period's runs, 6 is left over.
    groups = tuple(
        KeyValue(*(jnp.float32(numbers)[:, None, None, None, None] for _ in range(2)))
        for numbers in ([0, 1, 3, 4], [2, 5], [6])
    )
    cache = sections.unstack_layers(KVCache(groups, 1, (5, 0, 5)), layout)
    assert [group.key.item() for group in cache.groups] == list(range(7))
    assert cache.windows == (5, 5, 0, 5, 5, 0, 5)
