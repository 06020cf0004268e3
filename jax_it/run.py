"""A run, opened in one place: its config, directory, model, tokenizer, mesh, data, and what was resolved.

start_run  from a config, for training and whatever looks at a run before it
resume_run from its directory, with the config that training continues with
open_run   from its directory alone, to score or export it
load       the model of a run, a Transformers or PEFT folder or a hub name
"""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

import jax
import jax.numpy as jnp

from jax_it import compilation_cache, data, files, pretrained, sharding
from jax_it import config as settings
from jax_it.checkpointing import Checkpoints, Unreadable, abstract
from jax_it.config import Config
from jax_it.data import Built, chat
from jax_it.data import tokenizer_files as tokenizers
from jax_it.data.formats import CausalFormat, Format, Seq2SeqFormat
from jax_it.data.packing import Layout, Shape
from jax_it.data.tokenizer import Tokenizer
from jax_it.errors import UserError
from jax_it.models import Model, Params
from jax_it.pretrained import peft
from jax_it.pretrained.folder import find_folder, fingerprint
from jax_it.resolved_run import Changes, ResolvedRun
from jax_it.run_checks import check_mesh, check_model, check_steps, check_vocabulary
from jax_it.run_dir import RunDir

TOKENS = 16384  # in a batch of rows that a loss is computed on, of a model whose training chose no layout

# What bias, mask, softmax and dropout cost for one attention score, in matmul FLOPs of the same time: they are
# bound by memory. Measured on two CPU cores at 512 positions; an H100's ratio of the two is of the same order.
FLOPS_OF_A_SCORE = 2000


@dataclass(frozen=True)
class Run:
    """What every command works on. A model that is not a run's has neither a directory nor anything resolved."""

    config: Config
    model: Model  # without its weights
    tokenizer: Tokenizer
    mesh: jax.sharding.Mesh
    run_dir: RunDir | None = None
    resolved: ResolvedRun | None = None
    data: Built | None = None  # to train on, where it was asked for
    changes: Changes = dataclasses.field(default_factory=dict)  # of settings, from when the run was resumed on

    @cached_property
    def format(self) -> Format:
        """How the model sees examples. Raises UserError for a tokenizer that is not the model's."""
        return make_format(self.model, self.tokenizer)

    @property
    def new_ids(self) -> tuple[int, ...]:
        """The tokens that the run has added to its model's."""
        return self.tokenizer.ids_of(self.config.model.new_tokens)

    @property
    def layout(self) -> Layout:
        """The rows that a loss is computed on: those of training, or as many as make up TOKENS."""
        if self.resolved:
            return self.resolved.layout
        shape = self.format.smallest(self.config.data)
        return Layout(shape, max(TOKENS // max(shape.source, shape.target), 1), 1.0, 1.0, 1.0)

    def load_params(self, step: int) -> Params:
        """Read the weights of a checkpoint, sharded over the mesh, with those that the run does not train."""
        return self.model.join(self.load_trained(step), self.load_frozen())

    def load_trained(self, step: int, checkpoints: Checkpoints | None = None) -> Params:
        """Read what a checkpoint holds of them. Raises `checkpointing.Unreadable`."""
        assert self.run_dir
        dtype = jnp.dtype(self.config.model.param_dtype)
        shapes = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, dtype), self.model.trained_shapes)
        placed = abstract(shapes, sharding.shardings(self.model.trained_logical_axes, shapes, self.mesh))
        return (checkpoints or self.run_dir.checkpoints()).restore_params(step, placed)

    def load_frozen(self) -> Params:
        """Read the weights beneath adapters, which no checkpoint holds. Raises UserError if they have changed."""
        if self.model.adapter is None:
            return {}
        config = self.config
        if config.model.pretrained:
            assert self.resolved and self.run_dir
            if fingerprint(find_folder(config.model.path)) != self.resolved.base_digest:
                raise UserError(
                    f"the weights in {config.model.path} have changed since the run in {self.run_dir.path} was "
                    "started; restore them"
                )
        return pretrained.load_base(config.model, self.mesh, config.train.seed, self.new_ids)[1]


def start_run(
    config: Config, mesh: jax.sharding.Mesh, run_dir: RunDir | None = None, sizes: dict[str, int] | None = None
) -> Run:
    """Open a new run: all that can be known of it before a weight is read, its training data included.

    `sizes` are those of the mesh to train on, if that is another one. Raises UserError for what does not fit together.
    """
    if run_dir:
        run_dir.check_new()
    config, commits = data.pin(config)
    tokenizer = load_tokenizer(config)
    model = pretrained.load_model(config.model, tokenizer.ids_of(config.model.new_tokens))
    if config.model.lora.path:
        adapter = peft.read_adapter(config.model.lora.path, model)[0]
        if max(adapter.token_ids, default=0) >= tokenizer.size:
            raise UserError(
                f"config.model.tokenizer: it lacks tokens that the adapters in {config.model.lora.path} have; name "
                "their folder, if it has a tokenizer"
            )
        model = dataclasses.replace(model, adapter=adapter)
    run = Run(config, model, tokenizer, mesh, run_dir)
    check_model(config, model, tokenizer)
    check_mesh(config, model, sizes or mesh.shape)
    built = build_data(run)
    check_steps(config, built)
    train = built.train
    resolved = ResolvedRun(
        layout=train.layout,
        packed=train.packed,
        total_steps=train.steps(config.train.duration),
        data_digest=built.digest,
        tied=model.config.tied,
        commits=commits,
    )
    return dataclasses.replace(run, resolved=resolved, data=built)


