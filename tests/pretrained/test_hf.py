"""Weights that do not fit are refused, in a line that names the weight and the folder."""

import json
import os

import jax
import numpy as np
import pytest
import safetensors.numpy

from jax_it import config, pretrained, sharding
from jax_it.errors import UserError
from jax_it.models import build
from jax_it.models.weights import flatten
from jax_it.pretrained import hf
from jax_it.pretrained.folder import find_folder
from jax_it.pretrained.safetensors import DTYPES, INDEX, SINGLE, TensorReader
from tests.parity import cases

CASE = cases.BY_NAME["t5_1_1_tied"]
QUERY = "encoder.block.1.layer.0.SelfAttention.q.weight"


@pytest.fixture
def published(tmp_path):
    """A folder, and a function that replaces its tensors."""
    folder = cases.write(CASE, tmp_path / "model")
    return folder, lambda tensors: safetensors.numpy.save_file(tensors, folder / SINGLE)


def refusal(folder):
    with pytest.raises(UserError) as refused:
        cases.load(folder)
    message = str(refused.value)
    assert "\n" not in message and str(folder) in message
    return message


def test_a_missing_weight_is_named(published):
    folder, replace = published
    replace({name: tensor for name, tensor in cases.tensors(CASE).items() if name != QUERY})
    assert f"lacks 1 weight(s) that its config.json asks for: {QUERY}" in refusal(folder)


def test_a_weight_that_nobody_would_read_is_named(published):
    folder, replace = published
    extra = "encoder.block.2.layer.0.SelfAttention.q.weight"
    replace(cases.tensors(CASE) | {extra: np.zeros((48, 32), np.float32)})
    assert f"{extra} is a weight that a t5 does not have" in refusal(folder)


@pytest.mark.parametrize("shape", [(32, 48), (48, 33), (48, 32, 1), (1536,)])
def test_a_weight_of_another_shape_is_named_with_both_shapes(shape, published):
    folder, replace = published
    replace(cases.tensors(CASE) | {QUERY: np.zeros(shape, np.float32)})
    assert f"{QUERY} has shape {shape}, but config.json asks for (48, 32)" in refusal(folder)


@pytest.mark.parametrize("alias", ["encoder.embed_tokens.weight", "decoder.embed_tokens.weight"])
def test_a_repeated_embedding_must_be_the_same(alias, published):
    folder, replace = published
    tensors = cases.tensors(CASE)
    replace(tensors | {alias: tensors["shared.weight"].copy()})
    cases.load(folder)
    other = tensors["shared.weight"].copy()
    other[-1, -1] += 1
    replace(tensors | {alias: other})
    assert f"{alias} differs from shared.weight" in refusal(folder)


def test_pytorch_files_are_not_opened_and_the_way_out_is_named(published):
    folder, _ = published
    (folder / SINGLE).rename(folder / "pytorch_model.bin")
    message = refusal(folder)
    assert "can run code when read" in message and "save_pretrained" in message


def test_a_folder_without_weights_is_named(published):
    folder, _ = published
    (folder / SINGLE).unlink()
    assert "config.model.pretrained=False" in refusal(folder)


@pytest.mark.parametrize("length", [0, 4, 100, 20_000, -1])
def test_a_file_that_was_cut_short_is_named(length, published):
    folder, _ = published
    file = folder / SINGLE
    file.write_bytes(file.read_bytes()[:length])
    assert f"{file} is damaged" in refusal(folder)


def test_a_file_of_another_kind_is_named(published):
    folder, _ = published
    (folder / SINGLE).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 242043056\n")
    assert f"{folder / SINGLE} is damaged" in refusal(folder)


@pytest.fixture
def sharded(published, monkeypatch):
    """The folder with its weights in several files."""
    folder, _ = published
    model, params = cases.load(folder)
    (folder / SINGLE).unlink()
    monkeypatch.setattr("jax_it.pretrained.safetensors.SHARD_BYTES", 40_000)
    hf.save(folder, model, params)
    return folder


