"""Tensors in safetensors files: read a slice at a time into shards, and written a layer at a time."""

import hashlib
import itertools
import json
import mmap
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import safetensors
from safetensors.numpy import save_file

from jax_it import files, hosts, sharding
from jax_it.errors import UserError, first_line
from jax_it.files import check_regular, read_json_object
from jax_it.models.quantized import KINDS, Quantized, quantize
from jax_it.models.weights import Weight

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
_SAMPLES = 64  # of each file, of 64 KiB
SHARD_BYTES = 5_000_000_000  # as Transformers' own default
DTYPES = {"float32": np.dtype(np.float32), "bfloat16": np.dtype(ml_dtypes.bfloat16), "float16": np.dtype(np.float16)}


def find_folder(path: str) -> Path:
    """A local folder, or the local copy of a hub repository, downloaded where it is not there yet."""
    if (folder := files.locate_local(path, "model")).is_dir():
        return folder
    if path.startswith((".", "/", "~")) or path.count("/") > 1:
        raise UserError(f"model folder {path} does not exist")
    if path not in _fetched:  # by every host the first time: they wait for each other
        with hosts.first_then_others():
            _fetched[path] = _fetch(path)
    return _fetched[path]


_fetched: dict[str, Path] = {}  # the folders of hub names


def _fetch(path: str) -> Path:
    import huggingface_hub  # slow to import, and needed for names alone
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        patterns = ["*.json", "*.safetensors", "*.model", "*.txt", "*.jinja"]
        return Path(huggingface_hub.snapshot_download(path, allow_patterns=patterns))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        reason = first_line(error)
        raise UserError(f"model {path!r} is no local folder and could not be fetched from the hub: {reason}") from error


def fingerprint(folder: Path) -> str:
    """A hash of the names, sizes, headers and samples of a folder's weights: enough to notice other ones."""
    parts = hashlib.blake2b(digest_size=16)
    for file in sorted(folder.glob("*.safetensors")):
        if not file.is_file():
            raise UserError(f"{file} is not a regular file; restore it")
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
    """The tensors of a folder's safetensors files, by name, read a slice at a time.

    The files are mapped into memory, and of what has been read only the last tensor stays there.
    """

    def __init__(self, folder: Path, stack: ExitStack, single: str = SINGLE):
        self.folder = folder
        self._single = single
        self._places: dict[str, _Place] = {}
        self._last: _Place | None = None
        for file in self._find_files():
            try:
                check_regular(folder / file)
                with safetensors.safe_open(folder / file, framework="numpy"):
                    pass  # it is whole, and its header is right
                found = _map(folder / file)
            except FileNotFoundError:
                raise UserError(f"{folder / file} is missing, but {INDEX} names it; fetch the folder again") from None
            except OSError as error:
                raise UserError(f"{folder / file} cannot be read: {error.strerror or error}") from None
            except (safetensors.SafetensorError, ValueError, RecursionError) as error:
                raise UserError(f"{folder / file} is damaged ({first_line(error)}); fetch it again") from None
            if twice := sorted(found.keys() & self._places.keys()):
                raise UserError(f"{folder / file}: {twice[0]} is in another file of the folder too; fetch it again")
            self._places |= found
        stack.callback(self._release)

    def add_prefix(self, prefix: str, but: str) -> None:
        """Gives all names the prefix, where none has it."""
        if prefix and not any(name.startswith(prefix) for name in self._places):
            self._places = {name if name == but else prefix + name: found for name, found in self._places.items()}

    def _find_files(self) -> list[str]:
        index = self.folder / INDEX
        if self._single == SINGLE and (index.exists() or index.is_symlink()):
            files = read_json_object(index).get("weight_map")
            if not isinstance(files, dict) or not files:
                raise UserError(f"{index} is damaged: it has no weight_map; fetch it again")
            for file in files.values():
                # Another folder's file could be anything. Links may lead out of this one: hub caches have them.
                if not isinstance(file, str) or file in ("", ".", "..") or "/" in file or "\0" in file:
                    raise UserError(f"{index}: weight_map names {file!r}, which is not a file of its folder")
            return sorted(set(files.values()))
        single = self.folder / self._single
        if single.exists() or single.is_symlink():
            return [self._single]
        if any(self.folder.glob("pytorch_model*.bin")):
            raise UserError(
                f"{self.folder} holds pytorch_model.bin, which can run code when read; convert it once with "
                "Transformers: AutoModelForSeq2SeqLM.from_pretrained(folder).save_pretrained(folder)"
            )
        raise UserError(f"{self.folder} has no {self._single}; set config.model.pretrained=False for random weights")

    def names(self) -> set[str]:
        return set(self._places)

    def shape(self, name: str) -> tuple[int, ...]:
        return self._places[name].shape

    def read(self, name: str, slices: tuple[slice, ...]) -> np.ndarray:
        """A view of the file, to be copied before the next tensor is read. Raises UserError if it is not finite."""
        place = self._places[name]
        if place is not self._last:
            self._release()
            self._last = place
        if not place.length:
            return np.zeros(place.shape, place.dtype)[slices]
        whole = np.frombuffer(place.file, np.uint8, place.length, place.start).view(place.dtype)
        part = whole.reshape(place.shape)[slices]
        if not _is_finite(part):
            raise UserError(f"{self.folder}: {name} holds NaN or infinity: nothing could be computed with it")
        return part

    def _release(self) -> None:
        """Gives the memory of the last tensor back. Views of it are read from the file again."""
        if self._last is not None and self._last.length:
            first = self._last.start // mmap.PAGESIZE * mmap.PAGESIZE
            self._last.file.madvise(mmap.MADV_DONTNEED, first, self._last.start + self._last.length - first)
        self._last = None

    def same(self, name: str, other: str) -> bool:
        """Whether two tensors are equal, compared in pieces of a bounded size."""
        if self.shape(name) != self.shape(other):
            return False
        rows, length = 4096, self.shape(name)[0]
        pieces = (slice(i, min(i + rows, length)) for i in range(0, length, rows))
        return all(np.array_equal(self.read(name, (p,)), self.read(other, (p,))) for p in pieces)


