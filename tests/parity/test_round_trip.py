"""Transformers' format → jax_it → Transformers' format, for every family. None of this needs PyTorch."""

import json

import jax
import numpy as np
import pytest
import safetensors.numpy

from jax_it import config, pretrained, sharding
from jax_it.pretrained import hf
from jax_it.pretrained import safetensors as tensor_files
from tests.parity import cases


def tensors(folder):
    """All tensors of a folder, as (dtype, shape, bytes), by plain name."""
    found = {}
    for file in folder.glob("*.safetensors"):
        read = {cases.plain(name): tensor for name, tensor in safetensors.numpy.load_file(file).items()}
        assert not found.keys() & read.keys()
        found |= {name: (tensor.dtype, tensor.shape, tensor.tobytes()) for name, tensor in read.items()}
    return found


def export(folder, target, **settings):
    """Reads a folder into jax_it and writes it out again."""
    model, params = cases.load(folder, **settings)
    target.mkdir()
    hf.save(target, model, params)
    return target


ANY_CASE = pytest.mark.parametrize("case", cases.params(cases.ALL))


@ANY_CASE
@pytest.mark.parametrize(
    "dtype, param_dtype",
    [("float32", "float32"), ("bfloat16", "float32"), ("bfloat16", "bfloat16"), ("float16", "float32")],
)
def test_every_tensor_comes_back_byte_for_byte(case, dtype, param_dtype, tmp_path):
    folder = cases.write(case, tmp_path / "published", dtype)
    exported = tensors(export(folder, tmp_path / "exported", param_dtype=param_dtype))
    assert exported == living(case, tensors(folder))


def living(case, found):
    """The tensors without those that nobody reads."""
    return {name: tensor for name, tensor in found.items() if name not in case.dead}


@ANY_CASE
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_every_tensor_comes_back_byte_for_byte_from_a_model_in_shards(case, dtype, tmp_path):
    folder = cases.write(case, tmp_path / "published", dtype)
    mesh = sharding.make_mesh(config.Mesh(data=1, fsdp=4, tensor=2), jax.devices()[:8])
    model, params = pretrained.load(config.Model(path=str(folder)), mesh)
    assert any(not leaf.sharding.is_fully_replicated for leaf in jax.tree.leaves(params))
    (tmp_path / "exported").mkdir()
    hf.save(tmp_path / "exported", model, params)
    assert tensors(tmp_path / "exported") == living(case, tensors(folder))


@ANY_CASE
def test_an_exported_folder_reads_as_the_same_model(case, tmp_path):
    folder = cases.write(case, tmp_path / "published")
    model, _ = cases.load(folder)
    again, _ = cases.load(export(folder, tmp_path / "exported"))
    assert again.config == model.config


def test_a_large_model_is_written_in_shards_with_an_index_of_them(tmp_path, monkeypatch):
    folder = cases.write(cases.BY_NAME["t5_1_1"], tmp_path / "published")
    monkeypatch.setattr(tensor_files, "SHARD_BYTES", 40_000)
    exported = export(folder, tmp_path / "exported")
    index = json.loads((exported / tensor_files.INDEX).read_text())
    shards = {file.name: safetensors.numpy.load_file(file) for file in exported.glob("*.safetensors")}
    assert len(shards) > 3
    assert index["weight_map"] == {name: shard for shard, read in shards.items() for name in read}
    sizes = {shard: sum(tensor.nbytes for tensor in read.values()) for shard, read in shards.items()}
    assert all(size <= 40_000 for size in sizes.values())
    assert index["metadata"]["total_size"] == sum(sizes.values())
    assert tensors(exported) == tensors(folder) == tensors(export(exported, tmp_path / "again"))


def test_weights_are_written_in_the_dtype_that_is_asked_for(tmp_path):
    model, params = cases.load(cases.write(cases.BY_NAME["t5_1_1"], tmp_path / "published"))
    hf.save(tmp_path, model, params, dtype="bfloat16")
    rounded = cases.tensors(cases.BY_NAME["t5_1_1"], "bfloat16")
    for name, (dtype, _, content) in tensors(tmp_path).items():
        assert dtype == rounded[name].dtype and content == rounded[name].tobytes()
    assert json.loads((tmp_path / "config.json").read_text())["dtype"] == "bfloat16"


def test_a_head_that_repeats_the_embedding_is_read_as_tied(tmp_path):
    case = cases.BY_NAME["t5_1_1_tied"]
    folder = cases.write(case, tmp_path / "published")
    made = cases.tensors(case)
    aliases = {name: made["shared.weight"].copy() for name in ("lm_head.weight", "encoder.embed_tokens.weight")}
    safetensors.numpy.save_file(made | aliases, folder / tensor_files.SINGLE)
    model, params = cases.load(folder)
    assert model.config.tied
    assert "head" not in params
    assert model.head(params) is params["embedding"]
    exported = tensors(export(folder, tmp_path / "exported"))
    assert exported.keys() == made.keys()


def test_a_head_of_its_own_is_read_whatever_config_json_says_of_tying(tmp_path):
    case = cases.BY_NAME["t5_1_1"]
    folder = cases.write(case, tmp_path)
    said = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(
        json.dumps(said | {"tie_word_embeddings": True, "scale_decoder_outputs": False})
    )
    model, params = cases.load(folder)
    assert not model.config.tied and model.config.decoder.output_scale == 1
    np.testing.assert_array_equal(model.head(params), cases.tensors(case)["lm_head.weight"])
