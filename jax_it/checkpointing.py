"""A run's checkpoints, by Orbax: complete or absent, written in the background, restored on any mesh."""

import copy
import importlib.metadata
import json
import os
import re
import sys
import time
import zlib
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import cache
from types import TracebackType
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp
from etils import epath
from orbax.checkpoint.checkpoint_managers import preservation_policy

from jax_it import files, hosts
from jax_it.errors import Interrupted, UserError, first_line

LOOKS = 20  # at a folder whose files come and go
T = TypeVar("T")
Scores = Callable[[int], float | None]  # a step's score, larger is better; None while there is none


class Unreadable(UserError):
    """A checkpoint that is damaged, or was deleted while it was read.

    `reason` names the checkpoint and what is wrong with it; the message adds how to fix that with --checkpoint.
    """

    def __init__(self, reason: str):
        super().__init__(f"{reason}; choose another with --checkpoint")
        self.reason = reason


class Checkpoints:
    """The checkpoints of one run, each a folder named by its step.

    `params` can be restored alone; `training` is the rest of the state; `position` is the position in the data.
    The `max_to_keep` newest are kept, the `keep_best` with the best scores, and those that `waiting` chooses from all
    steps. Leaving its `with` block waits until everything started is on disk.
    """

    def __init__(
        self,
        folder: epath.Path,
        max_to_keep: int = 0,
        keep_best: int = 0,
        scores: Scores = lambda step: None,
        waiting: Callable[[Sequence[int]], Sequence[int]] = lambda steps: (),
    ):
        self.folder = files.absolute(folder)
        writing = max_to_keep > 0
        if files.is_there(self.folder) and not self.folder.is_dir():
            raise UserError(f"{self.folder} is not a folder; remove it, or restore it from a backup")
        self._check_metadata()
        if writing and hosts.is_first():
            self.folder.mkdir(parents=True, exist_ok=True)
            self._clean()  # left by a killed process
        if writing:
            hosts.barrier("checkpoints")
        policy = (
            _NewestAndBest(max_to_keep, keep_best, scores, waiting) if writing else preservation_policy.PreserveAll()
        )
        options = ocp.CheckpointManagerOptions(
            preservation_policy=policy,
            atomicity_options=_teach_orbax_s3() if os.fspath(self.folder).startswith("s3://") else None,
            read_only=not writing,
            create=writing,
            save_interval_steps=1 if writing else 0,
            enable_async_checkpointing=True,
        )
        try:
            self._manager = _look(lambda: ocp.CheckpointManager(self.folder, options=options))
        except (AttributeError, KeyError, TypeError, ValueError) as error:  # from a damaged _CHECKPOINT_METADATA
            raise UserError(
                f"the metadata of a checkpoint in {self.folder} is damaged ({_reason(error)}); remove that "
                "checkpoint, or restore it from a backup"
            ) from error

    def _check_metadata(self) -> None:
        """Refuse pipes and the like: Orbax's manager reads these files and would hang."""
        try:
            _look(lambda: files.check_all_regular(self.folder, "*/*"))
        except OSError as error:
            raise UserError(
                f"{error.filename} cannot be read: {error.strerror}; remove it, or restore its checkpoint from a backup"
            ) from None

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if error is None:
            self.wait()
        with suppress(Exception):  # `error` says more, or `wait` has raised it
            self._manager.close()

    def steps(self) -> list[int]:
        """Return the steps of finished checkpoints, in order."""
        _look(self._manager.reload)
        return sorted(self._manager.all_steps())

    def save(self, step: int, params: Any, training: Any, position: dict[str, Any]) -> None:
        """Start writing a checkpoint. Raises the error of the previous one if that failed."""
        position = copy.deepcopy(position)  # written in the background while the loop changes it
        checksums = {"params": int(_checksum(params)), "training": int(_checksum(training))}
        checksums |= {"position": _checksum_of_json(position), "step": step}
        items = ocp.args.Composite(
            params=ocp.args.StandardSave(params),
            training=ocp.args.StandardSave(training),
            position=ocp.args.JsonSave(position),
            checksums=ocp.args.JsonSave(checksums),
        )
        self._guard(lambda: self._manager.save(step, args=items))

    def wait(self) -> None:
        """Wait until everything started is on disk."""
        self._guard(self._manager.wait_until_finished)

    def restore_params(self, step: int, abstract: Any) -> Any:
        """Return the params of a step, sharded as the ShapeDtypeStructs of `abstract` say. Raises Unreadable."""
        try:
            return self._restore(step, params=abstract)["params"]
        except (UserError, Interrupted):
            raise
        except Exception as error:
            raise Unreadable(f"checkpoint {self.folder / str(step)} cannot be read: {_reason(error)}") from error

    def restore_newest(self, params: Any, training: Any) -> tuple[int, Any, Any, dict[str, Any]] | None:
        """Return (step, params, training, position) of the newest checkpoint that can be read; None if there is none.

        Damaged ones are reported on standard error and moved aside, so that the run can write those steps
        again. Raises UserError if all are damaged.
        """
        damaged: dict[int, str] = {}
        for step in reversed(self.steps()):
            try:
                found = self._restore(step, params=params, training=training)
            except (UserError, Interrupted):
                raise
            except Exception as error:
                damaged[step] = _reason(error)
                continue
            for other, reason in damaged.items():
                print(
                    f"checkpoint {self.folder / str(other)} cannot be read: {reason}; it is now "
                    f"{self._set_aside(other)}, and the run continues from step {step}",
                    file=sys.stderr,
                )
            return step, found["params"], found["training"], found["position"]
        if damaged:
            raise UserError(
                f"none of the checkpoints in {self.folder} can be read: "
                + "; ".join(f"{step}: {reason}" for step, reason in damaged.items())
                + "; restore one from a backup, or start over in another --workdir"
            )
        return None

    def _restore(self, step: int, **abstract: Any) -> dict[str, Any]:
        """Return the items of a checkpoint. Raises ValueError if they are not those that were saved at that step.

        Raises on all hosts or on none: Orbax's manager would wait for ever for a host that cannot read its part.
        """
        found: dict[str, Any] = {}
        failure: Exception | None = None
        try:
            files.check_all_regular(self.folder / str(step))
            for name, arrays in abstract.items():
                reader = ocp.StandardCheckpointHandler()
                found[name] = reader.restore(self.folder / str(step) / name, args=ocp.args.StandardRestore(arrays))
            for name in ("position", "checksums"):
                found[name] = ocp.JsonCheckpointHandler().restore(self.folder / str(step) / name)
        except Exception as error:  # Orbax and TensorStore raise many types for a damaged file
            failure = error
        if not hosts.all_agree(failure is None):
            raise failure or ValueError("another host cannot read its part")
        position, checksums = found["position"], found["checksums"]
        if not isinstance(checksums, dict):
            raise ValueError("its checksums are not an object")
        # Checkpoints of older versions lack these two.
        if checksums.get("position", expected := _checksum_of_json(position)) != expected:
            raise ValueError("its position differs from what was saved")
        if checksums.get("step", step) != step:
            raise ValueError(f"it belongs to step {checksums.get('step')}")
        for name in abstract:
            if int(_checksum(found[name])) != checksums.get(name):
                raise ValueError(f"its {name} differ from what was saved")
        return found

    def _set_aside(self, step: int) -> epath.Path:
        aside = self.folder.parent / f"damaged-checkpoint-{step}"
        with hosts.first_then_others():
            if hosts.is_first():
                files.remove(aside)
                (self.folder / str(step)).rename(aside)
        self._manager.reload()
        return aside

    def _clean(self) -> None:
        """Remove unfinished checkpoints."""
        for part in self.folder.glob("*.orbax-checkpoint-tmp*"):
            files.remove(part)

    def _guard(self, write: Callable[[], Any]) -> None:
        """Run a writing call; a failure leaves nothing half-written and says how to continue."""
        try:
            write()
            self._manager.check_for_errors()
        except Exception as error:
            self._clean()
            if not (reason := disk_error(error)):
                raise
            whole = sorted(int(f.name) for f in self.folder.iterdir() if f.name.isdigit())
            how = f"continue from step {whole[-1]}" if whole else "start over"
            raise UserError(
                f"could not save a checkpoint to {self.folder}: {reason}; fix that and run the same command to {how}"
            ) from error


