"""A run's folder: which files it has, and how a run is opened, compared and read back.

config.json             the resolved config, what was derived from it, the versions that ran, and hashes of the next two
model/config.json       the model's configuration;  tokenizer/  its tokenizer
checkpoints/STEP/       see `checkpoint`
metrics.jsonl           a line for each logged step;  tensorboard/  the same
eval/STEP/              metrics.json and predictions.jsonl;  NAME/ in it: those of another evaluation than the run's own
ended.json              where and why training has come to its end
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
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from etils import epath

from jax_it import config as settings
from jax_it import files, follower_heartbeat, hosts, metrics, pretrained, sharding
from jax_it.checkpoint import Checkpoints, Unreadable, abstract, disk_error
from jax_it.config import Config
from jax_it.data import tokenizer as tokenizers
from jax_it.data.formats import CausalFormat, Format, Seq2SeqFormat
from jax_it.data.packing import Layout, Shape
from jax_it.errors import Interrupted, UserError, first_line, shorten
from jax_it.files import Appending, is_there, remedy, to_json, write_atomically
from jax_it.models import Model, Params, build, with_tied_head
from jax_it.models.families import FAMILIES
from jax_it.models.lora import Adapter, Target
from jax_it.models.weights import flatten
from jax_it.pretrained import hf, peft
from jax_it.pretrained.folder import find_folder, fingerprint
from jax_it.typed import shown

CREATING = ".creating"  # while the folder is being made: what a start that is killed leaves can then be told from a run
# Of a run's folder: it changes with the names of settings or of weights in checkpoints.
FORMAT = 3
# The parts of a run, and whether they are folders.
PARTS = {
    "model": True, "tokenizer": True, "checkpoints": True, "eval": True, "tensorboard": True, "profile": True,
    "metrics.jsonl": False, "skipped.jsonl": False, "goodput.json": False, "ended.json": False, "wandb.json": False,
}  # fmt: skip
BEGUN = ("model", "tokenizer")  # the parts that are written before config.json
SCORES = "metrics.json"  # of a step's evaluation, whose presence says that it is scored

# What a resumed run may change: where and how it is computed, watched and kept, but not what it computes.
FREE = (
    "mesh", "eval", "data.cache_dir", "model.remat", "train.gradient_accumulation_steps", "train.loss_chunk",
    "train.log_every", "train.checkpoint_every", "train.max_to_keep", "train.keep_best", "train.keep_unscored",
    "train.max_skipped", "train.max_spike", "train.step_timeout", "train.wandb", "train.profile", "train.profile_steps",
)  # fmt: skip


@dataclass(frozen=True)
class Derived:
    """What a run worked out from its config and its data, once, for good."""

    layout: Layout
    packed: bool
    total_steps: int
    data_digest: str
    tied: bool
    adapter: Adapter | None = None  # what is trained, if not all weights
    base_digest: str = ""  # of the frozen weights' files
    commits: Mapping[str, str] = field(default_factory=dict)  # of the hub data sets' revisions; see data.pin


@dataclass(frozen=True)
class Workdir:
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
        """A file of the folder to add to, as "metrics.jsonl". Raises OSError, as its methods do."""
        return Appending(self.path / name)

    @property
    def followers(self) -> epath.Path:
        """See `follower_heartbeat`."""
        return self.path / "eval" / "followers"

    def eval(self, step: int) -> epath.Path:
        return self.path / "eval" / str(step)

    def is_scored(self, step: int) -> bool:
        return files.is_regular(self.eval(step) / SCORES)

    def holds_a_run(self) -> bool:
        return is_there(self.path / "config.json")

    def is_recognized(self) -> bool:
        """Whether this is the folder of a run, of which parts may be lost, and not of a model."""
        try:
            saved = files.read_json(self.path / "config.json")
            if isinstance(saved, dict) and "model_type" in saved:
                return False
            if "derived" in saved:
                return True
        except (OSError, ValueError, TypeError):
            pass
        return is_there(self.path / "model" / "config.json") or is_there(self.path / "checkpoints")

    def check_new(self) -> None:
        """Refuses to start a run in a folder that has parts of another one. All hosts must call it."""
        if parts := self._parts():
            raise UserError(
                f"{self.path} has {_listed(parts)} of a run and no config.json; restore that from a copy, "
                "or name another --workdir"
            )

    def _parts(self) -> list[str]:
        """The parts of a run that are here, but for those that a start which was killed has left half-made."""
        begun = BEGUN if is_there(self.path / CREATING) else ()
        try:
            names = {item.name for item in self.path.iterdir()}
        except OSError:
            names = set()
        return [name for name in PARTS if name in names and name not in begun]

    def check_parts(self) -> None:
        """Refuses a run's folder in which a file stands in the place of a folder, or the other way round."""
        for name, folder in PARTS.items():
            part = self.path / name
            if is_there(part) and not (part.is_dir() if folder else files.is_regular(part)):
                expected = "folder" if folder else "regular file"
                raise UserError(f"{part} is not a {expected}; remove it, or restore it from a copy")

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Holds the folder for one training process. Raises UserError where another one trains in it.

        A folder that has not become a run is left as it was found, and a run that fails before its first step is not
        one.
        """
        if not hosts.is_first():  # the first host's lock is that of the run
            yield
            return
        refusal = f"trains in {self.path}; wait for it or stop it, or name another --workdir"
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
                    (path / ".lock").unlink(missing_ok=True)
                    with suppress(OSError):  # it holds something else
                        path.rmdir()

    def _discard(self) -> None:
        """Removes a new run that has come to nothing: without a checkpoint, a score, or a step in its log."""
        if not self.holds_a_run() or self.checkpoints().steps() or self.scored_steps():
            return
        for file in (self.metrics, self.skipped):
            if is_there(file) and file.read_bytes():
                return
        for name in ("config.json", *PARTS):  # config.json first: without it no other process takes this for a run
            files.remove(self.path / name)

    def create(self, config: Config, derived: Derived, model: Model, tokenizer: tokenizers.Tokenizer) -> None:
        """Makes the folder of a new run; config.json comes last and makes it one. All hosts must call it."""
        came_from = find_folder(config.model.path) if config.model.path else None
        hosts.barrier("no run yet")  # all have seen that
        with hosts.first_then_others():
            if hosts.is_first():
                self._create(config, derived, model, tokenizer, came_from)
        if not self.holds_a_run():
            raise UserError(
                f"this host does not see {self.path}, which another one has made: "
                "name a --workdir that all hosts share, on a network's disk or in an object store"
            )

    def _create(
        self,
        config: Config,
        derived: Derived,
        model: Model,
        tokenizer: tokenizers.Tokenizer,
        came_from: Path | None,
    ) -> None:
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
                "derived": dataclasses.asdict(derived),
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

    def open(self) -> tuple[Config, Derived]:
        """The config of the run in this folder. Raises UserError where there is none."""
        saved = self._read()
        file = self.path / "config.json"
        try:
            derived = saved["derived"]
            layout = derived.pop("layout")
            layout = Layout(Shape(*layout.pop("shape")), **layout)
            adapter = derived.pop("adapter", None)
            if adapter:
                adapter["targets"] = tuple(Target(*target) for target in adapter["targets"])
                adapter = Adapter(**adapter)
            return settings.reopen(saved["config"]), Derived(layout=layout, adapter=adapter, **derived)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise _damaged(file, f"{type(error).__name__}: {error}") from None
        except UserError as error:
            raise UserError(f"{file}: {error}") from None

    def _read(self) -> dict[str, Any]:
        """What config.json holds, which is an object."""
        file = self.path / "config.json"
        try:
            saved = files.read_json(file)
        except (FileNotFoundError, NotADirectoryError):
            if parts := self._parts():
                raise UserError(
                    f"{self.path} has {_listed(parts)} of a run and no config.json; restore that from a copy"
                ) from None
            raise UserError(f"{self.path} holds no run (no config.json); start one with jax-it train") from None
        except OSError as error:
            raise UserError(f"{file} cannot be read: {error.strerror}; restore it, or name another --workdir") from None
        except ValueError as error:
            raise _damaged(file, f"{type(error).__name__}: {first_line(error)}") from None
        if not isinstance(saved, dict):
            raise _damaged(file, "it is not an object")
        if _is_changed(saved):
            raise UserError(
                f"{file} has been changed since the run was started; restore it, or remove its line with the checksum "
                "if the change is meant"
            )
        found = saved.get("format", 1)
        if {"config", "derived"} <= saved.keys() and found != FORMAT:
            raise UserError(
                f"{file} is of a run in format {shown(found)}, and this version of jax_it has format {FORMAT}: "
                "settings and weights have other names; continue or export the run with the version that started it"
            )
        return saved

    def check_files(self, part: str) -> None:
        """Refuses files of model/ or tokenizer/ that are not those which the run was started with."""
        try:
            expected = dict(self._read().get("files", {}).get(part, {}))
            for name in expected:
                files.check_regular(self.path / part / name)
            found = files.digests(self.path / part)
        except OSError as error:
            raise UserError(f"{error.filename} cannot be read ({error.strerror}); restore it from a copy") from None
        except (TypeError, ValueError, AttributeError) as error:
            raise _damaged(self.path / "config.json", f"{type(error).__name__}: {error}") from None
        for name, digest in expected.items():
            if found.get(name) != digest:
                raise UserError(
                    f"{self.path / part / name} is not the file that the run was started with; restore it from a copy"
                )

    def check_same(self, config: Config) -> None:
        """Refuses to go on with another config than the one that the run was started with.

        Settings that nothing reads may differ: an older version took them.
        """
        read = (settings.without_unread(c, self._kind()) for c in (self.open()[0], config))
        old, new = (flatten(_as_mapping(settings.to_dict(c))) for c in read)
        for name in sorted(old.keys() | new.keys()):
            free = any(name == part or name.startswith(f"{part}.") for part in FREE)
            if not free and old.get(name) != new.get(name):
                raise UserError(
                    f"{self.path} holds a run with config.{name}={old.get(name)!r}, not {new.get(name)!r}; "
                    "go on with its config, or name another --workdir"
                )

    def _kind(self) -> settings.Kind | None:
        """The kind of the run's model; None where that cannot be read."""
        try:
            return FAMILIES[files.read_json(self.path / "model" / "config.json")["model_type"]].kind
        except (OSError, ValueError, KeyError, TypeError):
            return None

    def tokenizer(self) -> tokenizers.Tokenizer:
        self.check_files("tokenizer")
        with files.read_locally(self.path / "tokenizer") as folder:
            return tokenizers.load(str(folder))

    def model(self, config: Config, derived: Derived) -> Model:
        """The run's model, without weights."""
        self.check_files("model")
        file = self.path / "model" / "config.json"
        try:
            values = files.read_json(file)
        except (OSError, ValueError) as error:
            raise UserError(f"{file} cannot be read ({error}); restore it") from None
        model = with_tied_head(build(values, str(file), config.model), derived.tied)
        return dataclasses.replace(model, adapter=derived.adapter)

    def checkpoints(self) -> Checkpoints:
        """The run's checkpoints, to read."""
        return Checkpoints(self.path / "checkpoints")

    def writing_checkpoints(self, config: Config) -> Checkpoints:
        train = config.train

        def waiting(steps: Sequence[int]) -> Sequence[int]:
            return follower_heartbeat.waiting(self.followers, steps, train.keep_unscored)

        scores = self.scores(config.eval.best)
        return Checkpoints(self.path / "checkpoints", train.max_to_keep, train.keep_best, scores, waiting)

    def scored_steps(self) -> list[int]:
        """The steps that have a folder of scores, in order, which may not be whole yet."""
        try:
            found = [folder for folder in (self.path / "eval").iterdir() if folder.name.isdecimal()]
            return sorted(int(folder.name) for folder in found if folder.is_dir())
        except OSError:
            return []

    def scores(self, metric: str) -> Callable[[int], float | None]:
        """A step's score, larger is better: `metric` over all its evaluation's examples, or a task's "TASK/METRIC"."""

        def score(step: int) -> float | None:
            value = self.measured(step, metric)
            return None if value is None or math.isnan(value) else value

        return score

    def measured(self, step: int, metric: str) -> float | None:
        """The same, NaN where that was measured."""
        try:
            return score_in(read_scores(self.eval(step)), metric)
        except (OSError, ValueError):
            return None

    def end(self, step: int, why: str) -> None:
        """Writes down that training has come to its end, on the first host."""
        if not hosts.is_first():
            return
        try:
            write_atomically(self.path / "ended.json", {"step": step, "why": why})
        except OSError as error:
            reason = str(error.strerror or error)
            raise UserError(
                f"cannot write to {self.path}: {reason}; {remedy(reason)} and run the same command"
            ) from error

    def go_on(self) -> None:
        """Take that back if training continues, on the first host."""
        if hosts.is_first():
            with suppress(OSError):
                (self.path / "ended.json").unlink()

    def ended(self) -> int | None:
        """The step at which training has come to its end; None where it has not. Raises UserError."""
        file = self.path / "ended.json"
        try:
            step = files.read_json(file)["step"]
            if type(step) is int:
                return step
        except (FileNotFoundError, NotADirectoryError):
            return None
        except (OSError, ValueError, KeyError, TypeError):
            pass
        raise UserError(f"{file} is damaged, so it does not tell whether training has ended; restore it or remove it")

    def choose_step(self, which: str, metric: str) -> int:
        """The step of checkpoint "latest", "best" or a number. Raises UserError that lists what there is."""
        steps = self.checkpoints().steps()
        if not steps:
            raise UserError(f"{self.path} has no checkpoint yet")
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
                f"--checkpoint {shorten(which)}: {self.path} has {', '.join(map(str, steps))}, latest and best"
            )
        return int(which)

    def _tell_damaged_scores(self, steps: Sequence[int]) -> None:
        for step in steps:
            try:
                read_scores(self.eval(step))
            except (FileNotFoundError, NotADirectoryError):  # not scored yet
                pass
            except (OSError, ValueError) as error:
                print(f"{self.eval(step) / SCORES} cannot be read: {error}; it counts as none", file=sys.stderr)

    def params(self, model: Model, config: Config, step: int, mesh: jax.sharding.Mesh) -> Params:
        """The weights of a checkpoint, sharded over the mesh, beside those that the run has not trained."""
        return model.join(self.trained(model, config, step, mesh), self.frozen(model, config, mesh))

    def trained(
        self, model: Model, config: Config, step: int, mesh: jax.sharding.Mesh, checkpoints: Checkpoints | None = None
    ) -> Params:
        """What a checkpoint holds of them. Raises `checkpoint.Unreadable`."""
        dtype = jnp.dtype(config.model.param_dtype)
        shapes = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, dtype), model.trained_shapes)
        placed = abstract(shapes, sharding.shardings(model.trained_logical_axes, shapes, mesh))
        return (checkpoints or self.checkpoints()).restore_params(step, placed)

    def frozen(self, model: Model, config: Config, mesh: jax.sharding.Mesh) -> Params:
        """The weights beneath the run's adapters, which no checkpoint holds. Raises UserError if they have changed."""
        if model.adapter is None:
            return {}
        if config.model.pretrained:
            now, then = fingerprint(find_folder(config.model.path)), self.open()[1].base_digest
            if now != then:
                raise UserError(
                    f"the weights in {config.model.path} are not those that the run in {self.path} was started from; "
                    "restore them"
                )
        return pretrained.load_base(config.model, mesh, config.train.seed)[1]

    def rewind_metrics(self, step: int) -> None:
        """Drops logged steps after `step`, which a resumed run will take again, and what a kill cut off.

        On the first host, and before any has written more. Says so where a line amid the others cannot be read, or
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


def load(path: str) -> tuple[Model, Params, tokenizers.Tokenizer]:
    """The model of a run's newest checkpoint, a Transformers or PEFT folder or a hub name, over all devices."""
    place = Workdir(files.locate(path))

    def mesh_for(model: Model) -> jax.sharding.Mesh:
        return sharding.make_mesh(sharding.whole_or_split(model.parameter_count))

    def checked(model: Model, params: Params, tokenizer: tokenizers.Tokenizer) -> Any:
        check_vocabulary(model, tokenizer)
        return model, params, tokenizer

    def read(config: settings.Model) -> tuple[Model, Params]:
        return pretrained.load(config, mesh_for(pretrained.load_model(config)))

    if place.is_recognized():
        config, derived = place.open()
        model = place.model(config, derived)
        try:
            params = place.params(model, config, place.choose_step("latest", ""), mesh_for(model))
        except Unreadable as error:
            reason = str(error).removesuffix("; name another with --checkpoint")
            raise UserError(f"{reason}; remove it, or give the folder of another that jax-it export writes") from error
        return checked(model, params, place.tokenizer())
    if peft.is_folder(path):
        base = peft.base_of(path)
        model, params = read(settings.Model(path=base, lora=settings.Lora(path=path)))
        with_tokenizer = path if (place.path / "tokenizer_config.json").is_file() else base
        return checked(model, params, tokenizers.load(str(find_folder(with_tokenizer))))
    model, params = read(settings.Model(path=path))
    return checked(model, params, tokenizers.load(str(find_folder(path))))


