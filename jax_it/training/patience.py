"""When a run ends before its duration is over: after `eval.patience` evaluations without a better score."""

import math

from jax_it import hosts
from jax_it.config import Eval
from jax_it.run_dir import RunDir


class Patience:
    """Looks at the scores in the run's folder, those of its own evaluations as those of `jax-it eval --follow`."""

    def __init__(self, run_dir: RunDir, config: Eval):
        self._run_dir, self._config = run_dir, config
        self._scores: dict[int, float] = {}  # larger is better

    def over(self, step: int) -> str:
        """Return why training ends at this step, "" if it does not. All hosts must ask, and get the same answer.

        Scores of later steps, which a run that is resumed finds from before it was stopped, do not count yet.
        """
        if not self._config.patience:
            return ""
        why = hosts.from_first(lambda: self._why(step))
        return why if hosts.all_agree(bool(why)) else ""

    def _why(self, step: int) -> str:
        metric, patience = self._config.best, self._config.patience
        for number in self._run_dir.scored_steps():
            if number > step or number in self._scores:
                continue
            if (score := self._run_dir.measured(number, metric)) is not None:
                self._scores[number] = -math.inf if math.isnan(score) else score
        scores = dict(sorted(self._scores.items()))
        if not scores:
            return ""
        best = max(scores, key=lambda number: scores[number])  # the first of several
        later = sum(number > best for number in scores)
        if later < patience:
            return ""
        return f"no better {metric} than that of step {best} in {later} evaluations (config.eval.patience={patience})"
