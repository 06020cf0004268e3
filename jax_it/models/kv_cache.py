"""The key-value cache: what decoding carries from step to step, for encoder-decoders and causal models alike.

Keys are stored as K H S and values as K S H: a step reads them head by head, and both of its products go along rows of
memory. Layers are cached in groups: the layers of one run, over all repeats of its section, share one group, in order
along L (see `sections.py`); in unrolled decoding each layer is its own group. A layer with a window keeps only the
window's positions: position t is stored at t % capacity.
"""

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jax_it.models.attention import by_head


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class KeyValue:
    """Keys and values of a group's layers, of the tokens so far."""

    key: jax.Array = field(metadata={"axes": "LBKHT"})
    value: jax.Array = field(metadata={"axes": "LBKTH"})


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class CrossKeyValue:
    """Keys and values of a source, which cross-attention reads."""

    key: jax.Array = field(metadata={"axes": "LBKHS"})
    value: jax.Array = field(metadata={"axes": "LBKSH"})


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Source:
    """A source's keys and values in every group, and each position's segment, 0 for padding."""

    groups: tuple[CrossKeyValue, ...]
    segments: jax.Array = field(metadata={"axes": "BS"})


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class LongTexts:
    """What computing a text again takes, once it outgrows LongRoPE's original length."""

    tokens: jax.Array = field(metadata={"axes": "BT"})
    is_long: jax.Array = field(metadata={"axes": "B"})  # those that have been computed again


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class KVCache:
    """Row b caches the tokens before the one being decoded.

    With n times as many rows as sources, row b reads source b // n. A step may decode the first rows alone.
    """

    groups: tuple[KeyValue, ...]
    capacity: int = field(metadata={"static": True})  # positions of a row
    windows: tuple[int, ...] = field(metadata={"static": True})  # of each group; 0: none
    source: Source | None = None
    long_texts: LongTexts | None = None
    prompts: jax.Array | None = field(default=None, metadata={"axes": "BT"})  # their tokens, for prompt lookup alone

    @property
    def prompt_capacity(self) -> int:
        """How many positions there are for prompts: a source's, or those of new tokens among them."""
        return self.source.segments.shape[1] if self.source else self.capacity

    @property
    def rows(self) -> int:
        return self.groups[0].value.shape[1]


class Cached(NamedTuple):
    """Keys and values to attend to, among those of several layers and maybe of more rows than there are."""

    key_LBKHS: jax.Array
    value_LBKSH: jax.Array
    layer: Any
    mask_BTS: jax.Array  # which of them a position may see
    end_B: jax.Array  # none of them from here on


class LayerCache(NamedTuple):
    """One layer's part of the cache."""

    group: KeyValue
    index: Any  # of the layer in its group
    positions_BT: jax.Array  # of the tokens that are computed now, ascending
    capacity: int  # of the whole cache; a group with less keeps a window
    real_BT: jax.Array | None = None  # false for padding behind them, which is not cached; None: there is none
    cross: CrossKeyValue | None = None
    source_segments_BS: jax.Array | None = None

    @property
    def cross_keys_values(self) -> "Cached":
        """Those of the source."""
        assert self.cross is not None and self.source_segments_BS is not None
        is_real_BS = self.source_segments_BS > 0
        end_B = jnp.where(is_real_BS, jnp.arange(1, is_real_BS.shape[1] + 1), 0).max(1)
        return Cached(self.cross.key, self.cross.value, self.index, is_real_BS[:, None], end_B)

    def add(self, key_BTKH: jax.Array, value_BTKH: jax.Array) -> tuple["LayerCache", "Cached"]:
        """Return the cache with the tokens, and what they attend to."""
        added, held = self._write(key_BTKH, value_BTKH), self.group.key.shape[-1]
        if key_BTKH.shape[1] == 1 or held == self.capacity:
            # Entries that hold a position up to the token's own. A sliding window needs no mask of its own: its layers
            # have no capacity for positions outside of it.
            at_BT1 = self.positions_BT[:, :, None]
            mask_BTS = at_BT1 - (at_BT1 - jnp.arange(held)) % held >= 0
            end_B = jnp.minimum(self.positions_BT[:, -1] + 1, held)
            return added, Cached(added.group.key, added.group.value, self.index, mask_BTS, end_B)
        # The later tokens overwrite what the earlier ones of these still see: all see the entries before, and the new.
        last_B1 = self.positions_BT[:, :1] - 1
        held_BS = last_B1 - (last_B1 - jnp.arange(held)) % held
        at_BS = jnp.concatenate([jnp.where(held_BS >= 0, held_BS, self.capacity), self.positions_BT], axis=1)
        distance_BTS = self.positions_BT[:, :, None] - at_BS[:, None]
        new_key_BKHT, new_value_BKTH = by_head(key_BTKH, value_BTKH)
        key_BKHS = jnp.concatenate([self.group.key[self.index], new_key_BKHT], axis=3)
        value_BKSH = jnp.concatenate([self.group.value[self.index], new_value_BKTH], axis=2)
        mask_BTS, all_B = (distance_BTS >= 0) & (distance_BTS < held), jnp.full(len(at_BS), at_BS.shape[1])
        return added, Cached(key_BKHS[None], value_BKSH[None], 0, mask_BTS, all_B)

    def _write(self, key_BTKH: jax.Array, value_BTKH: jax.Array) -> "LayerCache":
        """Write in place into the whole group: a cache that a scan took apart and put together would be copied."""
        key, value = self.group.key, self.group.value
        row, head = jnp.arange(key_BTKH.shape[0])[:, None, None], jnp.arange(key_BTKH.shape[2])
        at_BT = self.positions_BT % key.shape[-1]
        if self.real_BT is not None:  # of a window's tokens, too, only the last ones stay
            end_B1 = jnp.where(self.real_BT, self.positions_BT, -1).max(1, keepdims=True)
            at_BT = jnp.where(self.real_BT & (self.positions_BT > end_B1 - key.shape[-1]), at_BT, key.shape[-1])
        at_BT1 = at_BT[:, :, None]
        key = key.at[self.index, row, head, :, at_BT1].set(key_BTKH, mode="drop")
        value = value.at[self.index, row, head, at_BT1].set(value_BTKH, mode="drop")
        return self._replace(group=KeyValue(key, value))


