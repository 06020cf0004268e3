"""A run's checkpoints, by Orbax: whole or absent, written in the background, restored on any mesh."""

import json
import shutil
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp
from orbax.checkpoint.checkpoint_managers import preservation_policy

from jax_it.errors import UserError

Scores = Callable[[int], float | None]  # a step's score, larger is better; None while there is none


class Checkpoints:
    """The checkpoints of one run, each a folder named by its step.

    `params` can be restored alone; `training` is the rest of the state; `position` says where in the
    data the run stands. Kept are the `keep` newest and the `keep_best` with the best scores.
    """

    def __init__(self, folder: Path, keep: int = 0, keep_best: int = 0, scores: Scores = lambda step: None):
        self.folder = folder.absolute()
        writing = keep > 0
        if writing:
            self.folder.mkdir(parents=True, exist_ok=True)
            for part in self.folder.glob("*.orbax-checkpoint-tmp*"):
                shutil.rmtree(part, ignore_errors=True)  # what a killed process had not finished
        policy = _NewestAndBest(keep, keep_best, scores) if writing else preservation_policy.PreserveAll()
        options = ocp.CheckpointManagerOptions(
            preservation_policy=policy,
            read_only=not writing,
            step_format_fixed_length=None,
            enable_async_checkpointing=True,
        )
        self._manager = ocp.CheckpointManager(self.folder, options=options)

    def steps(self) -> list[int]:
        """The steps of finished checkpoints, in order."""
        self._manager.reload()
        return sorted(self._manager.all_steps())

    def save(self, step: int, params: Any, training: Any, position: dict[str, Any]) -> None:
        """Starts writing a checkpoint; an error of the one before is raised now."""
        items = ocp.args.Composite(
            params=ocp.args.StandardSave(params),
            training=ocp.args.StandardSave(training),
            position=ocp.args.JsonSave(position),
        )
        self._guard(lambda: self._manager.save(step, args=items))

    def wait(self) -> None:
        """Returns when all that was started is on disk."""
        self._guard(self._manager.wait_until_finished)

    def close(self) -> None:
        self._manager.close()

    def restore_params(self, step: int, abstract: Any) -> Any:
        """The params of a step, placed as the ShapeDtypeStructs of `abstract` say."""
        items = ocp.args.Composite(params=ocp.args.StandardRestore(abstract))
        try:
            return self._manager.restore(step, args=items).params
        except Exception as error:  # Orbax and TensorStore raise many types for a damaged file
            raise UserError(f"checkpoint {self.folder / str(step)} cannot be read: {_reason(error)}") from error

    def restore_newest(self, params: Any, training: Any) -> tuple[int, Any, Any, dict[str, Any]] | None:
        """(step, params, training, position) of the newest checkpoint that can be read; None if there is none.

        Damaged ones are passed over with a line on standard error, and set aside, so that the run can
        write those steps anew. Raises UserError where all are damaged.
        """
        steps = self.steps()
        items = ocp.args.Composite(
            params=ocp.args.StandardRestore(params),
            training=ocp.args.StandardRestore(training),
            position=ocp.args.JsonRestore(),
        )
        damaged = []
        for step in reversed(steps):
            try:
                found = self._manager.restore(step, args=items)
            except Exception as error:  # as above
                damaged.append(step)
                print(f"checkpoint {self.folder / str(step)} cannot be read: {_reason(error)}", file=sys.stderr)
                continue
            if damaged:
                print(f"using the checkpoint of step {step} instead", file=sys.stderr)
                self._set_aside(damaged)
            return step, found.params, found.training, found.position
        if damaged:
            raise UserError(f"no checkpoint of {self.folder} can be read; restore one, or start over in another folder")
        return None

    def _set_aside(self, steps: Sequence[int]) -> None:
        for step in steps:
            place = self.folder.parent / f"damaged-checkpoint-{step}"
            shutil.rmtree(place, ignore_errors=True)
            (self.folder / str(step)).rename(place)
        self._manager.reload()

    def _guard(self, write: Callable[[], Any]) -> None:
        """Runs a writing call; a failure leaves nothing half-written and says how to go on."""
        try:
            write()
            self._manager.check_for_errors()
        except Exception as error:  # a full disk surfaces as OSError or as one of TensorStore's errors
            for part in self.folder.glob("*.orbax-checkpoint-tmp*"):
                shutil.rmtree(part, ignore_errors=True)
            whole = sorted(int(f.name) for f in self.folder.iterdir() if f.name.isdigit())
            after = f"goes on from step {whole[-1]}" if whole else "starts over"
            raise UserError(
                f"could not save a checkpoint to {self.folder}: {_reason(error)}; "
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


def abstract(tree: Any, shardings: Any) -> Any:
    """Shapes, dtypes and placement of a tree, to restore into."""
    return jax.tree.map(
        lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding), tree, shardings
    )


def _reason(error: BaseException) -> str:
    """The first line of an error, or the operating system's word for it, found down the chain of causes."""
    text = str(error)
    for sign in ("No space left on device", "Disk quota exceeded", "File too large", "Permission denied"):
        if sign in text or sign in str(error.__cause__) or sign in str(error.__context__):
            return sign
    line = next((line for line in text.splitlines() if line.strip()), type(error).__name__)
    return line if len(line) <= 200 else line[:197] + "..."


def write_atomically(file: Path, content: Any) -> None:
    """Writes JSON (or text, as it is) beside the file and renames it over."""
    part = file.with_name(f".{file.name}.part")
    part.write_text(content if isinstance(content, str) else json.dumps(content, indent=2, ensure_ascii=False) + "\n")
    part.replace(file)