def _is_finite(array: np.ndarray) -> bool:
    """Whether a float32 can hold every value; several times as fast as `np.isfinite`, which makes an array.

    As integers, NaN and infinity are the largest of the positive values, and as unsigned ones of the negative values.
    """
    if not array.size or not jnp.issubdtype(array.dtype, jnp.floating):
        return True
    signed, unsigned = np.dtype(f"i{array.itemsize}"), np.dtype(f"u{array.itemsize}")
    limit = np.array(2.0**128 if array.itemsize == 8 else np.inf, array.dtype)
    lowest, of_negative = int(limit.view(unsigned)), int((-limit).view(unsigned))
    return bool(array.view(signed).max() < lowest and array.view(unsigned).max() < of_negative)


class _Place(NamedTuple):
    """Where a tensor is."""

    file: mmap.mmap
    start: int  # byte
    length: int
    dtype: Any
    shape: tuple[int, ...]


def _map(file: Path) -> dict[str, _Place]:
    """The tensors of a safetensors file: 8 bytes say how long its header is, which is JSON; then come the tensors."""
    with file.open("rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
        header = json.loads(stream.read(length))
        mapped = mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ)
    header.pop("__metadata__", None)
    places = {}
    for name, entry in header.items():
        if entry["dtype"] not in _FILE_DTYPES:
            raise UserError(f"{file}: {name} is of type {entry['dtype']}, which jax_it does not read")
        start, stop = entry["data_offsets"]
        dtype = np.dtype(_FILE_DTYPES[entry["dtype"]])
        places[name] = _Place(mapped, 8 + length + start, stop - start, dtype, tuple(entry["shape"]))
    return places


_FILE_DTYPES: dict[str, Any] = {
    "F64": np.float64, "F32": np.float32, "F16": np.float16, "BF16": ml_dtypes.bfloat16,
    "F8_E4M3": ml_dtypes.float8_e4m3fn, "F8_E5M2": ml_dtypes.float8_e5m2, "BOOL": np.bool_,
    "I64": np.int64, "I32": np.int32, "I16": np.int16, "I8": np.int8,
    "U64": np.uint64, "U32": np.uint32, "U16": np.uint16, "U8": np.uint8,
}  # fmt: skip


def read_weight(
    weight: Weight,
    shape: tuple[int, ...],
    read: Callable[[str, tuple[slice, ...]], np.ndarray],
    kind: str,
    mesh: jax.sharding.Mesh,
) -> Any:
    """One of our arrays, sharded over the mesh, as a dtype or quantised.

    Beside its shards a host holds one of them and a tensor's part at a time, and reads none twice for replicas.
    """
    if kind in KINDS:
        return _read_quantized(weight, shape, read, kind, mesh)
    whole = jax.ShapeDtypeStruct(shape, jnp.dtype(kind))
    (array,) = _place(
        [whole], weight.letters, mesh, lambda index: [weight.cut(shape, index, read, whole.dtype)], by_rows=False
    )
    return array


