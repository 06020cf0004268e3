"""A Transformers folder comes out whole or not at all, and holds what the run's weights are."""

import json
import os
import platform
import stat
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
import transformers
from huggingface_hub import ModelCard

import jax_it
from jax_it import pretrained
from jax_it.config import Lora
from jax_it.config import Model as ModelConfig
from jax_it.config.settings import Config, Data, Source
from jax_it.data import chat
from jax_it.errors import UserError
from jax_it.export import CARD, export, save, save_adapter
from jax_it.model_card import model_card
from jax_it.models.weights import flatten
from jax_it.pretrained import hf, peft
from jax_it.resolved_run import ResolvedRun
from jax_it.run import Run
from tests import tiny_run
from tests.data.chat_tokenizers import checkpoint
from tests.harness.conftest import CAUSAL, write
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


def flip(folder, name="model.safetensors"):
    """Changes one bit of the weights."""
    file = folder / name
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


def test_what_a_killed_export_has_left_goes_with_the_next_one(loaded, output):
    with subprocess.Popen([sys.executable, "-c", ""]) as killed:
        pass
    (output.parent / f".out-{platform.node()}.{killed.pid}.abc").mkdir(parents=True)
    save(output, *loaded)
    assert [file.name for file in output.parent.iterdir()] == ["out"]


@pytest.mark.parametrize("value", [jnp.nan, -jnp.inf])
def test_weights_that_are_not_finite_are_not_exported(loaded, output, value):
    model, params, tokenizer = loaded
    params = params | {"embedding": params["embedding"].at[3, 2].set(value)}
    with pytest.raises(UserError, match=r"shared\.weight holds NaN or infinity"):
        save(output, model, params, tokenizer)
    assert not list(output.parent.iterdir())


def test_an_output_that_exists_is_refused_before_anything_is_read(capfd, run, output, monkeypatch):
    output.mkdir(parents=True)
    (output / "precious").write_text("mine")
    monkeypatch.setattr(hf, "save", None)
    monkeypatch.setattr("jax_it.run.Run.load_params", None)
    for place in (output, output / "precious"):
        line = fails(capfd, "export", "--workdir", run, "--output", place)
        assert line == f"jax-it export: {place} already exists; name another folder, or remove it"
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


@pytest.fixture(scope="module")
def adapted(loaded):
    """The run's model with adapters of random numbers beside its weights, and its tokenizer."""
    model, base, tokenizer = loaded
    model = pretrained.add_adapter(model, ModelConfig(lora=Lora(rank=2, alpha=3.0)))
    shapes, tree = jax.tree.flatten(model.trained_shapes)
    random = np.random.default_rng(0)
    adapter = tree.unflatten(jnp.asarray(random.normal(size=shape.shape), jnp.float32) for shape in shapes)
    return model, model.join(adapter, base), tokenizer


def test_adapters_are_merged_into_the_weights_that_are_written(loaded, adapted, output):
    model, params, tokenizer = adapted
    save(output, model, params, tokenizer)
    written = flatten(jax_it.load(str(output))[1])
    adapters, base = flatten(params["adapter"]), flatten(loaded[1])
    assert written.keys() == base.keys()
    assert {target.path for target in model.adapter.targets} <= base.keys()
    for path, weight in base.items():
        expected = np.asarray(weight, np.float64)
        if f"{path}.a" in adapters:
            a, b = (np.asarray(adapters[f"{path}.{name}"], np.float64) for name in "ab")
            expected = expected + 3.0 / 2 * np.stack([np.tensordot(*layer, 1) for layer in zip(a, b, strict=True)])
        # Three products of order 1 to 10 and their sum: a few 6e-8 of these.
        np.testing.assert_allclose(written[path], expected, rtol=1e-6, atol=1e-5, err_msg=path)
        assert f"{path}.a" in adapters or np.array_equal(written[path], weight)


def test_adapters_are_written_alone_and_are_read_back_with_the_base_model_bit_for_bit(loaded, adapted, output):
    base = output.parent / "base"
    save(base, *loaded)
    save_adapter(output, *adapted, base=str(base))
    assert {file.name for file in output.iterdir()} >= {peft.CONFIG, peft.WEIGHTS, "tokenizer.json"}
    assert not (output / "model.safetensors").exists() and not (output / "config.json").exists()
    assert sorted(file.name for file in output.parent.iterdir()) == ["base", "out"]
    model, params, tokenizer = jax_it.load(str(output))
    assert model.adapter == adapted[0].adapter and tokenizer.digest() == adapted[2].digest()
    jax.tree.map(np.testing.assert_array_equal, params, adapted[1])


def test_an_adapter_that_reads_back_otherwise_is_noticed_and_nothing_is_left(adapted, output, monkeypatch):
    write = peft.save

    def write_and_flip(folder, *arguments):
        write(folder, *arguments)
        flip(folder, peft.WEIGHTS)

    monkeypatch.setattr(peft, "save", write_and_flip)
    with pytest.raises(UserError, match=r"does not read back as it was written; export again"):
        save_adapter(output, *adapted, base="base")
    assert not list(output.parent.iterdir())


def test_the_adapters_of_a_run_that_has_none_cannot_be_exported(capfd, run, output):
    line = fails(capfd, "export", "--workdir", run, "--output", output, "--adapter-only")
    assert line == f"jax-it export: the run in {run} trained all weights; export it without --adapter-only"
    assert not output.parent.exists()


def card_of(folder) -> ModelCard:
    return ModelCard.load(folder / CARD)


