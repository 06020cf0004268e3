"""A run directory: which files it has, who holds it, and how each of them is read back and checked.

config.json             the run's config, what was resolved, the versions that ran, and hashes of the next two
model/config.json       the model's configuration;  tokenizer/  its tokenizer
checkpoints/STEP/       see `checkpointing`
metrics.jsonl           a line for each logged step;  tensorboard/  the same
eval/STEP/              metrics.json and predictions.jsonl;  NAME/ in it: those of another evaluation than the run's own
ended.json              where and why training ended
"""

import dataclasses
import hashlib
import importlib.metadata
import json
import math
import platform
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from etils import epath

from jax_it import config as settings
from jax_it import files, follower_heartbeat, hosts, metrics, resolved_run
from jax_it.checkpointing import Checkpoints, disk_error
from jax_it.config import Config
from jax_it.data import tokenizer_files as tokenizers
from jax_it.errors import Interrupted, UserError, first_line, shorten, shown
from jax_it.files import Appending, is_there, remedy, to_json, write_atomically
from jax_it.models import Model, build, with_tied_head
from jax_it.models.families import FAMILIES
from jax_it.pretrained import hf
from jax_it.pretrained.folder import find_folder
from jax_it.resolved_run import Changes, ResolvedRun

CREATING = ".creating"  # while the directory is being made, so that leftovers of a killed start are recognizable
# Changes when settings, or weights in checkpoints, are renamed.
FORMAT = 3
# The parts of a run, and whether they are folders.
PARTS = {
    "model": True, "tokenizer": True, "checkpoints": True, "eval": True, "tensorboard": True, "profile": True,
    "metrics.jsonl": False, "skipped.jsonl": False, "goodput.json": False, "ended.json": False, "wandb.json": False,
}  # fmt: skip
BEGUN = ("model", "tokenizer")  # the parts that are written before config.json
SCORES = "metrics.json"  # the scores of a step; a step that has this file is scored


