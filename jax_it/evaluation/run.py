"""Scoring a run's checkpoint in a process of its own."""

from pathlib import Path

import jax

from jax_it import data, files, hosts, sharding
from jax_it.errors import UserError
from jax_it.evaluation.evaluator import Evaluator, Scored
from jax_it.evaluation.results import write
from jax_it.workdir import Workdir, make_format


def evaluate(workdir: str | Path, checkpoint: str = "latest") -> tuple[int, Scored]:
    """Scores a checkpoint of a run and writes eval/STEP/ in its folder. Returns (step, scores).

    It takes all devices of this process, whatever mesh the run is training on.
    """
    hosts.start()
    place = Workdir(files.locate(workdir))
    config, derived = place.open()
    step = place.choose_step(checkpoint, config.eval.best)
    tokenizer = place.tokenizer()
    model = place.model(config, derived)
    examples = data.build_eval(config.data, tokenizer, make_format(model, tokenizer), config.eval.limit)
    if examples is None:
        raise UserError(
            f"the run in {place.path} has nothing to evaluate on: set config.data.eval or config.data.holdout"
        )
    mesh = sharding.make_mesh(sharding.whole_or_split(model.parameter_count))
    with jax.set_mesh(mesh):
        evaluator = Evaluator(model, tokenizer, examples, config, derived.layout, mesh)
        scored = evaluator(place.params(model, config, step, mesh))
    write(place.eval(step), scored)
    return step, scored
