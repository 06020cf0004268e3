"""What a config evaluates, made of a run's parts."""

from types import SimpleNamespace

from jax_it.evaluation import Suite
from jax_it.evaluation.evaluators import ALL
from jax_it.run import Run


def make_run(config, layout, model, tokenizer, mesh):
    return Run(config, model, tokenizer, mesh, resolved=SimpleNamespace(layout=layout))


def make_suite(model, tokenizer, examples, config, layout, mesh):
    """`examples` are those of data.eval."""
    return Suite(make_run(config, layout, model, tokenizer, mesh), {} if examples is None else {ALL: examples})
