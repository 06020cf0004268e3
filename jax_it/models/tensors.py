"""Tensors in safetensors files: read a slice at a time into shards, and written a layer at a time."""

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import safetensors
from safetensors.numpy import save_file

from jax_it import sharding
from jax_it.errors import UserError
from jax_it.models.quantized import KINDS, Quantized, quantize
from jax_it.models.weights import Weight

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
_SAMPLES = 64  # of each file, of 64 KiB
SHARD_BYTES = 5_000_000_000  # as Transformers' own default
DTYPES = {"float32": np.dtype(np.float32), "bfloat16": np.dtype(ml_dtypes.bfloat16), "float16": np.dtype(np.float16)}


def find_folder(path: str) -> Path:
    """A local folder, or the local copy of a hub repository, downloaded where it is not there yet."""
    if Path(path).is_dir():
        return Path(path)
    if path.startswith((".", "/", "~")) or path.count("/") > 1:
        raise UserError(f"model folder {path} does not exist")
    import huggingface_hub  # slow to import, and needed for names alone
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        patterns = ["*.json", "*.safetensors", "*.model", "*.txt", "*.jinja"]
        return Path(huggingface_hub.snapshot_download(path, allow_patterns=patterns))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        reason = str(error).strip().splitlines()[0]
        raise UserError(f"model {path!r} is no local folder and could not be fetched from the hub: {reason}") from error