def test_the_model_card_says_how_the_model_was_trained_and_scored(run, output, tmp_path):
    copied = tiny_run.copy(run, tmp_path / "run")
    export(copied, output)
    card = card_of(output)
    assert card.data.to_dict() == {
        "library_name": "transformers", "pipeline_tag": "text2text-generation", "tags": ["jax-it", "t5"],
    }  # fmt: skip
    for text in (
        "# out\n", "A t5 model, trained from random weights with jax_it", "| data | `say`, `names` |",
        "| trained weights | all |", f"| step | {tiny_run.STEPS} of {tiny_run.STEPS} |", "| batch size | 8 examples |",
        "| optimizer | adamw, linear schedule, warmup 3% |", "| peak learning rate | 0.03 |",
        "| maximum length | 32 source and 16 target tokens |", "This checkpoint was not evaluated.",
    ):  # fmt: skip
        assert text in card.text, text
    folder = copied / "eval" / str(tiny_run.STEPS)
    folder.mkdir(parents=True)
    scores = {"say": {"rougeL": 12.34567, "rougeL_ci": [1, 2], "errors": {}}, "all": {"loss": 0.5, "rougeL": 56.0}}
    (folder / "metrics.json").write_text(json.dumps(scores))
    export(copied, output.with_name("other"))
    assert (
        "| task | rougeL | loss |\n| --- | --- | --- |\n| all | 56 | 0.5 |\n| say | 12.35 |  |\n"
        in card_of(output.with_name("other")).text
    )
    (folder / "metrics.json").write_text('{"all": ')
    with pytest.raises(UserError, match=r"metrics.json, whose scores go into the model card, cannot be read"):
        export(copied, output.with_name("third"))
    assert not output.with_name("third").exists()


def test_a_folder_keeps_the_model_card_that_it_has(run, loaded, output, tmp_path):
    (tmp_path / CARD).write_text("Mine, with ü.\n", encoding="utf-8")
    save(output, *loaded, extras=tmp_path, card="another")
    assert (output / CARD).read_text(encoding="utf-8") == "Mine, with ü.\n"
    save(output.with_name("other"), *loaded)
    assert not (output.with_name("other") / CARD).exists()


def test_the_model_card_names_the_base_model_its_license_and_the_data_sets_on_the_hub(adapted, tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.try_to_load_from_cache", lambda repo, file: str(tmp_path / repo / file))
    base = tmp_path / "org" / "base"
    base.mkdir(parents=True)
    (base / CARD).write_text("---\nlicense: other\nlicense_name: mine\ntags: [x]\n---\nText\n")
    data = Data(train=(Source("org/data"), Source("/home/me/own.jsonl"), Source("org/a|b", name="a|b")))

    def made(path, **settings):
        config = Config(model=ModelConfig(path=path, **settings), data=data)
        resolved = ResolvedRun(None, True, 4, "", True, commits={"org/data@main": "abc", "org/test@": "def"})
        run = Run(config, adapted[0], checkpoint("smollm2"), None, resolved=resolved)
        return ModelCard(model_card("out", run, 3, None, adapter_only=True))

    card = made("org/base")
    assert card.data.to_dict() == {
        "base_model": "org/base", "datasets": ["org/data"], "library_name": "peft", "license": "other",
        "license_name": "mine", "pipeline_tag": "text2text-generation",
        "tags": ["jax-it", "t5", "lora", "conversational"],
    }  # fmt: skip
    assert "[org/base](https://huggingface.co/org/base), fine-tuned with jax_it" in card.text
    assert "| data | [org/data](https://huggingface.co/datasets/org/data), `own`, `a\\|b` |" in card.text
    assert "| step | 3 of 4 |" in card.text
    assert "| trained weights | LoRA adapters of rank 2 |" in card.text and "/home/me" not in card.text
    card = made(str(base))  # a local folder
    assert card.data.base_model is None and card.data.license == "other"
    assert "`base`, fine-tuned" in card.text and str(tmp_path) not in card.text
    assert made("org/unknown").data.license is None
    (base / CARD).write_text("---\n: [\n---\n")
    assert made("org/base").data.license is None
    assert "license" not in made("org/base", pretrained=False).data.to_dict()


@pytest.mark.parity
@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")  # PEFT's own use
@pytest.mark.parametrize("kind", ["smollm2", "llama3", "plain", "t5", "t5_chat", "adapter"])
def test_the_code_in_a_model_card_gives_the_text_of_jax_it(kind, run, loaded, adapted, tmp_path, monkeypatch, capsys):
    pytest.importorskip("torch")
    monkeypatch.chdir(tmp_path)
    model, params, tokenizer = adapted if kind == "adapter" else loaded
    if kind in ("smollm2", "llama3", "plain"):
        chosen = checkpoint("smollm2").with_chat_template(None, "none") if kind == "plain" else checkpoint(kind)
        model, params, tokenizer = jax_it.load(str(write(tmp_path / "made", CAUSAL, chosen)))
    if kind == "t5_chat":
        tokenizer = chat.with_chat_template(tokenizer, "default")
    save(tmp_path / "base", *loaded)
    config = Config(model=ModelConfig(path=str(tmp_path / "base")))
    card = model_card("out", Run(config, model, tokenizer, None), 1, None, kind == "adapter")
    if kind == "adapter":
        save_adapter(tmp_path / "out", model, params, tokenizer, str(tmp_path / "base"), card=card)
    else:
        save(tmp_path / "out", model, params, tokenizer, card=card)
    code = card_of(tmp_path / "out").text.split("```python\n")[1].split("```")[0].replace("=128", "=12")
    capsys.readouterr()
    exec(code, {})
    (expected,) = jax_it.generate(model, params, tokenizer, ["What is the capital of France?"], 12)
    assert capsys.readouterr().out == f"{expected}\n"
