"""Rotary positions (Su et al. 2021), with the scalings that longer contexts were trained with.

The formulas are those of Transformers' `modeling_rope_utils`, computed in float32 as there.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jax_it.errors import UserError, shown
from jax_it.models.config_json import LARGEST, ConfigReader, is_int

Frequencies = tuple[float, ...]  # radians a position, of each pair of entries that is rotated

ORIGINAL = "original_max_position_embeddings"
# rope_type -> the keys that it reads, beside rope_theta and partial_rotary_factor
KEYS: dict[str, tuple[str, ...]] = {
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
_ANY = {"rope_type", "type", "rope_theta", "partial_rotary_factor"}


@dataclass(frozen=True)
class Rope:
    """The rotation of a layer's queries and keys: the first `2 * len(frequencies)` entries of each head."""

    frequencies: Frequencies
    scale: float = 1.0  # of cosine and sine
    long_frequencies: Frequencies = ()  # of LongRoPE, for texts of more than `original_length` positions
    original_length: int = 0

    interleaved: bool = False  # pairs are (2i, 2i + 1), not (i, i + the number of pairs)

    def cos_sin(self, positions_BT: jax.Array, lengths_BT: jax.Array | None) -> "CosSin":
        """Return the rotation of each position; `lengths_BT` is how many positions each one's text has."""
        frequencies = jnp.asarray(self.frequencies, jnp.float32)
        if self.long_frequencies:
            assert lengths_BT is not None
            long = jnp.asarray(self.long_frequencies, jnp.float32)
            frequencies = jnp.where(lengths_BT[..., None] > self.original_length, long, frequencies)
        angles = positions_BT[..., None].astype(jnp.float32) * frequencies
        return CosSin(jnp.cos(angles) * self.scale, jnp.sin(angles) * self.scale, self.interleaved)


class CosSin(NamedTuple):
    """Cosines and sines, float32, of the angle of each pair of entries."""

    cos_BTU: jax.Array
    sin_BTU: jax.Array
    interleaved: bool  # as in `Rope`


def rotate(x_BTNH: jax.Array, cos_sin: CosSin | None) -> jax.Array:
    """Rotate each pair of a head's first entries; the entries after them stay, as all do without `cos_sin`."""
    if cos_sin is None:
        return x_BTNH
    interleaved, pairs = cos_sin.interleaved, cos_sin.cos_BTU.shape[-1]
    cos, sin = cos_sin.cos_BTU[:, :, None], cos_sin.sin_BTU[:, :, None]
    x = x_BTNH.astype(jnp.float32)
    if interleaved:
        first, second, rest = x[..., : 2 * pairs : 2], x[..., 1 : 2 * pairs : 2], x[..., 2 * pairs :]
    else:
        first, second, rest = x[..., :pairs], x[..., pairs : 2 * pairs], x[..., 2 * pairs :]
    rotated = [first * cos - second * sin, second * cos + first * sin]
    if interleaved:
        rotated = [jnp.stack(rotated, axis=-1).reshape(*x.shape[:-1], 2 * pairs)]
    return jnp.concatenate([*rotated, rest], axis=-1).astype(x_BTNH.dtype)


def read(
    reader: ConfigReader,
    head_dim: int,
    *,
    theta: float = 10000.0,
    share: float | None = None,
    theta_key: str = "rope_theta",
    share_key: str = "partial_rotary_factor",
    original: int = 0,
    kinds: tuple[str, ...] = tuple(KEYS),
) -> Rope:
    """Read the rope of a config.json: `rope_theta` and `rope_scaling`, or Transformers 5's `rope_parameters`.

    Where both are there, Transformers takes `rope_scaling` in place of `rope_parameters`, not over it, and an
    `original_max_position_embeddings` beside them before the one in them. `share` is the part of each head that a
    family's layers rotate by default, None where they rotate whole heads alone.
    """
    values = {"rope_theta": reader.positive(theta_key, theta)}
    values["partial_rotary_factor"] = reader.positive(share_key, 1.0 if share is None else share)
    scaling, parameters = reader.get("rope_scaling", dict, {}), reader.get("rope_parameters", dict, {})
    values |= scaling or parameters
    if reader.has(ORIGINAL) or original:
        original = reader.size(ORIGINAL, original or 1)
        kind = _kind(values)
        if isinstance(kind, str) and ORIGINAL in KEYS.get(kind, ()):
            values[ORIGINAL] = original
    field = "rope_scaling" if scaling else "rope_parameters"
    if share is None and values["partial_rotary_factor"] != 1:
        raise UserError(
            f"{reader.where}: {share_key}, there or in {field}, is {shown(values['partial_rotary_factor'])}; it must "
            "be 1.0, since in this family all of a head rotates"
        )
    return make(reader, field, values, head_dim, kinds)


