"""A folder's safetensors files: checked, and read a slice at a time; and how they are written."""

import json
import mmap
from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import safetensors
from safetensors.numpy import save_file

from jax_it import hosts
from jax_it.errors import UserError, first_line
from jax_it.files import check_regular, read_json_object

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
SHARD_BYTES = 5_000_000_000  # as Transformers' own default
DTYPES = {"float32": np.dtype(np.float32), "bfloat16": np.dtype(ml_dtypes.bfloat16), "float16": np.dtype(np.float16)}


class TensorReader:
    """The tensors of a folder's safetensors files, by name: `with TensorReader(folder) as tensors`.

    The files are mapped into memory, and of what has been read only the last tensor stays there. Raises UserError for
    a file that is missing, damaged or not a regular file.
    """

    def __init__(self, folder: Path, single: str = SINGLE):
        self.folder = folder
        self._single = single
        self._entries: dict[str, _Entry] = {}
        self._new_rows: dict[str, _NewRows] = {}
        self._last: _Entry | None = None
        for file in self._find_files():
            try:
                check_regular(folder / file)
                with safetensors.safe_open(folder / file, framework="numpy"):
                    pass  # it is whole, and its header is right
                found = _map(folder / file)
            except FileNotFoundError:
                raise UserError(
                    f"{folder / file} is missing, but {INDEX} names it; download the folder again"
                ) from None
            except OSError as error:
                raise UserError(f"{folder / file} cannot be read: {error.strerror or error}") from None
            except (safetensors.SafetensorError, ValueError, RecursionError) as error:
                raise UserError(f"{folder / file} is damaged ({first_line(error)}); download it again") from None
            if twice := sorted(found.keys() & self._entries.keys()):
                raise UserError(f"{folder / file}: {twice[0]} is in another file of the folder too; download it again")
            self._entries |= found

    def __enter__(self) -> "TensorReader":
        return self

    def __exit__(self, *raised: object) -> None:
        self._release()

    def add_prefix(self, prefix: str, but: str) -> None:
        """Give all names the prefix, where none has it."""
        if prefix and not any(name.startswith(prefix) for name in self._entries):
            self._entries = {name if name == but else prefix + name: found for name, found in self._entries.items()}

    def set_new_rows(self, name: str, total: int, new: Sequence[int]) -> None:
        """Give a matrix `total` rows. Those in `new`, and those that the file lacks, are the mean of those before."""
        rows, *others = self._entries[name].shape
        self._new_rows[name] = _NewRows((total, *others), frozenset({*new, *range(rows, total)}))

    def _find_files(self) -> list[str]:
        index = self.folder / INDEX
        if self._single == SINGLE and (index.exists() or index.is_symlink()):
            files = read_json_object(index).get("weight_map")
            if not isinstance(files, dict) or not files:
                raise UserError(f"{index} is damaged: it has no weight_map; download it again")
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
        return set(self._entries)

    def shape(self, name: str) -> tuple[int, ...]:
        return self._new_rows[name].shape if name in self._new_rows else self._entries[name].shape

    def read(self, name: str, slices: tuple[slice, ...]) -> np.ndarray:
        """Return a view of the file, to be copied before the next read. Raises UserError if it is not finite."""
        if name in self._new_rows:
            return self._read_with_new_rows(name, slices)
        return self._read(name, slices)

    def _read_with_new_rows(self, name: str, slices: tuple[slice, ...]) -> np.ndarray:
        """Return an array of its own. The mean is taken over pieces of a bounded size, in float64."""
        entry, new = self._entries[name], self._new_rows[name]
        if new.mean is None:
            rows, number = 4096, min(new.ids)
            total = np.zeros(new.shape[1:])
            for start in range(0, number, rows):
                total += self._read(name, (slice(start, min(start + rows, number)),)).sum(0, dtype=np.float64)
            new.mean = (total / number).astype(entry.dtype)
        first, *others = slices or (slice(None),)
        start, stop, _ = first.indices(new.shape[0])
        mean = new.mean[tuple(others)]
        made = np.empty((stop - start, *mean.shape), entry.dtype)
        there = slice(start, max(min(stop, entry.shape[0]), start))
        made[: there.stop - start] = self._read(name, (there, *others))
        made[[row - start for row in new.ids if start <= row < stop]] = mean
        return made

    def _read(self, name: str, slices: tuple[slice, ...]) -> np.ndarray:
        entry = self._entries[name]
        if entry is not self._last:
            self._release()
            self._last = entry
        if not entry.length:
            return np.zeros(entry.shape, entry.dtype)[slices]
        whole = np.frombuffer(entry.file, np.uint8, entry.length, entry.start).view(entry.dtype)
        part = whole.reshape(entry.shape)[slices]
        if not _is_finite(part):
            raise UserError(f"{self.folder}: {name} holds NaN or infinity: nothing could be computed with it")
        return part

    def _release(self) -> None:
        """Give back the memory of the last tensor. Views of it are read from the file again."""
        if self._last is not None and self._last.length:
            first = self._last.start // mmap.PAGESIZE * mmap.PAGESIZE
            self._last.file.madvise(mmap.MADV_DONTNEED, first, self._last.start + self._last.length - first)
        self._last = None

    def same(self, name: str, other: str) -> bool:
        """Return whether two tensors are equal, compared in pieces of a bounded size."""
        if self.shape(name) != self.shape(other):
            return False
        rows, length = 4096, self.shape(name)[0]
        pieces = (slice(i, min(i + rows, length)) for i in range(0, length, rows))
        return all(np.array_equal(self.read(name, (p,)), self.read(other, (p,))) for p in pieces)