def _look(listing: Callable[[], T]) -> T:
    """List a folder, and list it again where a file vanishes meanwhile: training deletes checkpoints."""
    for _ in range(LOOKS):
        with suppress(FileNotFoundError, NotADirectoryError):
            return listing()
        time.sleep(0.05)
    return listing()


@cache
def _teach_orbax_s3() -> ocp.options.AtomicityOptions:
    """Make Orbax write arrays to s3:// through TensorStore, as to gs://; it would take s3:// for a local path.

    Returns the options with which a checkpoint is marked complete by a file, not by renaming it.
    """
    try:
        from orbax.checkpoint._src.path import gcs_utils
        from orbax.checkpoint._src.serialization import tensorstore_utils

        of_gs, normalize = gcs_utils.get_kvstore_for_gcs, tensorstore_utils._normalize_path
        _ = tensorstore_utils._use_gcs_driver
    except (ImportError, AttributeError):
        version = importlib.metadata.version("orbax-checkpoint")
        raise UserError(
            f"this version of Orbax ({version}) does not write to s3:// as 0.12.8 does; "
            "install orbax-checkpoint==0.12.8, or name a local --workdir or one in gs://"
        ) from None

    def kvstore(path: str) -> dict[str, Any]:
        if not path.startswith("s3://"):
            return of_gs(path)
        bucket, _, rest = path.removeprefix("s3://").partition("/")
        spec = {"driver": "s3", "bucket": bucket, "path": rest}
        if endpoint := os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL"):
            spec |= {"endpoint": endpoint, "aws_region": os.environ.get("AWS_REGION", "us-east-1")}
        return spec

    gcs_utils.get_kvstore_for_gcs = kvstore
    tensorstore_utils._use_gcs_driver = lambda path: path.startswith(("gs://", "s3://"))
    tensorstore_utils._normalize_path = lambda path: normalize(path).replace("s3:/", "s3://")
    return ocp.options.AtomicityOptions(mode=ocp.options.AtomicityMode.COMMIT_FILE)