def read_by_layer_type(
    reader: ConfigReader, head_dim: int, *, full_theta: float, sliding_theta: float
) -> tuple["Rope", "Rope"]:
    """Read the ropes of full and of sliding layers, in either form of config.json.

    `rope_scaling` is that of full layers, and `rope_parameters` has one mapping for each of the two, which may replace
    the given thetas.
    """
    scaling, nested = reader.get("rope_scaling", dict, {}), reader.get("rope_parameters", dict, {})
    thetas = {"full_attention": full_theta, "sliding_attention": sliding_theta}
    if nested.keys() - thetas.keys() or not all(isinstance(each, dict | None) for each in nested.values()):
        raise reader.bad("rope_parameters", f"it must have {' and '.join(thetas)} alone, each a mapping of its own")
    reader.expect(partial_rotary_factor=1.0)
    if "type" in scaling and "rope_type" not in scaling:  # Transformers reads no `type` here
        raise reader.bad("rope_scaling", "in this family its type is called rope_type")

    def one(kind: str, scaling: Mapping[str, Any]) -> Rope:
        field = "rope_scaling" if scaling else f"{kind} of rope_parameters"
        values = {"rope_theta": thetas[kind], "partial_rotary_factor": 1.0, **(nested.get(kind) or {}), **scaling}
        if values["partial_rotary_factor"] != 1 or "truncate" in values:
            raise UserError(
                f"{reader.where}: partial_rotary_factor and truncate of {field} have no effect in this family; "
                "remove them"
            )
        return make(reader, field, values, head_dim)

    return one("full_attention", scaling), one("sliding_attention", {})


def make(
    reader: ConfigReader, field: str, values: Mapping[str, Any], head_dim: int, kinds: tuple[str, ...] = tuple(KEYS)
) -> Rope:
    """Return the rope of the values of one `rope_parameters` mapping, which is in `field`."""
    kind = _kind(values)
    if kind not in kinds:
        raise UserError(f"{reader.where}: rope_type {shown(kind)} of {field} is not one of {', '.join(kinds)}")
    # A default rope may carry what another type would read, as Transformers saves it.
    known = _ANY.union(*KEYS.values()) if kind == "default" else _ANY.union(KEYS[kind])
    if unknown := sorted(values.keys() - known):
        raise UserError(f"{reader.where}: {field}, a {kind} rope, has {shown(unknown)}, not known to jax_it; remove it")
    values = dict(values)
    length = reader.get("max_position_embeddings", int, 0)
    if ORIGINAL in KEYS[kind] and length > 0:
        original = values.setdefault(ORIGINAL, length)
        open_factor = kind == "longrope" or (kind == "yarn" and "factor" in values)
        if open_factor and values.get("factor") is None and _wrong(ORIGINAL, original) is None:
            values["factor"] = length / original
    for key in ("rope_theta", "partial_rotary_factor", *KEYS[kind]):
        value = values.get(key)
        if value is None and key in _OPTIONAL:
            continue
        if value is None:
            beside = ", nor is max_position_embeddings beside it" if key == ORIGINAL else ""
            raise UserError(f"{reader.where}: {field}, a {kind} rope, has no {key}{beside}")
        if must := _wrong(key, value):
            raise UserError(f"{reader.where}: {key} of {field} is {shown(value)}; it must be {must}")
    size = int(head_dim * values["partial_rotary_factor"])
    if size % 2 or not 0 < size <= head_dim:
        raise UserError(
            f"{reader.where}: {size} of a head's {head_dim} dimensions would rotate (head_dim, or hidden_size / "
            f"num_attention_heads, times partial_rotary_factor); it must be an even number, from 2 to {head_dim}"
        )
    for key in ("short_factor", "long_factor"):
        if key in KEYS[kind] and len(values[key]) != size // 2:
            raise UserError(
                f"{reader.where}: {key} of {field} has {len(values[key])} numbers; it must have {size // 2}, one for "
                "each pair of a head's dimensions"
            )
    exponents = np.arange(0, size, 2, dtype=np.float32) / np.float32(size)
    with np.errstate(all="ignore"):
        powers = np.float32(values["rope_theta"]) ** exponents
        try:
            rope = _SCALINGS[kind](powers, values)
        except (ArithmeticError, ValueError):
            rope = None
    if rope is None or not np.isfinite([*rope.frequencies, *rope.long_frequencies, rope.scale]).all():
        raise UserError(f"{reader.where}: the values of {field}, a {kind} rope, give no finite frequencies")
    return rope


