"""Steps that were skipped because of their gradient: which ones, with which examples, and when there are too many."""

import math
from collections.abc import Mapping

from jax_it.config import Train
from jax_it.data.loader import TrainData
from jax_it.errors import UserError
from jax_it.training.log import Log

SHOWN = 10  # records that a line on standard error names; skipped.jsonl names all


class Skips:
    """Report skipped steps. Raises UserError for more than `max_skipped` in a row."""

    def __init__(self, config: Train, log: Log, data: TrainData):
        self._config, self._log, self._data = config, log, data

    def look(self, step: int, measured: Mapping[str, float]) -> None:
        """Look at the metrics of a finished step."""
        in_a_row = int(measured["skipped_in_a_row"])
        if not in_a_row:
            return
        examples = self._data.examples(step - 1, self._config.duration)
        norm = measured["grad_norm"]
        if math.isfinite(norm):
            usual = measured["grad_norm_mean"]
            reason = f"its gradient's norm is {norm:.3g}, {norm / usual:.0f} times the mean"
        else:
            reason = "its gradient is not finite"
        text, loss = _text(examples), measured["loss"]
        values = {"loss": loss, "grad_norm": norm, "grad_norm_mean": measured["grad_norm_mean"]}
        self._log.skipped(step, values | {"reason": f"{reason} (loss {loss:.4g})", "examples": examples})
        self._log.warn(f"step {step} is skipped: {reason} (loss {loss:.4g}); its examples: {text}")
        if in_a_row > self._config.max_skipped:
            raise UserError(
                f"{in_a_row} steps in a row were skipped, up to step {step}: {reason}; check the examples of these "
                f"steps (of this one: {text}; of all: skipped.jsonl), lower config.train.optimizer.learning_rate, or "
                "raise config.train.max_skipped or max_spike"
            )


def _text(examples: list[dict]) -> str:
    """Return "records 3, 17 of 'say'; record 2 of 'names'", with as many records as a line holds."""
    parts, left = [], SHOWN
    for source in examples:
        shown = source["records"][:left]
        left -= len(shown)
        if shown:
            parts.append(f"record{'s' * (len(shown) > 1)} {', '.join(map(str, shown))} of {source['source']!r}")
    more = sum(len(source["records"]) for source in examples) - (SHOWN - left)
    return "; ".join(parts) + (f"; {more} more" if more else "")