@dataclass(frozen=True)
class RunDir:
    path: epath.Path

    @property
    def tensorboard(self) -> epath.Path:
        return self.path / "tensorboard"

    @property
    def metrics(self) -> epath.Path:
        return self.path / "metrics.jsonl"

    @property
    def skipped(self) -> epath.Path:
        return self.path / "skipped.jsonl"

    def appending(self, name: str) -> Appending:
        """Open a file of the directory to append to, such as "metrics.jsonl". Raises OSError, as its methods do."""
        return Appending(self.path / name)

    @property
    def followers(self) -> epath.Path:
        """The directory of `follower_heartbeat`."""
        return self.path / "eval" / "followers"

    def eval(self, step: int) -> epath.Path:
        return self.path / "eval" / str(step)

    def is_scored(self, step: int) -> bool:
        return files.is_regular(self.eval(step) / SCORES)

    def holds_a_run(self) -> bool:
        return is_there(self.path / "config.json")

    def is_recognized(self) -> bool:
        """Return whether this is the directory of a run, parts of which may be lost, and not of a model."""
        try:
            saved = files.read_json(self.path / "config.json")
            if isinstance(saved, dict) and "model_type" in saved:
                return False
            if "resolved" in saved:
                return True
        except (OSError, ValueError, TypeError):
            pass
        return is_there(self.path / "model" / "config.json") or is_there(self.path / "checkpoints")

    def check_new(self) -> None:
        """Refuse to start a run in a directory that has parts of another one. All hosts must call it."""
        if parts := self._parts():
            raise UserError(f"{_lacks_config(self.path, parts)}, or name another --workdir")

    def _parts(self) -> list[str]:
        """Return the parts of a run that are here, except what a start that was killed left half-made."""
        begun = BEGUN if is_there(self.path / CREATING) else ()
        try:
            names = {item.name for item in self.path.iterdir()}
        except OSError:
            names = set()
        return [name for name in PARTS if name in names and name not in begun]

    def check_parts(self) -> None:
        """Refuse a run with a file where a folder should be, or vice versa."""
        for name, folder in PARTS.items():
            part = self.path / name
            if is_there(part) and not (part.is_dir() if folder else files.is_regular(part)):
                expected = "folder" if folder else "regular file"
                raise UserError(f"{part} is not a {expected}; remove it, or restore it from a backup")

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Hold the directory for one training process. Raises UserError if another one trains in it.

        A directory in which no run was created is left as it was. A run that fails before its first step is removed.
        """
        if not hosts.is_first():  # the first host's lock is that of the run
            yield
            return
        refusal = f"trains in {self.path}; wait for it or stop it, or name another --workdir"
        try:
            with files.locked(self.path / ".lock", refusal, "name another --workdir"):
                new = not self.holds_a_run()
                try:
                    yield
                except Exception as error:
                    if new and not isinstance(error, Interrupted):
                        self._discard()
                    raise
        finally:
            if (path := files.local(self.path)) and not self.holds_a_run():
                with suppress(OSError):  # it holds something else, or another process's lock
                    path.rmdir()

    def _discard(self) -> None:
        """Remove a new run that has no checkpoint, no score and no step in its log."""
        if not self.holds_a_run() or self.checkpoints().steps() or self.scored_steps():
            return
        for file in (self.metrics, self.skipped):
            if is_there(file) and file.read_bytes():
                return
        for name in ("config.json", *PARTS):  # config.json first: without it no other process takes this for a run
            files.remove(self.path / name)

    def create(self, config: Config, resolved: ResolvedRun, model: Model, tokenizer: tokenizers.Tokenizer) -> None:
        """Write the files of a new run; config.json comes last and makes it one. All hosts must call it."""
        came_from = find_folder(config.model.path) if config.model.path else None
        hosts.barrier("no run yet")  # every host has checked
        with hosts.first_then_others():
            if hosts.is_first():
                self._create(config, resolved, model, tokenizer, came_from)
        if not self.holds_a_run():
            raise UserError(
                f"this host does not see {self.path}, which another one has made: "
                "name a --workdir that all hosts share, on a network drive or in an object store"
            )

    def _create(
        self, config: Config, resolved: ResolvedRun, model: Model, tokenizer: tokenizers.Tokenizer,
        came_from: Path | None,
    ) -> None:  # fmt: skip
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            write_atomically(self.path / CREATING, "")
            self._remove_begun()
            with files.written_locally(self.path / "model") as folder:
                write_atomically(folder / "config.json", json.dumps(dict(model.values), indent=2) + "\n")
                hf.save_generation_settings(came_from, folder, model)
            with files.written_locally(self.path / "tokenizer") as folder:
                tokenizer.save(folder)
            versions = {name: importlib.metadata.version(name) for name in ("jax", "flax", "optax", "orbax-checkpoint")}
            saved = {
                "config": settings.to_dict(config),
                "resolved": dataclasses.asdict(resolved),
                "format": FORMAT,
                "versions": {"python": platform.python_version(), **versions},
                "files": {part: files.digests(self.path / part) for part in BEGUN},
            }
            write_atomically(self.path / "config.json", with_checksum(saved))
            (self.path / CREATING).unlink(missing_ok=True)
        except BaseException as error:
            self._remove_begun()
            with suppress(Exception):
                (self.path / CREATING).unlink(missing_ok=True)
            if not isinstance(error, Exception) or not (reason := disk_error(error)):
                raise
            raise UserError(
                f"cannot write to {self.path}: {reason}; {remedy(reason)} or name another --workdir"
            ) from error

    def _remove_begun(self) -> None:
        for part in BEGUN:
            files.remove(self.path / part)

    def open(self) -> tuple[Config, ResolvedRun]:
        """Read the run's config, unchanged, and what was resolved. Raises UserError without a run."""
        saved = self._read()
        file = self.path / "config.json"
        try:
            resolved = resolved_run.from_json(saved["resolved"])
            return settings.reopen(saved["config"]), resolved
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise _damaged(file, f"{type(error).__name__}: {error}") from None
        except UserError as error:
            raise UserError(f"{file}: {error}") from None

    def _read(self) -> dict[str, Any]:
        """Read config.json, which holds an object."""
        file = self.path / "config.json"
        try:
            saved = files.read_json(file)
        except (FileNotFoundError, NotADirectoryError):
            if parts := self._parts():
                raise UserError(_lacks_config(self.path, parts)) from None
            raise UserError(
                f"{self.path} is not a run directory (no config.json); start one with jax-it train"
            ) from None
        except OSError as error:
            raise UserError(f"{file} cannot be read: {error.strerror}; restore it, or name another --workdir") from None
        except ValueError as error:
            raise _damaged(file, f"{type(error).__name__}: {first_line(error)}") from None
        if not isinstance(saved, dict):
            raise _damaged(file, "it is not an object")
        if _is_changed(saved):
            raise UserError(
                f"{file} has been changed since the run was started; restore it, or delete the checksum line "
                "if the change is intentional"
            )
        found = saved.get("format", 1)
        if {"config", "resolved"} <= saved.keys() and found != FORMAT:
            raise UserError(
                f"{file} has format {shown(found)}, and this version of jax_it reads format {FORMAT}: settings and "
                "weights were renamed; continue or export the run with the version that started it"
            )
        return saved

    def check_files(self, part: str) -> None:
        """Refuse files of model/ or tokenizer/ other than those that the run was started with."""
        try:
            expected = dict(self._read().get("files", {}).get(part, {}))
            for name in expected:
                files.check_regular(self.path / part / name)
            found = files.digests(self.path / part)
        except OSError as error:
            raise UserError(f"{error.filename} cannot be read ({error.strerror}); restore it from a backup") from None
        except (TypeError, ValueError, AttributeError) as error:
            raise _damaged(self.path / "config.json", f"{type(error).__name__}: {error}") from None
        for name, digest in expected.items():
            if found.get(name) != digest:
                raise UserError(
                    f"{self.path / part / name} is not the file that the run was started with; restore it from a backup"
                )

    def check_same(self, config: Config, allow: Sequence[str] = ()) -> Changes:
        """Refuse to continue the run with a config that would compute something else, but for settings in `allow`.

        Returns those of them that differ.
        """
        return resolved_run.find_changes(self.open()[0], config, self._kind(), str(self.path), allow)

    def change(self, changes: Changes, step: int, total_steps: int) -> None:
        """Record in config.json, on the first host, which settings change after a step and how long the run is now.

        Raises UserError if the run is past that already.
        """
        if total_steps < step:
            raise UserError(
                f"config.train.duration: the run in {self.path} is at step {step}, past {total_steps}; "
                "choose a longer duration"
            )
        with hosts.first_then_others():
            if not hosts.is_first():
                return
            saved = self._read()
            for name, (_, value) in changes.items():
                *sections, last = name.split(".")
                section = saved["config"]
                for each in sections:
                    section = section[each]
                section[last] = value
            saved["resolved"]["total_steps"] = total_steps
            told = {name: list(values) for name, values in changes.items()}
            saved["changes"] = [*saved.get("changes", []), {"after_step": step, **told}]
            self._write("config.json", with_checksum(saved))

    def _kind(self) -> settings.Kind | None:
        """Return the kind of the run's model; None if that cannot be read."""
        try:
            return FAMILIES[files.read_json(self.path / "model" / "config.json")["model_type"]].kind
        except (OSError, ValueError, KeyError, TypeError):
            return None

    def tokenizer(self) -> tokenizers.Tokenizer:
        self.check_files("tokenizer")
        with files.read_locally(self.path / "tokenizer") as folder:
            return tokenizers.load(str(folder))

    def model(self, config: Config, resolved: ResolvedRun) -> Model:
        """Build the run's model, without weights, to be computed as the config says."""
        self.check_files("model")
        file = self.path / "model" / "config.json"
        try:
            values = files.read_json(file)
        except (OSError, ValueError) as error:
            raise UserError(f"{file} cannot be read ({error}); restore it from a backup") from None
        model = with_tied_head(build(values, str(file), config.model), resolved.tied)
        return dataclasses.replace(model, adapter=resolved.adapter)

    def checkpoints(self) -> Checkpoints:
        """Open the run's checkpoints to read them."""
        return Checkpoints(self.path / "checkpoints")

    def writing_checkpoints(self, config: Config) -> Checkpoints:
        train = config.train

        def waiting(steps: Sequence[int]) -> Sequence[int]:
            return follower_heartbeat.waiting(self.followers, steps, train.keep_unscored)

        scores = self.scores(config.eval.best)
        return Checkpoints(self.path / "checkpoints", train.max_to_keep, train.keep_best, scores, waiting)

    def scored_steps(self) -> list[int]:
        """List, in order, the steps that have a folder of scores, which may not be complete yet."""
        try:
            found = [folder for folder in (self.path / "eval").iterdir() if folder.name.isdecimal()]
            return sorted(int(folder.name) for folder in found if folder.is_dir())
        except OSError:
            return []

    def scores(self, metric: str) -> Callable[[int], float | None]:
        """Return a function from a step to its score, larger is better, None without one or if it is NaN.

        `metric` is one over all of the evaluation's examples, or a task's "TASK/METRIC".
        """

        def score(step: int) -> float | None:
            value = self.measured(step, metric)
            return None if value is None or math.isnan(value) else value

        return score

    def measured(self, step: int, metric: str) -> float | None:
        """Return a step's score, larger is better; NaN if that was measured, None without one."""
        try:
            return score_in(read_scores(self.eval(step)), metric)
        except (OSError, ValueError):
            return None

    def end(self, step: int, why: str) -> None:
        """Record that training has ended, on the first host."""
        if hosts.is_first():
            self._write("ended.json", {"step": step, "why": why})

    def _write(self, name: str, content: Any) -> None:
        try:
            write_atomically(self.path / name, content)
        except OSError as error:
            reason = str(error.strerror or error)
            raise UserError(
                f"cannot write to {self.path}: {reason}; {remedy(reason)} and run the same command"
            ) from error

    def clear_end(self) -> None:
        """Remove that record, on the first host: training continues."""
        if hosts.is_first():
            with suppress(OSError):
                (self.path / "ended.json").unlink()

    def ended(self) -> int | None:
        """Return the step at which training ended; None if it has not. Raises UserError if that cannot be read."""
        file = self.path / "ended.json"
        try:
            step = files.read_json(file)["step"]
            if type(step) is int:
                return step
        except (FileNotFoundError, NotADirectoryError):
            return None
        except (OSError, ValueError, KeyError, TypeError):
            pass
        raise UserError(f"{file} is damaged, so it does not say whether training has ended; restore or remove it")

    def choose_step(self, which: str, metric: str) -> int:
        """Return the step of checkpoint "latest", "best" or a number. Raises UserError that lists what there is."""
        steps = self.checkpoints().steps()
        if not steps:
            raise UserError(f"{self.path} has no checkpoint yet; wait for one, or continue the run with jax-it train")
        if which == "latest":
            return steps[-1]
        if which == "best":
            self._tell_damaged_scores(steps)
            scores = {step: score for step in steps if (score := self.scores(metric)(step)) is not None}
            if not scores:
                raise UserError(f"no checkpoint of {self.path} has a score ({metric}); run jax-it eval first")
            if len(scores) == 1 and len(steps) > 1:
                others = ", ".join(str(step) for step in steps if step not in scores)
                raise UserError(
                    f"only checkpoint {next(iter(scores))} of {self.path} has a score ({metric}), so none is known to "
                    f"be the best: run jax-it eval for {others} too, with --checkpoint STEP, or name a step"
                )
            return max(scores, key=lambda step: scores[step])
        if which not in map(str, steps):
            raise UserError(
                f"--checkpoint {shorten(which)}: no such checkpoint in {self.path}; "
                f"choose {', '.join(map(str, steps))}, latest or best"
            )
        return int(which)

    def _tell_damaged_scores(self, steps: Sequence[int]) -> None:
        for step in steps:
            try:
                read_scores(self.eval(step))
            except (FileNotFoundError, NotADirectoryError):  # not scored yet
                pass
            except (OSError, ValueError) as error:
                print(
                    f"{self.eval(step) / SCORES} cannot be read: {error}; the step counts as not scored",
                    file=sys.stderr,
                )

    def rewind_metrics(self, step: int) -> None:
        """Drop logged steps after `step`, which a resumed run will take again, and lines that were cut off.

        On the first host, and before any has written more. Says so where a line among the others cannot be read, or
        where steps were logged and no checkpoint is left of them.
        """
        if not hosts.is_first():
            return
        for file in (self.metrics, self.skipped):
            if not is_there(file):
                continue
            try:
                files.check_regular(file)
                lines = list(files.lines(file))
                steps = [_step_of(line) for line in lines]
                write_atomically(file, "".join(line for line, at in zip(lines, steps, strict=True) if at <= step))
            except OSError as error:
                reason = str(error.strerror or error)
                raise UserError(f"cannot write {file}: {reason}; {remedy(reason)} and run the same command") from error
            if damaged := steps[:-1].count(math.inf):
                print(f"{damaged} lines of {file} cannot be read; they are removed", file=sys.stderr)
            if step == 0 and file == self.metrics and any(math.isfinite(at) for at in steps):
                print(f"{self.path} has logged steps and no checkpoint; the run starts over", file=sys.stderr)
        if step == 0:
            files.remove(self.tensorboard)


