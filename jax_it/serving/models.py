"""The models that a server offers, by the name that requests choose one with."""

import dataclasses
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from jax_it.errors import UserError
from jax_it.models import Params
from jax_it.pretrained import peft
from jax_it.run import Run, load_run

LENGTHS = ("n_positions", "max_position_embeddings", "n_ctx")  # what configurations call their maximum length


@dataclass(frozen=True)
class ServedModel:
    name: str
    run: Run
    params: Params
    path: str
    parent: str | None = None  # the name of the base model, of an adapter over it
    created: int = field(default_factory=lambda: int(time.time()))

    @property
    def is_causal(self) -> bool:
        return self.run.model.kind == "causal"

    @property
    def max_length(self) -> int:
        """The most tokens of prompt and text, by the model's configuration; 0: it sets no limit.

        T5's relative positions have none, whatever its `n_positions` says.
        """
        if not self.is_causal:
            return self.run.model.config.positions
        lengths = [self.run.model.values.get(name) for name in LENGTHS]
        return next((length for length in lengths if isinstance(length, int)), 0)


def load_models(models: Sequence[tuple[str, str]], adapters: Sequence[tuple[str, str]]) -> Mapping[str, ServedModel]:
    """Load (name, path) of models, and of PEFT folders over the first of them, whose weights they share.

    An empty name is the last part of the path, or a hub name as it is. Raises UserError for a name that is given twice.
    """
    served: dict[str, ServedModel] = {}

    def add(model: ServedModel) -> None:
        if model.name in served:
            raise UserError(f"two models are called {model.name!r}; name one of them: --model NAME={model.path}")
        served[model.name] = model

    for name, path in models:
        run, params = load_run(path)
        add(ServedModel(name or name_of(path), run, params, path))
    base = next(iter(served.values()))
    for name, path in adapters:
        if base.run.model.adapter is not None:
            raise UserError(f"--adapter {name}={path}: {base.path} has adapters itself; give its base model as --model")
        if peft.token_ids(path):
            raise UserError(f"--adapter {name}={path}: it has tokens of its own; serve it as --model {name}={path}")
        model, adapter = peft.load(path, base.run.model, base.run.mesh, base.path)
        run = dataclasses.replace(base.run, model=model)
        add(ServedModel(name, run, model.join(adapter, base.params), path, base.name))
    return served


def name_of(path: str) -> str:
    """Return what a model is called that was given no name."""
    return Path(path).expanduser().resolve().name if Path(path).expanduser().exists() else path