class _NewestAndBest(preservation_policy.PreservationPolicy):
    def __init__(
        self, max_to_keep: int, keep_best: int, scores: Scores, waiting: Callable[[Sequence[int]], Sequence[int]]
    ):
        self._max_to_keep, self._keep_best, self._scores, self._waiting = max_to_keep, keep_best, scores, waiting

    def should_preserve(
        self, checkpoints: Sequence[Any], *, context: preservation_policy.PreservationContext
    ) -> Sequence[bool]:
        steps = [checkpoint.step for checkpoint in checkpoints]
        scores = {step: score for step in steps if (score := self._scores(step)) is not None}
        best = sorted(scores, key=lambda step: scores[step], reverse=True)[: self._keep_best]
        kept = {*steps[-self._max_to_keep :], *best, *self._waiting(steps)}
        return [step in kept for step in steps]


@jax.jit
def _checksum(tree: Any) -> jax.Array:
    """Return a number that depends on every bit of every array and its position, the same on any mesh.

    Orbax and TensorStore detect a lost or truncated file, but not a changed byte.
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


def _checksum_of_json(value: Any) -> int:
    return zlib.crc32(json.dumps(value, sort_keys=True).encode())


def abstract(tree: Any, shardings: Any) -> Any:
    """Return the shapes, dtypes and shardings of a tree, to restore into."""
    return jax.tree.map(
        lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding), tree, shardings
    )


def _reason(error: BaseException) -> str:
    """Return the operating system's message for an error, or the error's first line."""
    text = str(error)
    if "tree structures do not match" in text:
        names = re.findall(r"^([^\s:]+):$", text, re.MULTILINE)
        return f"it has other arrays than this run: {', '.join(names[:3])}{' and more' * (len(names) > 3)} differ"
    if shapes := re.match(r"Requested shape: (\(.*?\)) is not compatible with the stored shape: (\(.*?\))", text):
        return f"it has an array of shape {shapes[2]} where this run has {shapes[1]}"
    if (word := disk_error(error)) and not isinstance(error, FileNotFoundError):
        return word
    line = first_line(error).partition(" See full TensorStore details")[0]
    return line if len(line) <= 200 else line[:197] + "..."


def disk_error(error: BaseException) -> str:
    """Return what the operating system said about a file, "" for any other error.

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
