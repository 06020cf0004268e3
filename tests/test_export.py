"""A Transformers folder comes out whole or not at all, and holds what the run's weights are."""

import json
import os
import stat

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
import transformers

import jax_it
from jax_it.errors import UserError
from jax_it.export import export, save
from jax_it.models import hf
from tests import tiny_run
from tests.tiny_run import fails


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return tiny_run.finished(tmp_path_factory)


@pytest.fixture(scope="module")
def loaded(run):
    """(model, params, tokenizer) of the run's newest checkpoint."""
    return jax_it.load(str(run))


@pytest.fixture
def output(tmp_path):
    """Where to export to. What goes wrong must leave nothing there or beside it."""
    return tmp_path / "models" / "out"


def flip(folder):
    """Changes one bit of the weights."""
    file = folder / "model.safetensors"
    content = bytearray(file.read_bytes())
    content[-7] ^= 1
    file.write_bytes(content)


def test_the_folder_has_what_transformers_reads(run, output):
    assert export(run, output) == tiny_run.STEPS
    assert {file.name for file in output.iterdir()} >= {
        "config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"
    }  # fmt: skip
    assert [file.name for file in output.parent.iterdir()] == ["out"]
    config = transformers.AutoConfig.from_pretrained(output)
    assert (config.model_type, config.d_model, config.architectures) == ("t5", 16, ["T5ForConditionalGeneration"])
    settings = transformers.GenerationConfig.from_pretrained(output)
    assert (settings.decoder_start_token_id, settings.eos_token_id, settings.pad_token_id) == (0, 1, 0)


def test_the_exported_tokenizer_is_that_of_the_run_and_ends_a_text_with_its_mark(run, loaded, output):
    export(run, output)
    theirs = transformers.AutoTokenizer.from_pretrained(output)
    for text in ("say red 3", "  two  spaces\nand a line", "ünknown ☃", ""):
        assert theirs(text)["input_ids"] == [*loaded[2].encode([text])[0], 1]
    assert theirs.decode(theirs("say red 3")["input_ids"], skip_special_tokens=True) == "say red 3"


def test_the_exported_weights_are_those_of_the_run_bit_for_bit(run, loaded, output):
    export(run, output)
    _, params, _ = jax_it.load(str(output))
    assert jax.tree.structure(params) == jax.tree.structure(loaded[1])
    for leaf, expected in zip(jax.tree.leaves(params), jax.tree.leaves(loaded[1]), strict=True):
        assert np.asarray(leaf).tobytes() == np.asarray(expected).tobytes()


def test_a_model_saved_and_loaded_and_saved_again_is_the_same_folder(run, output):
    export(run, output)
    save(output.parent / "again", *jax_it.load(str(output)), extras=output)
    for file in output.iterdir():
        assert (output.parent / "again" / file.name).read_bytes() == file.read_bytes(), file.name


@pytest.mark.parametrize("name", ["bfloat16", "float16", "float32"])
def test_the_weights_are_written_in_the_dtype_that_is_asked_for(run, loaded, output, name):
    export(run, output, dtype=name)
    tensors = safetensors.numpy.load_file(output / "model.safetensors")
    assert {tensor.dtype.name for tensor in tensors.values()} == {name}
    assert json.loads((output / "config.json").read_text())["dtype"] == name
    embedding = np.asarray(loaded[1]["embedding"])
    assert np.array_equal(tensors["shared.weight"], embedding.astype(jnp.dtype(name)))


@pytest.mark.parametrize("mask", [0o022, 0o077, 0o002])
def test_everyone_may_read_the_folder_who_may_read_an_ordinary_new_file(run, loaded, output, mask):
    output.parent.mkdir()
    before = os.umask(mask)
    try:
        save(output, *loaded)
    finally:
        os.umask(before)
    assert stat.S_IMODE(output.stat().st_mode) == 0o777 & ~mask
    assert {stat.S_IMODE(file.stat().st_mode) for file in output.iterdir()} == {0o666 & ~mask}


def test_a_weight_that_reads_back_otherwise_is_noticed_and_nothing_is_left(loaded, output, monkeypatch):
    write = hf.save

    def write_and_flip(folder, *arguments):
        write(folder, *arguments)
        flip(folder)

    monkeypatch.setattr(hf, "save", write_and_flip)
    with pytest.raises(UserError, match=r"does not read back as it was written; export again"):
        save(output, *loaded)
    assert not list(output.parent.iterdir())


@pytest.mark.parametrize("error", [KeyboardInterrupt, ValueError, MemoryError])
def test_what_interrupts_an_export_leaves_nothing(loaded, output, monkeypatch, error):
    def interrupt(*arguments):
        raise error

    monkeypatch.setattr(hf, "save_generation_settings", interrupt)
    with pytest.raises(error):
        save(output, *loaded)
    assert not list(output.parent.iterdir())


def test_weights_that_are_not_numbers_are_exported_as_they_are(loaded, output):
    model, params, tokenizer = loaded
    params = params | {"embedding": jnp.full_like(params["embedding"], jnp.nan)}
    save(output, model, params, tokenizer)
    assert np.isnan(safetensors.numpy.load_file(output / "model.safetensors")["shared.weight"]).all()


def test_an_output_that_exists_is_refused_before_anything_is_read(capfd, run, output, monkeypatch):
    output.mkdir(parents=True)
    (output / "precious").write_text("mine")
    monkeypatch.setattr(hf, "save", None)
    monkeypatch.setattr("jax_it.workdir.Workdir.params", None)
    for place in (output, output / "precious"):
        line = fails(capfd, "export", "--workdir", run, "--output", place)
        assert line == f"jax-it export: {place} exists already; name another folder, or remove it"
    assert (output / "precious").read_text() == "mine"


def test_an_empty_folder_is_taken(run, output):
    output.mkdir(parents=True)
    export(run, output)
    assert (output / "config.json").is_file()


def test_a_file_in_the_way_of_the_folder_is_named(capfd, run, tmp_path):
    (tmp_path / "file").write_text("mine")
    line = fails(capfd, "export", "--workdir", run, "--output", tmp_path / "file" / "out")
    assert f"cannot write to {tmp_path}/file" in line
    assert (tmp_path / "file").read_text() == "mine"
