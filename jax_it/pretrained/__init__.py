"""Transformers and PEFT folders in and out: folder → tensors → weight table → sharded params.

`load_base` below is the way in, line by line: `hf.py` reads config.json and compares the tensors with the model's
weight table, `safetensors.py` opens the files, `sharded.py` cuts each shard out of them, in the dtype that `storage.py`
gives it. Adapters come from `peft.py`; what is in no folder is drawn at random (`init.py`). `hf.save` and `peft.save`
are the way out.
"""

import dataclasses
from collections.abc import Sequence

import jax

from jax_it.config import Model as ModelConfig
from jax_it.models import Model, Params, build
from jax_it.models.lora import make_adapter
from jax_it.pretrained import hf, peft
from jax_it.pretrained.folder import find_folder
from jax_it.pretrained.init import init_adapter, init_base
from jax_it.pretrained.safetensors import TensorReader
from jax_it.pretrained.sharded import read_params
from jax_it.pretrained.storage import storage_dtypes


def load(
    config: ModelConfig, mesh: jax.sharding.Mesh, seed: int = 0, new_ids: Sequence[int] = ()
) -> tuple[Model, Params]:
    """Return a model and its params, sharded over the mesh: read from its folder or drawn at random by `seed`.

    With `config.lora` the params hold adapters too, those of its PEFT folder or fresh ones. `new_ids` are the tokens
    that the folder's vocabulary lacks. Raises UserError for a folder that cannot be read faithfully.
    """
    model, base = load_base(config, mesh, seed, new_ids)
    if config.lora.path:
        model, adapter = peft.load(config.lora.path, model, mesh, config.path, config.param_dtype)
    elif config.lora.rank:
        model = add_adapter(model, config, new_ids)
        adapter = init_adapter(model, base, mesh, seed, config.param_dtype)
    else:
        return model, base
    return model, model.join(adapter, base)


def load_base(
    config: ModelConfig, mesh: jax.sharding.Mesh, seed: int = 0, new_ids: Sequence[int] = ()
) -> tuple[Model, Params]:
    """Return the base model and its weights; where adapters are trained, in the dtype in which they stay frozen."""
    model, lacking = _build(config, new_ids)
    if not config.pretrained:
        return model, init_base(model, storage_dtypes(model, config), mesh, seed)
    with TensorReader(find_folder(config.path)) as tensors:
        tensors.add_prefix(model.family.prefix, but=model.family.head)
        if lacking or new_ids:
            hf.set_new_rows(model, tensors, new_ids)
        model = hf.resolve_tying(model, tensors)
        hf.check_tensors(model, tensors)
        return model, read_params(model.weights, model.shapes, tensors, storage_dtypes(model, config), mesh)


def load_model(config: ModelConfig, new_ids: Sequence[int] = ()) -> Model:
    """Return the model without its weights; with the fresh adapters that the config asks for, if it does."""
    return add_adapter(_build(config, new_ids)[0], config, new_ids)


def _build(config: ModelConfig, new_ids: Sequence[int]) -> tuple[Model, bool]:
    """Return the base model with rows for new tokens, and whether its folder lacks some of them."""
    values, where = hf.read_config_json(config)
    model = build(values, where, config)
    size = model.config.vocab_size
    if config.lora.path:
        new_ids = peft.token_ids(config.lora.path)
    # A tokenizer that had more tokens than rows before it was added to is refused later: it is another model's.
    last = max(new_ids, default=0)
    if last < size or not set(range(size, last + 1)) <= set(new_ids):
        return model, False
    return build(hf.with_vocab_size(values, last + 1), where, config), True


def add_adapter(model: Model, config: ModelConfig, new_ids: Sequence[int] = ()) -> Model:
    """Return the model with the fresh adapters that the config asks for, if it does."""
    if not config.lora.rank:
        return model
    return dataclasses.replace(model, adapter=make_adapter(config.lora, model.weights, model.depths, new_ids))
