"""A run's checkpoints, by Orbax: whole or absent, written in the background, restored on any mesh."""

import json
import os
import re
import shutil
import sys
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp
from orbax.checkpoint.checkpoint_managers import preservation_policy

from jax_it.errors import UserError

Scores = Callable[[int], float | None]  # a step's score, larger is better; None while there is none


class Checkpoints:
    """The checkpoints of one run, each a folder named by its step.

    `params` can be restored alone; `training` is the rest of the state; `position` says where in the
    data the run stands. Kept are the `keep` newest and the `keep_best` with the best scores. Leaving
    its `with` block waits until what was started is on disk.
    """

    def __init__(self, folder: Path, keep: int = 0, keep_best: int = 0, scores: Scores = lambda step: None):
        self.folder = folder.absolute()
        writing = keep > 0
        if writing:
            self.folder.mkdir(parents=True, exist_ok=True)
            self._clean()  # what a killed process had not finished
        policy = _NewestAndBest(keep, keep_best, scores) if writing else preservation_policy.PreserveAll()
        options = ocp.CheckpointManagerOptions(
            preservation_policy=policy,
            read_only=not writing,
            create=writing,
            save_interval_steps=1 if writing else 0,
            enable_async_checkpointing=True,
        )
        self._manager = ocp.CheckpointManager(self.folder, options=options)

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if error is None:
            self.wait()
        with suppress(Exception):  # the error that is on its way says more, or `wait` has said it
            self._manager.close()

    def steps(self) -> list[int]:
        """The steps of finished checkpoints, in order."""
        self._manager.reload()
        return sorted(self._manager.all_steps())

    def save(self, step: int, params: Any, training: Any, position: dict[str, Any]) -> None:
        """Starts writing a checkpoint; an error of the one before is raised now."""
        checksums = {"params": int(_checksum(params)), "training": int(_checksum(training))}
        items = ocp.args.Composite(
            params=ocp.args.StandardSave(params),
            training=ocp.args.StandardSave(training),
            position=ocp.args.JsonSave(position),
            checksums=ocp.args.JsonSave(checksums),
        )
        self._guard(lambda: self._manager.save(step, args=items))

    def wait(self) -> None:
        """Returns when all that was started is on disk."""
        self._guard(self._manager.wait_until_finished)

    def restore_params(self, step: int, abstract: Any) -> Any:
        """The params of a step, placed as the ShapeDtypeStructs of `abstract` say."""
        try:
            return self._restore(step, params=ocp.args.StandardRestore(abstract)).params
        except Exception as error:  # Orbax and TensorStore raise many types for a damaged file
            raise UserError(
                f"checkpoint {self.folder / str(step)} cannot be read: {_reason(error)}; name another with --checkpoint"
            ) from error

    def restore_newest(self, params: Any, training: Any) -> tuple[int, Any, Any, dict[str, Any]] | None:
        """(step, params, training, position) of the newest checkpoint that can be read; None if there is none.

        Damaged ones are passed over with a line on standard error, and set aside, so that the run can
        write those steps anew. Raises UserError where all are damaged.
        """
        items = {
            "params": ocp.args.StandardRestore(params),
            "training": ocp.args.StandardRestore(training),
            "position": ocp.args.JsonRestore(),
        }
        damaged: dict[int, str] = {}
        for step in reversed(self.steps()):
            try:
                found = self._restore(step, **items)
            except Exception as error:  # as above
                damaged[step] = _reason(error)
                continue
            for other, reason in damaged.items():
                print(
                    f"checkpoint {self.folder / str(other)} cannot be read: {reason}; it is now "
                    f"{self._set_aside(other)}, and the run goes on from step {step}",
                    file=sys.stderr,
                )
            return step, found.params, found.training, found.position
        if damaged:
            raise UserError(
                f"none of the checkpoints in {self.folder} can be read: "
                + "; ".join(f"{step}: {reason}" for step, reason in damaged.items())
                + "; restore one from a copy, or start over in another --workdir"
            )
        return None

    def _restore(self, step: int, **items: Any) -> Any:
        """The items of a checkpoint. Raises ValueError where the arrays are not those that were saved."""
        items["checksums"] = ocp.args.JsonRestore()
        found = self._manager.restore(step, args=ocp.args.Composite(**items))
        for name, checksum in found.checksums.items():
            if name in items and int(_checksum(found[name])) != checksum:
                raise ValueError(f"its {name} differ from what was saved")
        return found

    def _set_aside(self, step: int) -> Path:
        place = self.folder.parent / f"damaged-checkpoint-{step}"
        shutil.rmtree(place, ignore_errors=True)
        (self.folder / str(step)).rename(place)
        self._manager.reload()
        return place

    def _clean(self) -> None:
        """Removes what Orbax has not finished writing."""
        for part in self.folder.glob("*.orbax-checkpoint-tmp*"):
            shutil.rmtree(part, ignore_errors=True)

    def _guard(self, write: Callable[[], Any]) -> None:
        """Runs a writing call; a failure leaves nothing half-written and says how to go on."""
        try:
            write()
            self._manager.check_for_errors()
        except Exception as error:
            self._clean()
            if not (reason := disk_error(error)):
                raise
            whole = sorted(int(f.name) for f in self.folder.iterdir() if f.name.isdigit())
            after = f"goes on from step {whole[-1]}" if whole else "starts over"
            raise UserError(
                f"could not save a checkpoint to {self.folder}: {reason}; "
                f"mend that and run the same command, which {after}"
            ) from error


