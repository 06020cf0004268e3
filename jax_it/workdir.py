"""A run's folder: which files it has, and how a run is opened, compared and read back.

config.json             the resolved config, what was derived from it, and the versions that ran
model/config.json       the model's configuration;  tokenizer/  its tokenizer
checkpoints/STEP/       see `checkpoint`
metrics.jsonl           a line for each logged step;  tensorboard/  the same
eval/STEP/              metrics.json and predictions.jsonl;  NAME/ in it: those of another evaluation than the run's own
ended.json              where and why training has come to its end
"""

import dataclasses
import importlib.metadata
import json
import math
import platform
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from jax_it import config as settings
from jax_it import files, following, hosts, metrics, sharding
from jax_it.checkpoint import Checkpoints, abstract, disk_error
from jax_it.config import Config
from jax_it.data import tokenizer as tokenizers
from jax_it.data.formats import CausalFormat, Format, Seq2SeqFormat
from jax_it.data.packing import Layout, Shape
from jax_it.errors import UserError
from jax_it.files import Appending, write_atomically
from jax_it.models import Model, Params, build, hf, peft, with_tied_head
from jax_it.models.lora import Adapter, Target
from jax_it.models.tensors import find_folder, fingerprint
from jax_it.models.weights import flatten

SCORES = "metrics.json"  # of a step's evaluation, whose presence says that it is scored