def check_vocabulary(model: Model, tokenizer: tokenizers.Tokenizer) -> None:
    """Refuses a tokenizer with ids that the model's embedding has no row for."""
    if tokenizer.size > model.config.vocabulary:
        raise UserError(
            f"the tokenizer has {tokenizer.size} ids and the model's embedding {model.config.vocabulary} rows "
            "(vocab_size in its config.json): give the model its own tokenizer with config.model.tokenizer"
        )


def make_format(model: Model, tokenizer: tokenizers.Tokenizer) -> Format:
    """How this model sees examples. Raises UserError where it is not the model's tokenizer."""
    check_vocabulary(model, tokenizer)
    if model.kind == "causal":
        return CausalFormat(tokenizer.pad, model.options.prefix_lm)
    return Seq2SeqFormat(*model.start_and_pad)


def read_scores(folder: Any) -> dict[str, dict[str, Any]]:
    """What metrics.json in a folder holds.

    Raises OSError where it cannot be read, and ValueError where it is damaged.
    """
    found = files.read_json(folder / SCORES)
    # A task can have this name, and its scores are no text; an older version wrote no checksum.
    if isinstance(found, dict) and isinstance(found.get("checksum"), str) and _is_changed(found):
        raise ValueError("it has been changed; evaluate again, or remove its line with the checksum if that is meant")
    if not isinstance(found, dict) or not all(isinstance(values, dict) for values in found.values()):
        raise ValueError("it is not an object of objects")
    return found