def read_scores(folder: Any) -> dict[str, dict[str, Any]]:
    """Read metrics.json in a folder.

    Raises OSError where it cannot be read, and ValueError where it is damaged.
    """
    found = files.read_json(folder / SCORES)
    # A task can have this name, and its scores are not text; an older version wrote no checksum.
    if isinstance(found, dict) and isinstance(found.get("checksum"), str) and _is_changed(found):
        raise ValueError(
            "it has been changed; evaluate again, or delete the checksum line if the change is intentional"
        )
    if not isinstance(found, dict) or not all(isinstance(values, dict) for values in found.values()):
        raise ValueError("it is not an object of objects")
    return found


def score_in(found: Any, metric: str) -> float | None:
    """Return the score by `metric` in what a metrics.json holds, larger is better; None if there is none."""
    try:
        task, _, name = ("all", "", metric) if metric in found.get("all", {}) else metric.rpartition("/")
        value = found[task][name]
        value = math.nan if value is None else float(value + 0)  # a string is not a score
    except (KeyError, TypeError, AttributeError, OverflowError):
        return None
    return -value if metrics.lower_is_better(name) else value


def _step_of(line: str) -> float:
    """Return the step of a line of metrics.jsonl; infinity if the line is not complete."""
    try:
        step = json.loads(line)["step"] if line.endswith("\n") else None
    except (ValueError, KeyError, TypeError, RecursionError):
        return math.inf
    return step if type(step) is int else math.inf


def _lacks_config(path: epath.Path, parts: Sequence[str]) -> str:
    return f"{path} contains parts of a run ({', '.join(parts)}) but no config.json; restore it from a backup"


def _damaged(file: epath.Path, reason: str) -> UserError:
    return UserError(f"{file} is damaged or does not belong to a run ({reason}); restore it, or name another --workdir")


def with_checksum(values: Mapping[str, Any]) -> dict[str, Any]:
    """Add a hash by which a later change is noticed, unless that key is taken."""
    return {**values, "checksum": _checksum(json.loads(to_json(values)))} | dict(values)


def _is_changed(values: dict[str, Any]) -> bool:
    """Take the checksum out, if there is one, and return whether it no longer fits."""
    checksum = values.pop("checksum", None)
    return checksum is not None and checksum != _checksum(values)


def _checksum(values: Any) -> str:
    return hashlib.blake2b(json.dumps(values, sort_keys=True).encode(), digest_size=8).hexdigest()
