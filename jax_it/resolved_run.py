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
# What may differ from then on, if it is asked for: how the steps to come are computed, but not on which data or model.
CHANGEABLE = (
    "train.duration", "train.max_grad_norm", "train.label_smoothing", "train.z_loss", "train.router_aux_loss_coef",
    "model.dropout",
    *(f"train.optimizer.{name}" for name in (
        "learning_rate", "schedule", "warmup", "decay", "final_lr_ratio", "weight_decay", "beta1", "beta2", "epsilon"
    )),
)  # fmt: skip

Changes = dict[str, tuple[Any, Any]]  # a setting's value before and after


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
        adapter |= {name: tuple(adapter.get(name, ())) for name in ("token_ids", "token_weights")}
        adapter = Adapter(**adapter)
    return ResolvedRun(layout=layout, adapter=adapter, **saved)


def find_changes(
    saved: Config, config: Config, kind: settings.Kind | None, where: str, allow: Sequence[str] = ()
) -> Changes:
    """Return which of the settings in `allow` differ between the config that a run was started with and another one.

    `kind` is that of its model, None if that is not known. Raises UserError for any other setting that would change
    what the run computes. Settings that nothing reads may differ: an older version took them.
    """
    for name in allow:
        if name not in CHANGEABLE:
            others = ", ".join(each for each in CHANGEABLE if not each.startswith("train.optimizer."))
            raise UserError(
                f"--allow-change {name}: this cannot change during a run. You can change: {others}, and the settings "
                "of train.optimizer other than its name"
            )
    changes: Changes = {}
    old, new = (flatten(_as_mapping(settings.to_dict(settings.without_unread(each, kind)))) for each in (saved, config))
    for name in sorted(old.keys() | new.keys()):
        before, after = old.get(name), new.get(name)
        if before == after or any(name == free or name.startswith(f"{free}.") for free in FREE):
            continue
        if name not in allow:
            how = f"add --allow-change {name}, " if name in CHANGEABLE else ""
            raise UserError(
                f"{where} holds a run with config.{name}={before!r}, not {after!r}; {how}"
                "continue with its config, or name another --workdir"
            )
        changes[name] = before, after
    return changes


def _as_mapping(value: Any) -> Any:
    """Return lists as mappings from their indices, so that a difference inside one has a name."""
    if isinstance(value, dict):
        return {key: _as_mapping(item) for key, item in value.items()}
    if isinstance(value, list):
        return {str(i): _as_mapping(item) for i, item in enumerate(value)}
    return value
