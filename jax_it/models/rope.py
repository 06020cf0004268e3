"""Rotary positions (Su et al. 2021), with the scalings that longer contexts were trained with.

The formulas are those of Transformers' `modeling_rope_utils`, computed in float32 as there.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jax_it.errors import UserError
from jax_it.models.settings import Settings

Frequencies = tuple[float, ...]  # radians a position, of each pair of entries that is rotated

# rope_type -> the keys that it reads, beside rope_theta and partial_rotary_factor
_KEYS: dict[str, tuple[str, ...]] = {
    "default": (),
    "linear": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
    "yarn": (
        "factor", "original_max_position_embeddings", "attention_factor", "beta_fast", "beta_slow", "mscale",
        "mscale_all_dim", "truncate",
    ),
    "longrope": ("factor", "short_factor", "long_factor", "original_max_position_embeddings", "attention_factor"),
}  # fmt: skip
_OPTIONAL = {"attention_factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim", "truncate"}


@dataclass(frozen=True)
class Rope:
    """The rotation of a layer's queries and keys: the first `2 * len(frequencies)` entries of each head."""

    frequencies: Frequencies
    scale: float = 1.0  # of cosine and sine
    long_frequencies: Frequencies = ()  # of LongRoPE, for texts of more than `original_length` positions
    original_length: int = 0

    def angles(self, positions_BT: jax.Array, extents_BT: jax.Array | None) -> jax.Array:
        """Radians [B, T, pairs], float32; `extents_BT` says how many positions the text of each has in all."""
        frequencies = jnp.asarray(self.frequencies, jnp.float32)
        if self.long_frequencies:
            assert extents_BT is not None
            long = jnp.asarray(self.long_frequencies, jnp.float32)
            frequencies = jnp.where(extents_BT[..., None] > self.original_length, long, frequencies)
        return positions_BT[..., None].astype(jnp.float32) * frequencies


def rotations(
    ropes: tuple[Rope | None, ...], positions_BT: jax.Array, extents_BT: jax.Array | None
) -> list[tuple[jax.Array, jax.Array]]:
    """Cosine and sine [B, T, pairs] of each rope, all of one size; (1, 0) for None, which rotates nothing."""
    found = []
    for rope in ropes:
        if rope is None:
            pairs = len(next(other for other in ropes if other is not None).frequencies)
            shape = (*positions_BT.shape, pairs)
            found.append((jnp.ones(shape, jnp.float32), jnp.zeros(shape, jnp.float32)))
        else:
            angles = rope.angles(positions_BT, extents_BT)
            found.append((jnp.cos(angles) * rope.scale, jnp.sin(angles) * rope.scale))
    return found


def rotate(x_BTNH: jax.Array, cos_BTP: jax.Array, sin_BTP: jax.Array) -> jax.Array:
    """Each pair (i, i + pairs) of a head's first entries turned by its angle; the entries after them stay."""
    pairs = cos_BTP.shape[-1]
    cos, sin = cos_BTP[:, :, None], sin_BTP[:, :, None]
    x = x_BTNH.astype(jnp.float32)
    first, second, rest = x[..., :pairs], x[..., pairs : 2 * pairs], x[..., 2 * pairs :]
    turned = jnp.concatenate([first * cos - second * sin, second * cos + first * sin, rest], axis=-1)
    return turned.astype(x_BTNH.dtype)


def read(
    settings: Settings,
    head_size: int,
    *,
    theta: float = 10000.0,
    share: float = 1.0,
    theta_key: str = "rope_theta",
    share_key: str = "partial_rotary_factor",
) -> Rope:
    """The rope of a config.json: `rope_theta` and `rope_scaling`, or Transformers 5's `rope_parameters`."""
    theta = settings.get(theta_key, float, theta)
    share = settings.get(share_key, float, share)
    scaling, parameters = settings.get("rope_scaling", dict, {}), settings.get("rope_parameters", dict, {})
    length = settings.get("max_position_embeddings", int, 0)
    original = settings.get("original_max_position_embeddings", int, 0)  # beside the scaling, in Phi-3's config.json
    values = {"rope_theta": theta, "partial_rotary_factor": share, **parameters, **scaling}
    return make(values, head_size, length, original, settings.where)


