"""A tiny random model of a family, made by numpy alone: a config.json, and tensors that follow from names and shapes.

Nothing of a case is stored, and nothing here asks jax_it what a checkpoint holds. Weights have scales with which
activations, logits and gradients are of order 1, so that a tolerance means the same in every case.
"""

import hashlib
import json
import math
import zlib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jax
import ml_dtypes
import numpy as np
from safetensors.numpy import save_file

from jax_it import config, pretrained, sharding
from jax_it.models import Model, Params

DTYPES = {"float32": np.dtype(np.float32), "bfloat16": np.dtype(ml_dtypes.bfloat16), "float16": np.dtype(np.float16)}
Shapes = dict[str, tuple[int, ...]]


@dataclass(frozen=True)
class Case:
    """One model: its config.json as its authors published it (dead keys included), scaled down."""

    name: str
    values: Mapping[str, Any]  # config.json
    untied: bool  # the checkpoint has a head that differs from its embedding
    shapes: Callable[["Case"], Shapes]  # of the tensors that are read, by published name
    draw: Callable[["Case", str, np.ndarray], np.ndarray]  # a tensor, from uniform numbers in [0, 1)
    dead: Mapping[str, tuple[int, ...]] = field(default_factory=dict)  # published tensors that nobody reads
    seed: int = 0  # of the inputs: one whose greedy texts vary, without ties

    @property
    def random(self) -> np.random.RandomState:
        """The source of the inputs."""
        return np.random.RandomState(zlib.crc32(self.name.encode()) + self.seed)

    @property
    def end_tokens(self) -> list[int]:
        ends = self.values["eos_token_id"]
        return ends if isinstance(ends, list) else [ends]


def centred(uniform: np.ndarray) -> np.ndarray:
    """Of mean 0 and deviation 1: a uniform number's is √(1/12)."""
    return math.sqrt(12) * (uniform - 0.5)


def tensor_shapes(case: Case) -> Shapes:
    """The names and shapes of a checkpoint's tensors in Transformers' format."""
    return case.shapes(case) | case.dead


def tensors(case: Case, dtype: str = "float32") -> dict[str, np.ndarray]:
    """A checkpoint's tensors, each drawn by a seed that is its name."""
    made = {}
    for name, shape in tensor_shapes(case).items():
        uniform = np.asarray(np.random.RandomState(zlib.crc32(name.encode())).random_sample(shape))
        made[name] = np.asarray(case.draw(case, name, uniform)).astype(np.float32).astype(DTYPES[dtype])
    return made


def write(case: Case, folder: Path, dtype: str = "float32") -> Path:
    """Writes the case as a folder in Transformers' format."""
    folder.mkdir(parents=True, exist_ok=True)
    named = "dtype" if "dtype" in case.values else "torch_dtype"  # as Transformers 5 writes, or 4
    (folder / "config.json").write_text(json.dumps({**case.values, named: dtype}, indent=2))
    save_file(tensors(case, dtype), folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def load(folder: Path, **settings: Any) -> tuple[Model, Params]:
    """The folder's model and params on one device, through the reader that users get."""
    mesh = sharding.make_mesh(config.Mesh(), jax.devices()[:1])
    return pretrained.load(config.Model(path=str(folder), **settings), mesh)


def digest(case: Case, inputs: Iterable[np.ndarray]) -> str:
    """Changes with anything that PyTorch's results for the case depend on."""
    hashed = hashlib.sha256(json.dumps(dict(case.values), sort_keys=True).encode())
    for name, tensor in tensors(case).items():
        hashed.update(name.encode() + tensor.tobytes())
    for array in inputs:
        hashed.update(array.tobytes())
    return hashed.hexdigest()
