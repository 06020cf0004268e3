"""A run's weights as a folder in Transformers or PEFT format, read back and compared before it is called done."""

import os
import stat
import tempfile
from collections import deque
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
from etils import epath

from jax_it import files, hosts
from jax_it.checkpointing import disk_error
from jax_it.data import chat
from jax_it.data.tokenizer import Tokenizer
from jax_it.errors import UserError
from jax_it.models import Model, Params
from jax_it.pretrained import hf, peft
from jax_it.pretrained.safetensors import SINGLE, TensorReader
from jax_it.run import open_run
from jax_it.run_dir import RunDir


def export(
    workdir: str | Path, output: str | Path, checkpoint: str = "latest", dtype: str = "", adapter_only: bool = False
) -> int:
    """Writes a checkpoint of a run to `output`, which must not exist yet. Returns its step.

    Adapters are merged into the model's weights or, with `adapter_only`, written alone in PEFT's format.
    """
    output = files.locate_local(output, "--output")
    if hosts.is_first():
        _check_free(output)
    run_dir = RunDir(files.locate(workdir))
    step = run_dir.choose_step(checkpoint, run_dir.open()[0].eval.best)
    # The weights beneath adapters are read as they are written; quantized ones as what they stand for.
    run = open_run(run_dir, dtype="float32")
    if adapter_only and run.model.adapter is None:
        raise UserError(f"the run in {run_dir.path} trained all weights; export it without --adapter-only")
    params = run.load_params(step)
    if adapter_only:
        save_adapter(output, run.model, params, run.tokenizer, run.config.model.path, dtype or "float32")
    else:
        save(output, run.model, params, run.tokenizer, extras=run_dir.path / "model", dtype=dtype)
    return step


def save(
    output: str | Path,
    model: Model,
    params: Params,
    tokenizer: Tokenizer,
    extras: Path | epath.Path | None = None,
    dtype: str = "",
) -> None:
    """Writes config.json, weights, tokenizer and generation settings: whole or not at all. Adapters are merged."""
    model, params = model.merge(params)

    def write(folder: Path) -> None:
        hf.save(folder, model, params, dtype)
        tokenizer.save(folder)
        hf.save_generation_settings(extras, folder, model, chat.ends(tokenizer))
        _compare(folder, SINGLE, lambda dtype: hf.tensors_of(model, params, dtype))

    _write_whole(files.locate_local(output, "output"), write)


def save_adapter(
    output: str | Path, model: Model, params: Params, tokenizer: Tokenizer, base: str, dtype: str = "float32"
) -> None:
    """Writes a model's adapters in PEFT's format, with the tokenizer: whole or not at all.

    `base` is the base model's folder or hub name.
    """

    def write(folder: Path) -> None:
        peft.save(folder, model, params, base, dtype)
        tokenizer.save(folder)
        _compare(folder, peft.WEIGHTS, lambda dtype: peft.tensors_of(model, params, dtype))

    _write_whole(files.locate_local(output, "output"), write)


def _write_whole(output: Path, write: Callable[[Path], None]) -> None:
    """Has a folder written beside `output`, and renames it.

    The first of several hosts does: the others take part in gathering what it writes.
    """
    if not hosts.is_first():
        with tempfile.TemporaryDirectory() as name:
            write(Path(name))
        return
    _check_free(output)
    output = Path(os.path.realpath(output))  # a link is not replaced
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        with files.new_folder(output.parent, f".{output.name}-") as part:
            write(part)
            _share(part)
            part.replace(output)
    except Exception as error:
        if not (reason := disk_error(error)):
            raise
        raise UserError(f"cannot write {output}: {reason}; {files.remedy(reason)} and export again") from error


def _check_free(output: Path) -> None:
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise UserError(f"{output} exists already; name another folder, or remove it")
    if reason := files.unwritable(output.parent):
        raise UserError(f"cannot write to {output.parent}: {reason}; name another folder")


def _share(folder: Path) -> None:
    """Gives all of it the permissions of an ordinary new file: tempfile and safetensors keep theirs private."""
    mode = stat.S_IMODE(min(folder.glob("*config.json")).stat().st_mode)
    for file in folder.glob("*.*"):
        file.chmod(mode)
    folder.chmod(mode | (mode & 0o444) >> 2)  # who may read may enter


def _compare(folder: Path, single: str, tensors_of: Callable[[Any], Iterable[tuple[str, np.ndarray]]]) -> None:
    """Reads the tensors back and holds them against what was to be written, in the dtype that they have there."""
    if not hosts.is_first():
        deque(tensors_of(np.float32), maxlen=0)
        return
    with TensorReader(folder, single) as written:
        dtype = written.read(min(written.names()), ()).dtype
        for name, tensor in tensors_of(dtype):
            if not np.isfinite(tensor).all():
                raise UserError(f"{name} holds NaN or infinity, so nothing was exported; name an earlier --checkpoint")
            if written.read(name, tuple(slice(0, n) for n in tensor.shape)).tobytes() != tensor.tobytes():
                raise UserError(f"{folder}: {name} does not read back as it was written; export again")