def _read_quantized(
    weight: Weight,
    shape: tuple[int, ...],
    read: Callable[[str, tuple[slice, ...]], np.ndarray],
    kind: str,
    mesh: jax.sharding.Mesh,
) -> Quantized:
    whole = jax.eval_shape(lambda array: quantize(array, kind), jax.ShapeDtypeStruct(shape, jnp.float32))
    stacked = len(weight.stacked)

    def rows(index: tuple[slice, ...]) -> list[np.ndarray]:
        """Codes and scales of some rows, a tensor's at a time: in float32 these are eight times as large."""
        spans = [range(*i.indices(n)) for i, n in zip(index, shape, strict=False)]
        parts = [np.empty((*map(len, spans), part.shape[-1]), part.dtype) for part in (whole.codes, whole.scales)]
        for position in itertools.product(*(enumerate(span) for span in spans[:stacked])):
            layer = [slice(i, i + 1) for _, i in position]
            made = quantize(weight.cut(shape, (*layer, *index[stacked:], slice(None)), read), kind)
            for part, new in zip(parts, (made.codes, made.scales), strict=True):
                part[tuple(number for number, _ in position)] = new.reshape(new.shape[stacked:])
        return parts

    codes, scales = _place([whole.codes, whole.scales], weight.letters, mesh, rows, by_rows=True)
    return Quantized(codes, scales, kind)


def _place(
    arrays: Sequence[Any],
    letters: str,
    mesh: jax.sharding.Mesh,
    make: Callable[[tuple[slice, ...]], list[np.ndarray]],
    by_rows: bool,
) -> list[jax.Array]:
    """Arrays with the same axes, device after device; `make(index)` gives the parts of all of them at an index.

    `by_rows`: the index lacks the last axis, in which the arrays differ, and the parts are whole along it.
    """
    placements = [jax.sharding.NamedSharding(mesh, sharding.spec(letters, array.shape, mesh)) for array in arrays]
    indices: list[Any] = [p.addressable_devices_indices_map(a.shape) for p, a in zip(placements, arrays, strict=True)]
    together: dict[str, list[jax.Device]] = {}  # devices that need the same
    for device, index in indices[0].items():
        together.setdefault(repr(index[:-1] if by_rows else index), []).append(device)
    put: list[dict[jax.Device, jax.Array]] = [{} for _ in arrays]
    for devices in together.values():
        first = indices[0][devices[0]]
        for number, part in enumerate(make(first[:-1] if by_rows else first)):
            for device in devices:
                mine = part[..., indices[number][device][-1]] if by_rows else part
                put[number][device] = jax.device_put(mine, device)
            jax.block_until_ready([put[number][device] for device in devices])  # before the next part is made
    return [
        jax.make_array_from_single_device_arrays(array.shape, placement, list(parts.values()))
        for array, placement, parts in zip(arrays, placements, put, strict=True)
    ]


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
                part = fetch(leaves[path], index).astype(dtype)
                tensor = weights[path].restore(part, tensor)
            assert tensor is not None
            yield name, np.ascontiguousarray(tensor)


def fetch(array: Any, index: tuple[int, ...] = ()) -> np.ndarray:
    """An array, or an entry of its first axes, on every host: where it lies on several, all must ask for it."""
    if not isinstance(array, jax.Array) or array.is_fully_addressable:
        return np.asarray(jax.device_get(array[index]))
    placement: Any = array.sharding
    return np.asarray(_gather(sharding.replicated(placement.mesh))(array, *index))


@lru_cache
def _gather(whole: jax.sharding.NamedSharding) -> Callable[..., jax.Array]:
    """`gather(array, *index)`: the entry, the same on every device; it is compiled once for each shape."""
    return jax.jit(lambda array, *index: array[index], out_shardings=whole)


def write_files(folder: Path, tensors: Iterable[tuple[str, np.ndarray]]) -> None:
    """Writes the tensors as one safetensors file, or as several with their index. The first host does."""
    if not hosts.is_first():
        deque(tensors, maxlen=0)  # they are gathered from all hosts
        return
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
