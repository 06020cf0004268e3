"""What a run works out once from its config and data, and which settings may differ when it is resumed."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from jax_it import config as settings
from jax_it.config import Config
from jax_it.data.packing import Layout, Shape
from jax_it.errors import UserError
from jax_it.models.lora import Adapter, Target
from jax_it.models.weights import flatten

# What may always differ: where and how a run is computed, watched and kept, but not what it computes.
FREE = (
    "mesh", "eval", "data.cache_dir", "model.remat", "train.gradient_accumulation_steps", "train.loss_chunk",
    "train.log_every", "train.checkpoint_every", "train.max_to_keep", "train.keep_best", "train.keep_unscored",
    "train.max_skipped", "train.max_spike", "train.step_timeout", "train.wandb", "train.profile", "train.profile_steps",
)  # fmt: skip


@dataclass(frozen=True)
class ResolvedRun:
    """What a run worked out from its config and its data when it was started."""

    layout: Layout
    packed: bool
    total_steps: int
    data_digest: str
    tied: bool
    adapter: Adapter | None = None  # what is trained, if not all weights
    base_digest: str = ""  # of the frozen weights' files
    commits: Mapping[str, str] = field(default_factory=dict)  # of the hub data sets' revisions; see data.pin


def from_json(saved: dict[str, Any]) -> ResolvedRun:
    """Read what `dataclasses.asdict` made of a ResolvedRun. Raises what Python does for other values."""
    layout, adapter = saved.pop("layout"), saved.pop("adapter", None)
    layout = Layout(Shape(*layout.pop("shape")), **layout)
    if adapter:
        adapter["targets"] = tuple(Target(*target) for target in adapter["targets"])
        adapter = Adapter(**adapter)
    return ResolvedRun(layout=layout, adapter=adapter, **saved)


def check_same(saved: Config, config: Config, kind: settings.Kind | None, where: str) -> None:
    """Refuse to continue a run with a config that would compute something else than the one it was started with.

    `kind` is that of its model, None if that is not known. Settings that nothing reads may differ: an older version
    took them.
    """
    old, new = (flatten(_as_mapping(settings.to_dict(settings.without_unread(each, kind)))) for each in (saved, config))
    for name in sorted(old.keys() | new.keys()):
        if old.get(name) != new.get(name) and not _is_within(name, FREE):
            raise UserError(
                f"{where} holds a run with config.{name}={old.get(name)!r}, not {new.get(name)!r}; "
                "continue with its config, or name another --workdir"
            )


def _is_within(name: str, settings: Sequence[str]) -> bool:
    return any(name == each or name.startswith(f"{each}.") for each in settings)


def _as_mapping(value: Any) -> Any:
    """Return lists as mappings from their indices, so that a difference inside one has a name."""
    if isinstance(value, dict):
        return {key: _as_mapping(item) for key, item in value.items()}
    if isinstance(value, list):
        return {str(i): _as_mapping(item) for i, item in enumerate(value)}
    return value