def make(values: Mapping[str, Any], head_size: int, length: int, original: int, where: str) -> Rope:
    """The rope of one `rope_parameters` mapping; `length` is the model's greatest number of positions."""
    kind = values.get("rope_type", values.get("type", "default"))
    kind = {"su": "longrope"}.get(kind, kind)
    if kind not in _KEYS:
        raise UserError(f"{where}: rope_type {kind!r} is not one of {', '.join(_KEYS)}")
    known = {"rope_type", "type", "rope_theta", "partial_rotary_factor", *_KEYS[kind]}
    # A default rope may carry what another type would read, as Transformers saves it.
    if kind != "default" and (unknown := sorted(values.keys() - known)):
        raise UserError(f"{where}: {', '.join(unknown)} of its {kind} rope is not known to jax_it; remove it")
    values = {"original_max_position_embeddings": original or length, **values}
    if kind == "longrope" and values.get("factor") is None:
        values = {**values, "factor": length / values["original_max_position_embeddings"]}
    for key in _KEYS[kind]:
        if values.get(key) is None and key not in _OPTIONAL:
            raise UserError(f"{where}: its {kind} rope has no {key}")
    size = int(head_size * values["partial_rotary_factor"])
    exponents = np.arange(0, size, 2, dtype=np.float32) / np.float32(size)
    powers = np.float32(values["rope_theta"]) ** exponents
    return _SCALINGS[kind](powers, values)


def _default(powers: np.ndarray, values: Mapping[str, Any]) -> Rope:
    return Rope(_tuple(1 / powers))


def _linear(powers: np.ndarray, values: Mapping[str, Any]) -> Rope:
    return Rope(_tuple(1 / powers / np.float32(values["factor"])))


def _llama3(powers: np.ndarray, values: Mapping[str, Any]) -> Rope:
    """Slow rotations slowed by the factor, fast ones kept, those between blended."""
    frequencies, factor = 1 / powers, np.float32(values["factor"])
    low, high = values["low_freq_factor"], values["high_freq_factor"]
    turns = values["original_max_position_embeddings"] / (2 * np.float32(math.pi) / frequencies)
    blend = np.clip((turns - low) / (high - low), 0, 1).astype(np.float32)
    return Rope(_tuple((1 - blend) * frequencies / factor + blend * frequencies))


def _yarn(powers: np.ndarray, values: Mapping[str, Any]) -> Rope:
    """YaRN (Peng et al. 2023)."""
    factor, original = values["factor"], values["original_max_position_embeddings"]
    size, theta = 2 * len(powers), values["rope_theta"]

    def dimension(turns: float) -> float:
        return size * math.log(original / (turns * 2 * math.pi)) / (2 * math.log(theta))

    low, high = dimension(values.get("beta_fast") or 32), dimension(values.get("beta_slow") or 1)
    if values.get("truncate", True):
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, size - 1)
    slowed = np.clip((np.arange(len(powers), dtype=np.float32) - low) / ((high - low) or 0.001), 0, 1)
    frequencies = slowed / (factor * powers) + (1 - slowed) / powers
    scale, mscale, all_dim = (values.get(key) for key in ("attention_factor", "mscale", "mscale_all_dim"))
    if scale is None:
        scale = _magnitude(factor, 1)
        if mscale and all_dim:
            scale = _magnitude(factor, mscale) / _magnitude(factor, all_dim)
    return Rope(_tuple(frequencies), float(scale))


def _magnitude(factor: float, scale: float) -> float:
    return 0.1 * scale * math.log(factor) + 1 if factor > 1 else 1.0


def _longrope(powers: np.ndarray, values: Mapping[str, Any]) -> Rope:
    """LongRoPE (Ding et al. 2024): factors by frequency, other ones past the original length."""
    original, factor = values["original_max_position_embeddings"], values["factor"]
    scale = values.get("attention_factor")
    if scale is None:
        scale = math.sqrt(1 + math.log(factor) / math.log(original)) if factor > 1 else 1.0
    short, long = (1 / (np.asarray(values[f"{name}_factor"], np.float32) * powers) for name in ("short", "long"))
    return Rope(_tuple(short), float(scale), _tuple(long), original)


def _tuple(frequencies: np.ndarray) -> Frequencies:
    return tuple(frequencies.astype(np.float32).tolist())


_SCALINGS = {"default": _default, "linear": _linear, "llama3": _llama3, "yarn": _yarn, "longrope": _longrope}