def fingerprint(folder: Path) -> str:
    """A hash of the names, sizes, headers and samples of a folder's weights: enough to notice other ones."""
    parts = hashlib.blake2b(digest_size=16)
    for file in sorted(folder.glob("*.safetensors")):
        size = file.stat().st_size
        parts.update(f"{file.name} {size}".encode())
        with file.open("rb") as stream:
            header = int.from_bytes(stream.read(8), "little")
            parts.update(stream.read(min(header, size)))
            for i in range(_SAMPLES):
                stream.seek(8 + header + (size - 8 - header) * i // _SAMPLES)
                parts.update(stream.read(1 << 16))
    return parts.hexdigest()


class Tensors:
    """The tensors of a folder's safetensors files, by name, read a slice at a time."""

    def __init__(self, folder: Path, stack: ExitStack, single: str = SINGLE):
        self.folder = folder
        self._single = single
        self._files: dict[str, tuple[Any, str]] = {}  # name -> (file, its name in there)
        for file in self._find_files():
            try:
                opened = stack.enter_context(safetensors.safe_open(folder / file, framework="numpy"))
            except FileNotFoundError:
                raise UserError(f"{folder / file} is missing, but {INDEX} names it; fetch the folder again") from None
            except safetensors.SafetensorError as error:
                raise UserError(f"{folder / file} is damaged ({error}); fetch it again") from None
            self._files |= {name: (opened, name) for name in opened.keys()}  # noqa: SIM118 (no mapping)

    def add_prefix(self, prefix: str, but: str) -> None:
        """Gives all names the prefix, where none has it."""
        if prefix and not any(name.startswith(prefix) for name in self._files):
            self._files = {name if name == but else prefix + name: found for name, found in self._files.items()}

    def _find_files(self) -> list[str]:
        index = self.folder / INDEX
        if index.is_file():
            try:
                return sorted(set(json.loads(index.read_text())["weight_map"].values()))
            except (ValueError, KeyError, TypeError, AttributeError):
                raise UserError(f"{index} is damaged: it has no weight_map; fetch it again") from None
        if (self.folder / self._single).is_file():
            return [self._single]
        if any(self.folder.glob("pytorch_model*.bin")):
            raise UserError(
                f"{self.folder} holds pytorch_model.bin, which can run code when read; convert it once with "
                "Transformers: AutoModelForSeq2SeqLM.from_pretrained(folder).save_pretrained(folder)"
            )
        raise UserError(f"{self.folder} has no {self._single}; set config.model.pretrained=False for random weights")

    def names(self) -> set[str]:
        return set(self._files)

    def shape(self, name: str) -> tuple[int, ...]:
        file, inside = self._files[name]
        return tuple(file.get_slice(inside).get_shape())

    def read(self, name: str, slices: tuple[slice, ...]) -> np.ndarray:
        file, inside = self._files[name]
        return file.get_slice(inside)[slices]

    def same(self, name: str, other: str) -> bool:
        """Whether two tensors are equal, compared in pieces of a bounded size."""
        if self.shape(name) != self.shape(other):
            return False
        rows, length = 4096, self.shape(name)[0]
        pieces = (slice(i, min(i + rows, length)) for i in range(0, length, rows))
        return all(np.array_equal(self.read(name, (p,)), self.read(other, (p,))) for p in pieces)


def read_weight(
    weight: Weight,
    shape: tuple[int, ...],
    read: Callable[[str, tuple[slice, ...]], np.ndarray],
    kind: str,
    mesh: jax.sharding.Mesh,
) -> Any:
    """One of our arrays, sharded over the mesh, as a dtype or quantised."""

    def place(shape: tuple[int, ...], part: Callable[[Any], np.ndarray]) -> jax.Array:
        return jax.make_array_from_callback(
            shape, jax.sharding.NamedSharding(mesh, sharding.spec(weight.letters, shape, mesh)), part
        )

    if kind not in KINDS:
        return place(shape, lambda index: weight.cut(shape, index, read).astype(jnp.dtype(kind)))
    whole = jax.eval_shape(lambda array: quantize(array, kind), jax.ShapeDtypeStruct(shape, jnp.float32))
    made: dict[str, Quantized] = {}  # rows are quantised once, for codes and scales

    def rows(index: tuple[slice, ...]) -> Quantized:
        key = repr(index[:-1])
        if key not in made:
            made[key] = quantize(weight.cut(shape, (*index[:-1], slice(None)), read), kind)
        return made[key]

    codes = place(whole.codes.shape, lambda index: rows(index).codes[..., index[-1]])
    scales = place(whole.scales.shape, lambda index: rows(index).scales[..., index[-1]])
    return Quantized(codes, scales, kind)


def write_weights(
    weights: Mapping[str, Weight], leaves: Mapping[str, Any], dtype: Any
) -> Iterator[tuple[str, np.ndarray]]:
    """The tensors of some weights, by path; those that share tensors are written into them together."""
    together: dict[str, list[str]] = {}
    for path, weight in weights.items():
        together.setdefault(weight.name, []).append(path)
    for paths in together.values():
        for index, name in weights[paths[0]].tensors(leaves[paths[0]].shape):
            tensor: np.ndarray | None = None
            for path in paths:
                part = np.asarray(jax.device_get(leaves[path][index])).astype(dtype)
                tensor = weights[path].restore(part, tensor)
            assert tensor is not None
            yield name, np.ascontiguousarray(tensor)


def write_files(folder: Path, tensors: Iterable[tuple[str, np.ndarray]]) -> None:
    """Writes the tensors as one safetensors file, or as several with their index."""
    shards: list[dict[str, np.ndarray]] = [{}]
    size, places, total = 0, {}, 0
    for name, tensor in tensors:
        if size and size + tensor.nbytes > SHARD_BYTES:
            _write_shard(folder, len(shards), shards[-1])
            shards.append({})
            size = 0
        shards[-1][name] = tensor
        places[name] = len(shards)
        size += tensor.nbytes
        total += tensor.nbytes
    _write_shard(folder, len(shards), shards[-1])
    files = {i: f"model-{i:05d}-of-{len(shards):05d}.safetensors" for i in range(1, len(shards) + 1)}
    if len(shards) == 1:
        files[1] = SINGLE
    for i, file in files.items():
        (folder / f"{i}.part").rename(folder / file)
    if len(shards) > 1:
        index = {"metadata": {"total_size": total}, "weight_map": {n: files[i] for n, i in sorted(places.items())}}
        (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n")


def _write_shard(folder: Path, number: int, tensors: dict[str, np.ndarray]) -> None:
    save_file(tensors, folder / f"{number}.part", metadata={"format": "pt"})
    tensors.clear()