class _NewestAndBest(preservation_policy.PreservationPolicy):
    def __init__(self, keep: int, keep_best: int, scores: Scores):
        self._keep, self._keep_best, self._scores = keep, keep_best, scores

    def should_preserve(
        self, checkpoints: Sequence[Any], *, context: preservation_policy.PreservationContext
    ) -> Sequence[bool]:
        steps = [checkpoint.step for checkpoint in checkpoints]
        scores = {step: score for step in steps if (score := self._scores(step)) is not None}
        best = sorted(scores, key=lambda step: scores[step], reverse=True)[: self._keep_best]
        kept = set(steps[-self._keep :]) | set(best)
        return [step in kept for step in steps]


@jax.jit
def _checksum(tree: Any) -> jax.Array:
    """A number from every bit of every array and from where it stands, the same on any mesh.

    Orbax and TensorStore notice a file that is lost or cut, but not a byte that is changed.
    """
    total = jnp.uint32(0)
    for number, leaf in enumerate(jax.tree.leaves(tree)):
        unsigned = {1: jnp.uint8, 2: jnp.uint16, 4: jnp.uint32}[leaf.dtype.itemsize]
        bits = jax.lax.bitcast_convert_type(leaf, unsigned).astype(jnp.uint32)
        place = jnp.full(leaf.shape, number, jnp.uint32)
        for axis in range(leaf.ndim):
            place = place * 1_000_003 + jax.lax.broadcasted_iota(jnp.uint32, leaf.shape, axis)
        total += jnp.sum(bits * (2 * place + 1), dtype=jnp.uint32)
    return total


def abstract(tree: Any, shardings: Any) -> Any:
    """Shapes, dtypes and placement of a tree, to restore into."""
    return jax.tree.map(
        lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding), tree, shardings
    )


def _reason(error: BaseException) -> str:
    """The operating system's word for an error, or the error's first line."""
    if (word := disk_error(error)) and not isinstance(error, FileNotFoundError):
        return word
    line = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
    return line if len(line) <= 200 else line[:197] + "..."


def disk_error(error: BaseException) -> str:
    """What the operating system said of a file, "" where the error is another one.

    TensorStore and libraries in Rust put its number into the text of their own errors.
    """
    cause: BaseException | None = error
    while cause:
        if isinstance(cause, OSError) and cause.strerror:
            return cause.strerror
        if number := re.search(r"os error (\d+)|os_error_code='(\d+)'", str(cause)):
            return os.strerror(int(number[1] or number[2]))
        cause = cause.__cause__ or cause.__context__
    return ""


def write_atomically(file: Path, content: Any) -> None:
    """Writes JSON (or text, as it is) beside the file and renames it over."""
    text = content if isinstance(content, str) else json.dumps(content, indent=2, ensure_ascii=False) + "\n"
    part = file.with_name(f".{file.name}.{os.getpid()}.part")  # two processes may write the same file
    try:
        part.write_text(text, encoding="utf-8", errors="backslashreplace")  # half a surrogate pair, as JSON has it
        part.replace(file)
    except OSError:
        part.unlink(missing_ok=True)
        raise