def test_a_shard_that_the_index_names_must_be_there(sharded):
    shard = next(iter(sorted(sharded.glob("model-00002-of-*"))))
    shard.unlink()
    assert f"{shard} is missing, but {INDEX} names it" in refusal(sharded)


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", '{"weight_map": []}', '{"weight_map": {}}', "[" * 100_000])
def test_a_damaged_index_is_named(text, sharded):
    (sharded / INDEX).write_text(text)
    assert str(sharded / INDEX) in refusal(sharded)


@pytest.mark.parametrize("file", ["../x.safetensors", "/etc/passwd", "a/b", "..", ".", "", "a\0b", 3, None, ["x"]])
def test_an_index_names_files_of_its_own_folder_alone(file, sharded):
    index = json.loads((sharded / INDEX).read_text())
    index["weight_map"]["shared.weight"] = file
    (sharded / INDEX).write_text(json.dumps(index))
    assert f"{sharded / INDEX}: weight_map names {file!r}" in refusal(sharded)


def test_a_link_to_a_file_elsewhere_is_read_as_hub_caches_have_it(sharded, tmp_path_factory):
    elsewhere = tmp_path_factory.mktemp("blobs")
    before = flatten(cases.load(sharded)[1])
    for file in sharded.glob("*.safetensors"):
        file.rename(elsewhere / file.name)
        file.symlink_to(elsewhere / file.name)
    after = flatten(cases.load(sharded)[1])
    assert after.keys() == before.keys()
    for path, array in after.items():
        np.testing.assert_array_equal(array, before[path], err_msg=path)


def test_two_files_of_a_folder_that_hold_the_same_weight_are_refused(sharded):
    one, two, *_ = sorted(sharded.glob("*.safetensors"))
    two.write_bytes(one.read_bytes())
    assert "is in another file of the folder too" in refusal(sharded)


@pytest.mark.parametrize("name", ["config.json", SINGLE, INDEX])
@pytest.mark.parametrize("kind", ["fifo", "folder", "loop", "device"])
def test_what_is_no_regular_file_is_refused_and_not_waited_for(name, kind, published):
    folder, _ = published
    (folder / name).unlink(missing_ok=True)
    if kind == "fifo":
        os.mkfifo(folder / name)
    elif kind == "folder":
        (folder / name).mkdir()
    else:
        (folder / name).symlink_to("/dev/zero" if kind == "device" else name)
    reasons = {"folder": "Is a directory", "loop": "Too many levels of symbolic links"}
    assert f"{folder / name} cannot be read: {reasons.get(kind, 'Not a regular file')}" in refusal(folder)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("value", [np.nan, -np.nan, np.inf, -np.inf])
def test_a_weight_that_is_not_finite_is_named(dtype, value, published):
    folder, replace = published
    tensors = {name: tensor.astype(DTYPES[dtype]) for name, tensor in cases.tensors(CASE).items()}
    tensors[QUERY][5, 7] = value
    replace(tensors)
    assert refusal(folder) == f"{folder}: {QUERY} holds NaN or infinity: nothing could be computed with it"


@pytest.mark.parametrize("seed", [0, 1])
def test_any_damage_to_a_safetensors_file_is_refused_or_read_as_finite_weights(seed, published):
    folder, _ = published
    whole, random = (folder / SINGLE).read_bytes(), np.random.default_rng(seed)
    length = int.from_bytes(whole[:8], "little")
    for _ in range(100):
        content = bytearray(whole)
        for _ in range(random.integers(1, 4)):
            content[random.integers(0, 8 + length if random.random() < 0.9 else len(content))] = random.integers(256)
        if random.random() < 0.2:
            del content[random.integers(0, len(content)) :]
        (folder / SINGLE).write_bytes(content)
        try:
            with TensorReader(folder) as tensors:
                for name in tensors.names():
                    part = tensors.read(name, (slice(None),) * len(tensors.shape(name)))
                    assert np.isfinite(part.astype(np.float32)).all() and part.shape == tensors.shape(name)
        except UserError as error:
            assert "\n" not in str(error) and str(folder) in str(error)


@pytest.mark.parametrize(
    "values, problem",
    [
        (
            {"decoder_start_token_id": 10_000},
            "decoder_start_token_id is 10000; it must be in the vocabulary, from 0 to ",
        ),
        (
            {"pad_token_id": -1, "decoder_start_token_id": 0},
            "pad_token_id is -1; it must be in the vocabulary, from 0 to ",
        ),
        ({"model_type": None}, "model_type is missing"),
        ({"model_type": ["t5"]}, "model_type ['t5'] is not supported"),
    ],
)
def test_ids_outside_of_the_embedding_and_models_of_no_type_are_named(values, problem):
    with pytest.raises(UserError) as refused:
        build(CASE.values | values, "a config.json", config.Model())
    assert str(refused.value).startswith(f"a config.json: {problem}")


def test_a_folder_that_does_not_exist_is_named():
    with pytest.raises(UserError, match=r"model folder \./nowhere does not exist"):
        find_folder("./nowhere")


def test_a_hub_name_that_cannot_be_fetched_is_named(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(UserError, match="'nobody/nothing' is not a local folder and could not be fetched"):
        find_folder("nobody/nothing")


def test_a_dtype_that_weights_cannot_have_is_refused(published, tmp_path):
    with pytest.raises(UserError, match="'int8'; choose one of float32, bfloat16, float16"):
        hf.save(tmp_path, *cases.load(published[0]), dtype="int8")


def test_params_are_float32_whatever_the_file_holds_unless_told_otherwise(tmp_path):
    folder = cases.write(CASE, tmp_path, "bfloat16")
    _, params = cases.load(folder)
    assert {leaf.dtype.name for leaf in jax.tree.leaves(params)} == {"float32"}
    _, params = cases.load(folder, param_dtype="bfloat16")
    assert {leaf.dtype.name for leaf in jax.tree.leaves(params)} == {"bfloat16"}


MESHES = [
    config.Mesh(data=8),
    config.Mesh(data=1, fsdp=8),
    config.Mesh(data=1, tensor=8),
    config.Mesh(data=2, fsdp=2, tensor=2),
]


@pytest.mark.parametrize("mesh", MESHES, ids=str)
@pytest.mark.parametrize("name", ["t5_1_1", "umt5"])
def test_weights_read_into_shards_are_those_read_whole_and_no_read_exceeds_a_shard(name, mesh, tmp_path):
    folder = cases.write(cases.BY_NAME[name], tmp_path)
    whole, params = cases.load(folder)
    built = sharding.make_mesh(mesh)
    largest = {}
    read = TensorReader.read

    def watched(tensors, tensor, slices):
        part = read(tensors, tensor, slices)
        largest[tensor] = max(largest.get(tensor, 0), part.size)
        return part

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(TensorReader, "read", watched)
        patch.setattr(hf, "resolve_tying", lambda model, tensors: whole)  # which compares whole heads
        model, split = pretrained.load(config.Model(path=str(folder)), built)
    ours, theirs = flatten(split), flatten(params)
    assert ours.keys() == theirs.keys()
    for path, weight in model.weights.items():
        array = ours[path]
        spec = sharding.spec(weight.logical_axes, array.shape, built)
        assert array.sharding.is_equivalent_to(jax.sharding.NamedSharding(built, spec), array.ndim)
        np.testing.assert_array_equal(array, theirs[path], err_msg=path)
        shard = array.sharding.shard_shape(array.shape)
        layers = array.shape[0] if weight.stacked else 1
        assert all(largest[tensor] == np.prod(shard) // layers for tensor in weight.names(array.shape))
    parts = {path: array.size // np.prod(array.sharding.shard_shape(array.shape)) for path, array in ours.items()}
    assert parts["encoder.layers.mlp.up"] == mesh.fsdp * mesh.tensor


def test_random_weights_are_the_same_on_any_mesh(published):
    model = config.Model(path=str(published[0]), pretrained=False)
    _, whole = pretrained.load(model, sharding.make_mesh(config.Mesh(), jax.devices()[:1]), seed=3)
    _, split = pretrained.load(model, sharding.make_mesh(config.Mesh(data=2, fsdp=2, tensor=2)), seed=3)
    for path, array in flatten(split).items():
        np.testing.assert_array_equal(array, flatten(whole)[path], err_msg=path)
    assert len(flatten(split)["embedding"].sharding.device_set) == 8
