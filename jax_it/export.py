"""Writes a run's weights as a folder in Transformers or PEFT format, with a model card; reads them back to compare."""

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
from jax_it.evaluation import results
from jax_it.model_card import model_card
from jax_it.models import Model, Params
from jax_it.pretrained import hf, peft
from jax_it.pretrained.safetensors import SINGLE, TensorReader
from jax_it.run import open_run
from jax_it.run_dir import SCORES, RunDir

CARD = "README.md"


def export(
    workdir: str | Path, output: str | Path, checkpoint: str = "latest", dtype: str = "", adapter_only: bool = False
) -> int:
    """Write a checkpoint of a run, with a model card, to a new folder `output`. Return the checkpoint's step.

    Adapters are merged into the model's weights or, with `adapter_only`, written alone in PEFT's format.
    """
    output = files.locate_local(output, "--output")
    if hosts.is_first():
        _check_free(output)
    run_dir = RunDir(files.locate(workdir))
    step = run_dir.choose_step(checkpoint, run_dir.open()[0].eval.best)
    # The base weights of adapters are read in the dtype that they are written in; quantized ones are dequantized.
    run = open_run(run_dir, dtype="float32")
    if adapter_only and run.model.adapter is None:
        raise UserError(f"the run in {run_dir.path} trained all weights; export it without --adapter-only")
    try:
        scores = results.read(run_dir.eval(step))
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise UserError(
            f"{run_dir.eval(step) / SCORES}, whose scores go into the model card, cannot be read: {reason}"
        ) from None
    params = run.load_params(step)
    card = model_card(output.name, run, step, scores, adapter_only)
    if adapter_only:
        save_adapter(output, run.model, params, run.tokenizer, run.config.model.path, dtype or "float32", card)
    else:
        save(output, run.model, params, run.tokenizer, extras=run_dir.path / "model", dtype=dtype, card=card)
    return step


def save(
    output: str | Path,
    model: Model,
    params: Params,
    tokenizer: Tokenizer,
    extras: Path | epath.Path | None = None,
    dtype: str = "",
    card: str = "",
) -> None:
    """Write config.json, weights, tokenizer and generation settings: whole or not at all. Adapters are merged.

    `extras` is a folder whose generation settings and model card are copied; if it has no card, `card` is written.
    """
    model, params = model.merge(params)

    def write(folder: Path) -> None:
        hf.save(folder, model, params, dtype)
        tokenizer.save(folder)
        hf.save_generation_settings(extras, folder, model, chat.ends(tokenizer))
        _write_card(
            folder, (extras / CARD).read_text(encoding="utf-8") if extras and (extras / CARD).exists() else card
        )
        _compare(folder, SINGLE, lambda dtype: hf.tensors_of(model, params, dtype))

    _write_whole(files.locate_local(output, "output"), write)


def save_adapter(
    output: str | Path,
    model: Model,
    params: Params,
    tokenizer: Tokenizer,
    base: str,
    dtype: str = "float32",
    card: str = "",
) -> None:
    """Write a model's adapters in PEFT's format, with the tokenizer and a model card: whole or not at all.

    `base` is the base model's folder or hub name.
    """

    def write(folder: Path) -> None:
        peft.save(folder, model, params, base, dtype)
        tokenizer.save(folder)
        _write_card(folder, card)
        _compare(folder, peft.WEIGHTS, lambda dtype: peft.tensors_of(model, params, dtype))

    _write_whole(files.locate_local(output, "output"), write)


def _write_card(folder: Path, card: str) -> None:
    if card:
        (folder / CARD).write_text(card, encoding="utf-8")


def _write_whole(output: Path, write: Callable[[Path], None]) -> None:
    """Call `write` with a new folder beside `output`, and rename that to `output` once it is whole.

    Only the first of several hosts keeps its folder; the others take part in gathering the weights.
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
        raise UserError(f"{output} already exists; name another folder, or remove it")
    if reason := files.unwritable(output.parent):
        raise UserError(f"cannot write to {output.parent}: {reason}; name another folder")


def _share(folder: Path) -> None:
    """Give all files the permissions of an ordinary new file: tempfile and safetensors make theirs private."""
    mode = stat.S_IMODE(min(folder.glob("*config.json")).stat().st_mode)
    for file in folder.glob("*.*"):
        file.chmod(mode)
    folder.chmod(mode | (mode & 0o444) >> 2)  # whoever may read may enter


def _compare(folder: Path, single: str, tensors_of: Callable[[Any], Iterable[tuple[str, np.ndarray]]]) -> None:
    """Read the tensors back and compare them with those that were written, in the dtype of the file."""
    if not hosts.is_first():
        deque(tensors_of(np.float32), maxlen=0)
        return
    with TensorReader(folder, single) as written:
        dtype = written.read(min(written.names()), ()).dtype
        for name, tensor in tensors_of(dtype):
            if not np.isfinite(tensor).all():
                raise UserError(
                    f"{name} holds NaN or infinity, so nothing was exported; choose an earlier --checkpoint"
                )
            if written.read(name, tuple(slice(0, n) for n in tensor.shape)).tobytes() != tensor.tobytes():
                raise UserError(f"{folder}: {name} does not read back as it was written; export again")