def _is_finite(array: np.ndarray) -> bool:
    """Return whether a float32 can hold every value; several times as fast as `np.isfinite`, which makes an array.

    As integers, NaN and infinity are the largest of the positive values, and as unsigned ones of the negative values.
    """
    if not array.size or not jnp.issubdtype(array.dtype, jnp.floating):
        return True
    signed, unsigned = np.dtype(f"i{array.itemsize}"), np.dtype(f"u{array.itemsize}")
    limit = np.array(2.0**128 if array.itemsize == 8 else np.inf, array.dtype)
    lowest, of_negative = int(limit.view(unsigned)), int((-limit).view(unsigned))
    return bool(array.view(signed).max() < lowest and array.view(unsigned).max() < of_negative)


@dataclass
class _NewRows:
    """Rows that a matrix gets in addition to, or in place of, those of its file."""

    shape: tuple[int, ...]
    ids: frozenset[int]
    mean: np.ndarray | None = None  # computed when it is needed


class _Entry(NamedTuple):
    """Where a tensor lies."""

    file: mmap.mmap
    start: int  # byte
    length: int
    dtype: Any
    shape: tuple[int, ...]


def _map(file: Path) -> dict[str, _Entry]:
    """Read the header of a safetensors file: 8 bytes say how long it is, and it is JSON."""
    with file.open("rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
        header = json.loads(stream.read(length))
        mapped = mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ)
    header.pop("__metadata__", None)
    entries = {}
    for name, entry in header.items():
        if entry["dtype"] not in _DTYPES_IN_FILES:
            raise UserError(f"{file}: {name} has type {entry['dtype']}, which jax_it does not read")
        start, stop = entry["data_offsets"]
        dtype = np.dtype(_DTYPES_IN_FILES[entry["dtype"]])
        entries[name] = _Entry(mapped, 8 + length + start, stop - start, dtype, tuple(entry["shape"]))
    return entries


_DTYPES_IN_FILES: dict[str, Any] = {
    "F64": np.float64, "F32": np.float32, "F16": np.float16, "BF16": ml_dtypes.bfloat16,
    "F8_E4M3": ml_dtypes.float8_e4m3fn, "F8_E5M2": ml_dtypes.float8_e5m2, "BOOL": np.bool_,
    "I64": np.int64, "I32": np.int32, "I16": np.int16, "I8": np.int8,
    "U64": np.uint64, "U32": np.uint32, "U16": np.uint16, "U8": np.uint8,
}  # fmt: skip


def write_files(folder: Path, tensors: Iterable[tuple[str, np.ndarray]]) -> None:
    """Write (name, tensor) pairs, on the first host: one safetensors file, or several with their index."""
    if not hosts.is_first():
        deque(tensors, maxlen=0)  # which are gathered from all hosts
        return
    shards: list[dict[str, np.ndarray]] = [{}]
    size, shard_of, total = 0, {}, 0
    for name, tensor in tensors:
        if size and size + tensor.nbytes > SHARD_BYTES:
            _write_shard(folder, len(shards), shards[-1])
            shards.append({})
            size = 0
        shards[-1][name] = tensor
        shard_of[name] = len(shards)
        size += tensor.nbytes
        total += tensor.nbytes
    _write_shard(folder, len(shards), shards[-1])
    files = {i: f"model-{i:05d}-of-{len(shards):05d}.safetensors" for i in range(1, len(shards) + 1)}
    if len(shards) == 1:
        files[1] = SINGLE
    for i, file in files.items():
        (folder / f"{i}.part").rename(folder / file)
    if len(shards) > 1:
        index = {"metadata": {"total_size": total}, "weight_map": {n: files[i] for n, i in sorted(shard_of.items())}}
        (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n")


def _write_shard(folder: Path, number: int, tensors: dict[str, np.ndarray]) -> None:
    save_file(tensors, folder / f"{number}.part", metadata={"format": "pt"})
    tensors.clear()