def _kind(values: Mapping[str, Any]) -> Any:
    return values.get("rope_type", values.get("type", "default"))


def _wrong(key: str, value: Any) -> str | None:
    """Return what a value must be, or None if it is that."""
    if key == "truncate":
        return None if isinstance(value, bool) else "true or false"
    if key == ORIGINAL:
        return None if is_int(value) and 0 < value <= LARGEST else f"an integer from 1 to {LARGEST}"
    if key in ("short_factor", "long_factor"):
        return None if isinstance(value, list) and all(map(_is_positive, value)) else "a list of numbers above 0"
    return None if _is_positive(value) else "a number above 0"


def _is_positive(value: Any) -> bool:
    return (is_int(value) or isinstance(value, float)) and 0 < value < 1e38


def _default(powers: np.ndarray, values: Mapping[str, Any]) -> Rope:
    return Rope(_tuple(1 / powers))


def _linear(powers: np.ndarray, values: Mapping[str, Any]) -> Rope:
    return Rope(_tuple(1 / powers / np.float32(values["factor"])))


def _llama3(powers: np.ndarray, values: Mapping[str, Any]) -> Rope:
    """Slow the slow rotations by the factor, keep the fast ones, and blend those between."""
    frequencies, factor = 1 / powers, np.float32(values["factor"])
    low, high, original = (
        values[key] for key in ("low_freq_factor", "high_freq_factor", "original_max_position_embeddings")
    )
    lengths = 2 * np.float32(math.pi) / frequencies  # of the waves
    slowed = np.where(lengths > original / low, frequencies / factor, frequencies)
    between = (lengths >= original / high) & (lengths <= original / low)
    blend = (original / lengths - low) / np.float32((high - low) or math.nan)
    return Rope(_tuple(np.where(between, (1 - blend) * slowed / factor + blend * slowed, slowed)))


def _yarn(powers: np.ndarray, values: Mapping[str, Any]) -> Rope:
    """Scale as YaRN does (Peng et al. 2023)."""
    factor, original = values["factor"], values["original_max_position_embeddings"]
    size, theta = 2 * len(powers), values["rope_theta"]

    def dimension(rotations: float) -> float:
        return size * math.log(original / (rotations * 2 * math.pi)) / (2 * math.log(theta))

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
    """Scale as LongRoPE does (Ding et al. 2024): factors by frequency, other ones past the original length."""
    original, factor = values["original_max_position_embeddings"], values["factor"]
    scale = values.get("attention_factor")
    if scale is None:
        scale = math.sqrt(1 + math.log(factor) / math.log(original)) if factor > 1 else 1.0
    short, long = (1 / (np.asarray(values[f"{name}_factor"], np.float32) * powers) for name in ("short", "long"))
    return Rope(_tuple(short), float(scale), _tuple(long), original)


def _tuple(frequencies: np.ndarray) -> Frequencies:
    return tuple(frequencies.astype(np.float32).tolist())


_SCALINGS = {"default": _default, "linear": _linear, "llama3": _llama3, "yarn": _yarn, "longrope": _longrope}