def init_group(layers: int, rows: int, kv_heads: int, head_dim: int, capacity: int, dtype: Any) -> KeyValue:
    """Return a group that holds no token yet."""
    value = jnp.zeros((layers, rows, kv_heads, capacity, head_dim), dtype)
    return KeyValue(jnp.swapaxes(value, 3, 4), value)


def from_prompt(key_BTKH: jax.Array, value_BTKH: jax.Array, position_B: jax.Array, window: int) -> KeyValue:
    """Cache a layer's keys and values of prompts, without an axis L; of a window, those seen from `position_B`."""
    if 0 < window < key_BTKH.shape[1]:
        at_BT = position_B[:, None] - (position_B[:, None] - jnp.arange(window)) % window
        at_BT11 = jnp.maximum(at_BT, 0)[:, :, None, None]  # what is below 0 is never read
        key_BTKH, value_BTKH = (jnp.take_along_axis(x, at_BT11, axis=1) for x in (key_BTKH, value_BTKH))
    return KeyValue(*by_head(key_BTKH, value_BTKH))


def grow(cache: KVCache, by: int) -> KVCache:
    """Return the cache with capacity for prompts, or sources, that are longer by `by` tokens."""
    if cache.source:
        return dataclasses.replace(cache, source=map_axes(lambda axes, x: _pad(axes, x, "S", by), cache.source))
    groups = []
    for group, window in zip(cache.groups, cache.windows, strict=True):
        held = group.key.shape[-1]
        more = by if not window else min(held + by, window) - held
        groups.append(map_axes(lambda axes, x, more=more: _pad(axes, x, "T", more), group))
    long_texts = map_axes(lambda axes, x: _pad(axes, x, "T", by), cache.long_texts)
    prompts = None if cache.prompts is None else _pad("BT", cache.prompts, "T", by)
    return KVCache(tuple(groups), cache.capacity + by, cache.windows, long_texts=long_texts, prompts=prompts)


def _pad(axes: str, x: jax.Array, axis: str, by: int) -> jax.Array:
    return jnp.pad(x, [(0, by * (letter == axis)) for letter in axes])


def take_rows(cache: KVCache, rows_B: jax.Array) -> KVCache:
    """Return the cache whose row b is row `rows_B[b]` of this one. Sources stay, so no row may change its source."""
    return map_axes(_taker(rows_B), cache, of_source=lambda axes, array: array)


def select(cache: KVCache, sources_B: jax.Array, copies: int = 1) -> KVCache:
    """Return the cache with the `copies` rows of each of these sources, and what they read."""
    return map_axes(_taker(rows_of(sources_B, copies)), cache, of_source=_taker(sources_B))


def insert(cache: KVCache, new: KVCache, at_Y: jax.Array, from_Y: jax.Array, copies: int = 1) -> KVCache:
    """Return the cache with sources `from_Y` of another one, which has a row for each, at the places `at_Y`.

    There each gets `copies` rows, which are alike. Places that do not exist take none.
    """

    def put(at_Y: jax.Array, from_Y: jax.Array) -> Callable[..., jax.Array]:
        def one(axes: str, old: jax.Array, new: jax.Array) -> jax.Array:
            axis = axes.index("B")
            return old.at[(slice(None),) * axis + (at_Y,)].set(new.take(from_Y, axis), mode="drop")

        return one

    put_rows = put(rows_of(at_Y, copies), jnp.repeat(from_Y, copies))
    return map_axes(put_rows, cache, new, of_source=put(at_Y, from_Y))


def rows_of(sources_B: jax.Array, copies: int) -> jax.Array:
    """Return the rows of some sources that have `copies` each."""
    return (sources_B[:, None] * copies + jnp.arange(copies)).reshape(-1)


def map_axes(function: Callable[..., Any], tree: Any, *others: Any, of_source: Callable[..., Any] | None = None) -> Any:
    """Return the cache with `function(axes, array, *arrays)` for each array, given its axes and those of other caches.

    `of_source`, if given, takes the place of the function for the arrays of a source.
    """
    if tree is None:
        return None
    if isinstance(tree, tuple):
        return tuple(map_axes(function, *each, of_source=of_source) for each in zip(tree, *others, strict=True))
    if of_source and isinstance(tree, Source):
        return map_axes(of_source, tree, *others)
    changes = {}
    for one in dataclasses.fields(tree):
        if one.metadata.get("static"):
            continue
        values = [getattr(each, one.name) for each in (tree, *others)]
        axes = one.metadata.get("axes")
        if axes and values[0] is not None:
            changes[one.name] = function(axes, *values)
        else:
            changes[one.name] = map_axes(function, *values, of_source=of_source)
    return dataclasses.replace(tree, **changes)


def _taker(rows_B: jax.Array) -> Callable[[str, jax.Array], jax.Array]:
    return lambda axes, array: array.take(rows_B, axes.index("B"))