# What a resumed run may change: where and how it is computed, watched and kept, but not what it computes.
FREE = (
    "mesh", "eval", "data.cache_dir", "model.remat", "train.micro_batches", "train.loss_chunk", "train.log_every",
    "train.checkpoint_every", "train.keep", "train.keep_best", "train.keep_unscored", "train.max_skipped",
    "train.max_spike", "train.hang_after", "train.wandb", "train.profile", "train.profile_steps",
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


@dataclass(frozen=True)
class Workdir:
    path: Any  # as `files.locate` returns it

    @property
    def tensorboard(self) -> Any:
        return self.path / "tensorboard"

    @property
    def metrics(self) -> Any:
        return self.path / "metrics.jsonl"

    @property
    def skipped(self) -> Any:
        return self.path / "skipped.jsonl"

    def appending(self, name: str) -> Appending:
        """A file of the folder to add to, as "metrics.jsonl". Raises OSError, as its methods do."""
        return Appending(self.path / name)

    @property
    def followers(self) -> Any:
        """See `following`."""
        return self.path / "eval" / "followers"

    def eval(self, step: int) -> Any:
        return self.path / "eval" / str(step)

    def is_scored(self, step: int) -> bool:
        return (self.eval(step) / SCORES).is_file()

    def holds_a_run(self) -> bool:
        return (self.path / "config.json").is_file()

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Holds the folder for one training process. Raises UserError where another one trains in it.

        The lock is the operating system's: it ends with the process, however that ends. A folder that
        has become no run is left as it was found. An object store has no locks.
        """
        if not hosts.is_first() or files.is_remote(self.path):  # the first host's lock is that of the run
            yield
            return
        file = self.path / ".lock"
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            stream = file.open("a+", encoding="utf-8")
        except OSError as error:
            raise UserError(f"cannot write to {self.path}: {error.strerror}; name another --workdir") from error
        with stream:
            files.lock(stream, f"trains in {self.path}; wait for it or stop it, or name another --workdir")
            try:
                yield
            finally:
                if not self.holds_a_run():
                    file.unlink(missing_ok=True)
                    with suppress(OSError):  # it holds something else
                        self.path.rmdir()

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
            with files.written_locally(self.path / "model") as folder:
                write_atomically(folder / "config.json", dict(model.values))
                hf.save_generation_settings(came_from, folder, model)
            with files.written_locally(self.path / "tokenizer") as folder:
                tokenizer.save(folder)
            versions = {name: importlib.metadata.version(name) for name in ("jax", "flax", "optax", "orbax-checkpoint")}
            saved = {
                "config": settings.to_dict(config),
                "derived": dataclasses.asdict(derived),
                "versions": {"python": platform.python_version(), **versions},
            }
            write_atomically(self.path / "config.json", saved)
        except Exception as error:
            if not (reason := disk_error(error)):
                raise
            for part in ("model", "tokenizer"):
                files.remove(self.path / part)
            raise UserError(f"cannot write to {self.path}: {reason}; free space or name another --workdir") from error

    def open(self) -> tuple[Config, Derived]:
        """The config of the run in this folder. Raises UserError where there is none."""
        file = self.path / "config.json"
        try:
            saved = json.loads(file.read_text(encoding="utf-8"))
            derived = saved["derived"]
            layout = derived.pop("layout")
            layout = Layout(Shape(*layout.pop("shape")), **layout)
            adapter = derived.pop("adapter", None)
            if adapter:
                adapter["targets"] = tuple(Target(*target) for target in adapter["targets"])
                adapter = Adapter(**adapter)
            return settings.resolve(saved["config"]), Derived(layout=layout, adapter=adapter, **derived)
        except (FileNotFoundError, NotADirectoryError):
            raise UserError(f"{self.path} holds no run (no config.json); start one with jax-it train") from None
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            reason = f"{type(error).__name__}: {error}"
            raise UserError(
                f"{file} is not that of a run, or damaged ({reason}); restore it, or name another --workdir"
            ) from None
        except UserError as error:
            raise UserError(f"{file}: {error}") from None

    def check_same(self, config: Config) -> None:
        """Refuses to go on with another config than the one that the run was started with."""
        old, new = (flatten(_as_mapping(settings.to_dict(c))) for c in (self.open()[0], config))
        for name in sorted(old.keys() | new.keys()):
            free = any(name == part or name.startswith(f"{part}.") for part in FREE)
            if not free and old.get(name) != new.get(name):
                raise UserError(
                    f"{self.path} holds a run with config.{name}={old.get(name)!r}, not {new.get(name)!r}; "
                    "go on with its config, or name another --workdir"
                )

    def tokenizer(self) -> tokenizers.Tokenizer:
        with files.read_locally(self.path / "tokenizer") as folder:
            return tokenizers.load(str(folder))

    def model(self, config: Config, derived: Derived) -> Model:
        """The run's model, without weights."""
        file = self.path / "model" / "config.json"
        try:
            values = json.loads(file.read_text(encoding="utf-8"))
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
            return following.waiting(self.followers, steps, train.keep_unscored)

        scores = self.scores(config.eval.best)
        return Checkpoints(self.path / "checkpoints", train.keep, train.keep_best, scores, waiting)

    def scored_steps(self) -> list[int]:
        """The steps that have a folder of scores, in order, which may not be whole yet."""
        try:
            return sorted(int(folder.name) for folder in (self.path / "eval").iterdir() if folder.name.isdecimal())
        except (FileNotFoundError, NotADirectoryError):
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
            return score_in(json.loads((self.eval(step) / SCORES).read_text(encoding="utf-8")), metric)
        except (OSError, ValueError):
            return None

    def end(self, step: int, why: str) -> None:
        """Writes down that training has come to its end, on the first host."""
        if not hosts.is_first():
            return
        try:
            write_atomically(self.path / "ended.json", {"step": step, "why": why})
        except OSError as error:
            reason = error.strerror or error
            raise UserError(f"cannot write to {self.path}: {reason}; free space and run the same command") from error

    def go_on(self) -> None:
        """Takes that back where training goes on, on the first host."""
        if hosts.is_first():
            with suppress(OSError):
                (self.path / "ended.json").unlink()

    def ended(self) -> int | None:
        """The step at which training has come to its end; None where it has not."""
        try:
            return int(json.loads((self.path / "ended.json").read_text(encoding="utf-8"))["step"])
        except (OSError, ValueError, KeyError, TypeError):
            return None

    def choose_step(self, which: str, metric: str) -> int:
        """The step of checkpoint "latest", "best" or a number. Raises UserError that lists what there is."""
        steps = self.checkpoints().steps()
        if not steps:
            raise UserError(f"{self.path} has no checkpoint yet")
        if which == "latest":
            return steps[-1]
        if which == "best":
            scores = {step: score for step in steps if (score := self.scores(metric)(step)) is not None}
            if not scores:
                raise UserError(f"no checkpoint of {self.path} has a score ({metric}); run jax-it eval first")
            return max(scores, key=lambda step: scores[step])
        if not which.isdecimal() or int(which) not in steps:
            raise UserError(f"--checkpoint {which}: {self.path} has {', '.join(map(str, steps))}, latest and best")
        return int(which)

    def params(self, model: Model, config: Config, step: int, mesh: jax.sharding.Mesh) -> Params:
        """The weights of a checkpoint, sharded over the mesh, beside those that the run has not trained."""
        return model.join(self.trained(model, config, step, mesh), self.frozen(model, config, mesh))

    def trained(
        self, model: Model, config: Config, step: int, mesh: jax.sharding.Mesh, checkpoints: Checkpoints | None = None
    ) -> Params:
        """What a checkpoint holds of them. Raises `checkpoint.Unreadable`."""
        dtype = jnp.dtype(config.model.param_dtype)
        shapes = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, dtype), model.trained_shapes)
        placed = abstract(shapes, sharding.shardings(model.trained_letters, shapes, mesh))
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
        return hf.load_base(config.model, mesh, config.train.seed)[1]

    def rewind_metrics(self, step: int) -> None:
        """Drops logged steps after `step`, which a resumed run will take again, and what a kill cut off.

        On the first host, and before any has written more.
        """
        if not hosts.is_first():
            return
        for file in (self.metrics, self.skipped):
            if file.is_file():
                kept = [line for line in files.lines(file) if _step_of(line) <= step]
                try:
                    write_atomically(file, "".join(kept))
                except OSError as error:
                    reason = error.strerror or error
                    raise UserError(f"cannot write {file}: {reason}; free space and run the same command") from error
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
        return hf.load(config, mesh_for(build(*hf.read_values(config), config)))

    if (place.path / "model" / "config.json").is_file():  # a run, and not a model
        config, derived = place.open()
        model = place.model(config, derived)
        params = place.params(model, config, place.choose_step("latest", ""), mesh_for(model))
        return checked(model, params, place.tokenizer())
    if (place.path / "checkpoints").is_dir():
        raise UserError(
            f"{place.path / 'model' / 'config.json'} is missing: {path} is a run that has lost it; restore it"
        )
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
        return CausalFormat(tokenizer.pad, model.run.prefix_lm)
    return Seq2SeqFormat(model.config.start_token, model.config.pad_token)


def score_in(found: Any, metric: str) -> float | None:
    """The score by `metric` in what a metrics.json holds, larger is better; None where there is none."""
    try:
        task, _, name = ("all", "", metric) if metric in found.get("all", {}) else metric.rpartition("/")
        value = float(found[task][name])
    except (ValueError, KeyError, TypeError, AttributeError):
        return None
    return -value if metrics.lower_is_better(name) else value


def _step_of(line: str) -> float:
    """The step of a line of metrics.jsonl; infinity where it is not whole."""
    try:
        return json.loads(line)["step"] if line.endswith("\n") else math.inf
    except (ValueError, KeyError, TypeError):
        return math.inf


def _as_mapping(value: Any) -> Any:
    """Lists as mappings from their indices, so that a difference inside one has a name."""
    if isinstance(value, dict):
        return {key: _as_mapping(item) for key, item in value.items()}
    if isinstance(value, list):
        return {str(i): _as_mapping(item) for i, item in enumerate(value)}
    return value
