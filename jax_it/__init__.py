"""Instruction tuning for T5 and causal language models, in JAX and Flax.

jax_it.train(config, workdir)                      a run, from where it stands
jax_it.evaluate(workdir)                           its scores
jax_it.load(path) -> model, params, tokenizer      a Transformers folder, a hub name or a run directory
jax_it.generate(model, params, tokenizer, prompts) -> texts    for prompts that are rendered as in training
jax_it.save(path, model, params, tokenizer)        a Transformers folder
"""

import importlib
from typing import Any

# Imported when first used: `jax-it --help` should not wait for JAX.
_PLACES = {
    "train": "jax_it.training",
    "evaluate": "jax_it.evaluation.evaluate",
    "load": "jax_it.run",
    "generate": "jax_it.predict",
    "save": "jax_it.export",
}

__all__ = ["evaluate", "generate", "load", "save", "train"]


def __getattr__(name: str) -> Any:
    if name in _PLACES:
        return getattr(importlib.import_module(_PLACES[name]), name)
    raise AttributeError(f"module 'jax_it' has no attribute {name!r}")
