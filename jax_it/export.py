"""A run's weights as a folder in Transformers format, read back and compared before it is called done."""

import shutil
import stat
import tempfile
from contextlib import ExitStack
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from jax_it import sharding
from jax_it.checkpoint import disk_error
from jax_it.config import Mesh
from jax_it.data.tokenizer import Tokenizer
from jax_it.errors import UserError
from jax_it.models import Model, Params, hf
from jax_it.models.weights import flatten
from jax_it.workdir import Workdir


def export(workdir: str | Path, output: str | Path, checkpoint: str = "latest", dtype: str = "") -> int:
    """Writes a checkpoint of a run to `output`, which must not exist yet. Returns its step."""
    _check_free(Path(output))
    place = Workdir(Path(workdir))
    config, derived = place.open()
    step = place.choose_step(checkpoint, config.eval.best)
    mesh = sharding.make_mesh(Mesh())
    model = place.model(config, derived)
    params = place.params(model, step, mesh, jnp.dtype(config.model.param_dtype))
    save(output, model, params, place.tokenizer(), extras=place.path / "model", dtype=dtype)
    return step


def save(
    output: str | Path, model: Model, params: Params, tokenizer: Tokenizer, extras: Path | None = None, dtype: str = ""
) -> None:
    """Writes config.json, weights, tokenizer and generation settings: whole or not at all."""
    output = Path(output)
    _check_free(output)
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        part = Path(tempfile.mkdtemp(prefix=f".{output.name}-", dir=output.parent))
    except OSError as error:
        raise UserError(f"cannot write to {output.parent}: {error.strerror}") from error
    try:
        hf.save(part, model, params, dtype)
        tokenizer.save(part)
        hf.save_generation_settings(extras, part, model)
        _compare(part, model, params)
        _share(part)
        part.replace(output)
    except Exception as error:
        if not (reason := disk_error(error)):
            raise
        raise UserError(f"cannot write {output}: {reason}; free space and export again") from error
    finally:
        shutil.rmtree(part, ignore_errors=True)


def _check_free(output: Path) -> None:
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise UserError(f"{output} exists already; name another folder, or remove it")


def _share(folder: Path) -> None:
    """Gives all of it the permissions of an ordinary new file: tempfile and safetensors keep theirs private."""
    mode = stat.S_IMODE((folder / "config.json").stat().st_mode)
    for file in folder.glob("*.*"):
        file.chmod(mode)
    folder.chmod(mode | (mode & 0o444) >> 2)  # who may read may enter


def _compare(folder: Path, model: Model, params: Params) -> None:
    """Reads the weights back and holds them against what was to be written."""
    leaves = flatten(params)
    with ExitStack() as stack:
        tensors = hf.Tensors(folder, stack)
        for path, weight in model.weights.items():
            array = leaves[path]
            for i, name in enumerate(weight.names(array.shape)):
                layer = np.asarray(jax.device_get(array[i] if weight.stacked else array))
                shape = weight.tensor_shape(array.shape)
                written = tensors.read(name, tuple(slice(0, n) for n in shape))
                if weight.restore(layer).astype(written.dtype).tobytes() != written.tobytes():
                    raise UserError(f"{folder}: {name} does not read back as it was written; export again")