def with_weights(run: Run) -> tuple[Run, Params, Params]:
    """Read or draw a new run's weights, which tell the rest of its model. Returns (run, trained, frozen)."""
    config = run.config
    model, params = pretrained.load(config.model, run.mesh, config.train.seed, run.new_ids)
    base_digest = fingerprint(find_folder(config.model.path)) if model.adapter and config.model.path else ""
    assert run.resolved
    resolved = dataclasses.replace(run.resolved, tied=model.config.tied, adapter=model.adapter, base_digest=base_digest)
    return dataclasses.replace(run, model=model, resolved=resolved), *model.split(params)


def resume_run(config: Config, run_dir: RunDir, mesh: jax.sharding.Mesh, allow_change: Sequence[str] = ()) -> Run:
    """Open a run to continue its training with `config`.

    Raises UserError if the data has changed, or a setting that is not named in `allow_change`.
    """
    run_dir.check_parts()
    changes = run_dir.check_same(config, allow_change)
    resolved = run_dir.open()[1]
    config, _ = data.pin(config, resolved.commits)
    run = Run(config, run_dir.model(config, resolved), run_dir.tokenizer(), mesh, run_dir, resolved)
    check_model(config, run.model, run.tokenizer)
    check_mesh(config, run.model, mesh.shape)
    built = build_data(run)
    if resolved.data_digest != built.digest:
        raise UserError(
            f"the training data has changed since the run in {run_dir.path} was started; "
            "restore it, or start over in another --workdir"
        )
    built.train.layout = resolved.layout
    if changes:
        check_steps(config, built)
        resolved = dataclasses.replace(resolved, total_steps=built.train.steps(config.train.duration))
    return dataclasses.replace(run, resolved=resolved, data=built, changes=changes)


def open_run(run_dir: RunDir, dtype: Literal["", "float32"] = "") -> Run:
    """Open a run as it was started, to score or export it, over all devices.

    `dtype` is that of the computation, "" for the config's.
    """
    config, resolved = run_dir.open()
    if dtype:
        config = dataclasses.replace(config, model=dataclasses.replace(config.model, dtype=dtype))
    compilation_cache.enable(config.data.cache_dir)
    model = run_dir.model(config, resolved)
    mesh = sharding.inference_mesh(model.parameter_count)
    return Run(config, model, run_dir.tokenizer(), mesh, run_dir, resolved)


def load(path: str) -> tuple[Model, Params, Tokenizer]:
    """Load the model of a run's newest checkpoint, a Transformers or PEFT folder or a hub name, over all devices."""
    run, params = load_run(path)
    return run.model, params, run.tokenizer


def load_run(path: str) -> tuple[Run, Params]:
    """Load the same as a Run and its weights."""
    run_dir = RunDir(files.locate(path))
    if run_dir.is_recognized():
        run = open_run(run_dir)
        try:
            params = run.load_params(run_dir.choose_step("latest", ""))
        except Unreadable as error:
            raise UserError(f"{error.reason}; remove it, or export another checkpoint and pass that folder") from error
    else:
        config, tokenizer_path = settings.Model(path=path), path
        if peft.is_folder(path):
            config = settings.Model(path=peft.base_of(path), lora=settings.Lora(path=path))
            if not (run_dir.path / "tokenizer_config.json").is_file():
                tokenizer_path = config.path
        compilation_cache.enable(settings.Data().cache_dir)
        mesh = sharding.inference_mesh(pretrained.load_model(config).parameter_count)
        model, params = pretrained.load(config, mesh)
        tokenizer = tokenizers.load(str(find_folder(tokenizer_path)))
        run = Run(settings.Config(model=config), model, tokenizer, mesh)
    check_vocabulary(run.model, run.tokenizer)
    return run, params


def load_tokenizer(config: Config) -> Tokenizer:
    """Load the tokenizer that the config names, or train one on the training data, and add the new tokens."""
    model = config.model
    if model.tokenizer == "train":
        found = tokenizers.train(data.texts(config.data.train), model.tokenizer_size)
    else:
        found = tokenizers.load(model.tokenizer or str(find_folder(model.path)))
    found = found.with_new_tokens(model.new_tokens, "config.model.new_tokens")
    return chat.with_chat_template(found, model.chat_template)


def make_format(model: Model, tokenizer: Tokenizer) -> Format:
    """Return how this model sees examples. Raises UserError for a tokenizer that is not the model's."""
    check_vocabulary(model, tokenizer)
    return format_of(model, tokenizer.pad)


def format_of(model: Model, pad: int) -> Format:
    """Return how this model sees examples; rows of a causal model are padded with `pad`."""
    if model.kind == "causal":
        return CausalFormat(pad, model.options.prefix_lm)
    return Seq2SeqFormat(*model.start_and_pad)


def build_data(run: Run) -> Built:
    """Build the training data, its row lengths chosen by what a row costs this model."""

    def row_cost(shape: Shape) -> float:
        sizes: Any = (shape.source, shape.target, shape.blocks)
        return run.model.config.flops(*sizes) + FLOPS_OF_A_SCORE * run.model.config.score_count(*sizes)

    return data.build(run.config.data, run.tokenizer, run.format, run.config.train.batch_size, row_cost)