def score_in(found: Any, metric: str) -> float | None:
    """The score by `metric` in what a metrics.json holds, larger is better; None where there is none."""
    try:
        task, _, name = ("all", "", metric) if metric in found.get("all", {}) else metric.rpartition("/")
        value = found[task][name]
        value = math.nan if value is None else float(value + 0)  # a string is not a score
    except (KeyError, TypeError, AttributeError, OverflowError):
        return None
    return -value if metrics.lower_is_better(name) else value


def _step_of(line: str) -> float:
    """The step of a line of metrics.jsonl; infinity where it is not whole."""
    try:
        step = json.loads(line)["step"] if line.endswith("\n") else None
    except (ValueError, KeyError, TypeError, RecursionError):
        return math.inf
    return step if type(step) is int else math.inf


def _listed(names: Sequence[str]) -> str:
    return ", ".join(names[:-1]) + " and " * (len(names) > 1) + names[-1]


def _damaged(file: epath.Path, reason: str) -> UserError:
    return UserError(f"{file} is not that of a run, or damaged ({reason}); restore it, or name another --workdir")


def with_checksum(values: Mapping[str, Any]) -> dict[str, Any]:
    """What a file is to hold, with a hash by which a later change is noticed, unless that key is taken."""
    return {**values, "checksum": _checksum(json.loads(to_json(values)))} | dict(values)


def _is_changed(values: dict[str, Any]) -> bool:
    """Whether this is no longer what was written, where it has a checksum, which is taken out."""
    checksum = values.pop("checksum", None)
    return checksum is not None and checksum != _checksum(values)


def _checksum(values: Any) -> str:
    return hashlib.blake2b(json.dumps(values, sort_keys=True).encode(), digest_size=8).hexdigest()


def _as_mapping(value: Any) -> Any:
    """Lists as mappings from their indices, so that a difference inside one has a name."""
    if isinstance(value, dict):
        return {key: _as_mapping(item) for key, item in value.items()}
    if isinstance(value, list):
        return {str(i): _as_mapping(item) for i, item in enumerate(value)}
    return value
