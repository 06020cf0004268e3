"""Every command in the documentation can be parsed; those of the README and the tutorial are run, on tiny models."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import jax
import pytest

import jax_it
from docs import generated
from jax_it import cli, config, models
from jax_it.data import tokenizer_files as tokenizers
from tests import xla
from tests.data.chat_tokenizers import TEXTS, checkpoint
from tests.docs.pages import PAGES, PLACEHOLDER, ROOT, blocks, commands

# Stand in for the models that pages name. A page's train and eval commands get settings that make them short, and the
# programs around them are replaced: `git clone` brings this checkout, `pip` and `make setup` find all installed.
CAUSAL = {
    "model_type": "llama", "hidden_size": 16, "head_dim": 8, "intermediate_size": 24, "num_hidden_layers": 1,
    "num_attention_heads": 2, "num_key_value_heads": 1, "max_position_embeddings": 1024,
}  # fmt: skip
T5 = {
    "model_type": "t5", "d_model": 16, "d_kv": 8, "d_ff": 24, "num_layers": 1, "num_heads": 2, "eos_token_id": 1,
    "pad_token_id": 0, "decoder_start_token_id": 0,
}  # fmt: skip
SHORT = {
    "train.duration": "2 steps", "train.batch_size": "4", "train.optimizer.warmup": "1 steps", "eval.limit": "2",
    "eval.batch_size": "2", "eval.max_new_tokens": "4",
}  # fmt: skip
STANDS_FOR = {"HuggingFaceTB/SmolLM2-135M-Instruct": "causal", "google/flan-t5-small": "t5"}

JAX_IT = """#!{python}
import sys
from jax_it.cli import main

given = [word.partition("=")[0] for word in sys.argv[1:]]
words = [{models}.get(word, word) for word in sys.argv[1:]]
words = [word if "=" not in word else word.replace(word.partition("=")[2], {models}.get(
    word.partition("=")[2], word.partition("=")[2])) for word in words]
short = {short}
if words[0] in ("train", "preview") or words[0] == "eval" and "--config" in words:
    recipe = words[words.index("--config") + 1]
    if recipe.startswith("causal_lm") and words[0] != "eval" and "--config.model.path" not in given:
        short["model.path"] = {models}["HuggingFaceTB/SmolLM2-135M-Instruct"]
    short = {{name: value for name, value in short.items() if words[0] != "eval" or name.startswith("eval.")}}
    words = [word for word in words if word.partition("=")[0].removeprefix("--config.") not in short]
    words += [f"--config.{{name}}={{value}}" for name, value in short.items()]
main(words)
"""
GIT = """#!/bin/sh
mkdir -p jax_it && cd jax_it && cp -r {venv} .venv
for file in configs constraints jax_it Makefile pyproject.toml; do ln -s {root}/$file; done
touch .venv/stamp  # as after `make setup`
"""


@pytest.fixture(scope="session")
def programs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the programs that pages call, of which `jax-it` is this checkout's."""
    root = tmp_path_factory.mktemp("documented")
    smollm2 = checkpoint("smollm2")
    for name, values, tokenizer in (
        ("causal", CAUSAL, smollm2),
        ("t5", T5, tokenizers.train([*TEXTS, "0 1 2 3 4 5 6 7 8 9"], 320)),
    ):
        values = {**values, "vocab_size": tokenizer.size, "eos_token_id": tokenizer.end}
        model = models.build(values, "the test", config.Model())
        jax_it.save(root / name, model, jax.jit(model.init)(jax.random.key(0)), tokenizer)
    stands_for = {name: str(root / folder) for name, folder in STANDS_FOR.items()}
    scripts = {
        "jax-it": JAX_IT.format(python=sys.executable, models=stands_for, short=SHORT),
        "python": f'#!/bin/sh\nexec {sys.executable} "$@"\n',
        "pip": "#!/bin/sh\n",
        "git": GIT.format(venv=root / "venv", root=ROOT),
        "activate": "PATH=$PWD/.venv/bin:$PATH\n",
    }
    (root / "venv" / "bin").mkdir(parents=True)
    for name, text in scripts.items():
        file = root / "venv" / "bin" / name
        file.write_text(text)
        file.chmod(0o755)
    return root / "venv" / "bin"


def run(script: str, folder: Path, programs: Path) -> None:
    environment = os.environ | {
        "PATH": f"{programs}:{os.environ['PATH']}",
        "PYTHONPATH": str(ROOT),
        "XLA_FLAGS": xla.flags(1),
        "HOME": str(folder),  # where the token cache is
        "VENV": ".venv",
    }
    environment.pop("MAKEFLAGS", None)
    done = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", script], cwd=folder, env=environment, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip
    assert done.returncode == 0, f"{script}\n{done.stdout[-3000:]}"


@pytest.mark.parametrize("page", PAGES, ids=str)
def test_every_command_on_a_page_can_be_parsed(page):
    names = generated.names()
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    for words in commands(page):
        if words[0].endswith("make"):
            assert {word for word in words[1:] if re.fullmatch("[a-z-]+", word)} <= targets, words
        elif not words[1].isupper() and (words[-1] != "--help" or len(words) > 2):
            check(words[1:], names)


def check(words: list[str], names: set[str]) -> None:
    with_config = [word for word in words if not word.startswith("--config.")]
    try:
        options, rest = cli.make_parser().parse_known_args(with_config)
    except SystemExit:
        # A form, such as "generate --output", is not a whole command: its options exist at least.
        parser, given = cli.make_parser(), with_config
        while given and given[0] in (commands := generated.subcommands(parser)):
            parser, given = commands[given[0]], given[1:]
        if [word for word in given if not word.startswith("--")]:
            raise
        options, rest = None, []
        assert set(given) <= set(parser._option_string_actions), words
    assert not rest, f"{words}: there is no {rest}"
    for name in (word.partition("=")[0] for word in words if word.startswith("--config.")):
        assert generated.canonical(name) in names, f"{name} is not a setting"
    if (given := getattr(options, "config", None)) and not PLACEHOLDER.search(given):
        config.read(given)


@pytest.mark.slow
@pytest.mark.parametrize("page", ["README.md", "docs/tutorial.md"])
def test_the_commands_of_a_page_run_one_after_another(page, programs, tmp_path):
    data = ROOT / "tests" / "docs" / "train.jsonl"
    (tmp_path / "jax_it").mkdir()
    for name in ("train", "validation"):
        shutil.copy(data, tmp_path / "jax_it" / f"{name}.jsonl")
    run("\n".join(blocks(Path(page), "bash")), tmp_path, programs)


def test_the_tutorial_runs_up_to_the_preview(programs, tmp_path):
    install, make_data, preview = blocks(Path("docs/tutorial.md"), "bash")[:3]
    run("\n".join([install, make_data, preview]), tmp_path, programs)


def test_the_chinese_readme_has_the_same_commands():
    assert blocks(Path("README.zh-CN.md"), "bash") == blocks(Path("README.md"), "bash")
