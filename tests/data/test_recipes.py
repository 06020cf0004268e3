"""The recipes: found by name, shipped in the wheel, and rendered on records in the schemas that the hub publishes."""

import ast
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
from datasets import Features, List, Translation, Value

from jax_it import config as settings
from jax_it.data import mixture, sources, templates, tokenized, tokenizer_files
from jax_it.data.formats import Seq2SeqFormat
from jax_it.errors import UserError

ROOT = Path(__file__).parents[2]
RECIPES = sorted((ROOT / "configs").glob("*.py"))
TEXT = Value("string")


@pytest.mark.parametrize("file", RECIPES, ids=lambda file: file.stem)
def test_every_recipe_resolves_and_its_docstring_holds_commands_that_do_too(file):
    settings.load(str(file))
    text = ast.get_docstring(ast.parse(file.read_text(encoding="utf-8"))) or ""
    commands = re.findall(r"^ *(jax-it train .*)", text.replace("\\\n", ""), re.M)
    assert commands, f"{file} names no command 'jax-it train --config {file.stem} --workdir …'"
    for command in commands:
        words = shlex.split(command)
        assert words[2] == "--config" and words[3].split(":")[0] == file.stem and "--workdir" in words
        overrides = [word.removeprefix("--config.").split("=", 1) for word in words if word.startswith("--config.")]
        settings.load(words[3], dict(overrides))


@pytest.mark.parametrize("arg, pretrained", [("", True), ("random", False)])
def test_the_t0_recipe_starts_from_a_checkpoint_or_from_random_weights(arg, pretrained):
    model = settings.load(f"t0_t5_small:{arg}").model
    assert model.pretrained == pretrained and bool(model.path) == pretrained
    assert bool(model.architecture) != pretrained


def test_an_argument_that_a_recipe_does_not_know_is_refused():
    with pytest.raises(UserError, match=r"get_config\('rnd'\) failed: ValueError: the argument may be 'random'"):
        settings.load("t0_t5_small:rnd")
    with pytest.raises(UserError, match=r"get_config\('xl,many'\) failed: ValueError: invalid literal for int"):
        settings.load("flan_t5:xl,many")
    with pytest.raises(UserError, match=r"ValueError: the argument must begin with one of xl, xxl, ul2"):
        settings.load("flan_t5:small")
    for arg in ("llama", "llama-3.1-8b,qlora"):
        with pytest.raises(UserError, match=r"ValueError: the argument must be one of smollm2-135m, qwen2.5-0.5b, "):
            settings.load(f"causal_lm:{arg}")


def test_the_recipe_for_flan_t5_xl_holds_to_its_description():
    train = settings.load("flan_t5:xl,4").train
    assert (str(train.duration), train.batch_size, str(train.optimizer.warmup)) == ("3 epochs", 64, "500 steps")
    assert (train.optimizer.name, train.optimizer.weight_decay) == ("adamw", 0.01)


@pytest.mark.parametrize(
    "arg, path, batch_size, fsdp, rank",
    [
        ("flan_t5:xl", "google/flan-t5-xl", 128, -1, 0), ("flan_t5:xl,lora", "google/flan-t5-xl", 64, 1, 16),
        ("flan_t5:xxl", "google/flan-t5-xxl", 1024, -1, 0), ("flan_t5:ul2,128", "google/flan-ul2", 2048, -1, 0),
        ("causal_lm:smollm2-135m", "HuggingFaceTB/SmolLM2-135M-Instruct", 32, 1, 0),
        ("causal_lm:qwen2.5-0.5b,lora", "Qwen/Qwen2.5-0.5B-Instruct", 64, 1, 16),
        ("causal_lm:smollm3-3b", "HuggingFaceTB/SmolLM3-3B", 128, -1, 0),
        ("causal_lm:gemma-2-9b", "google/gemma-2-9b-it", 128, -1, 0),
        ("causal_lm:llama-3.2-3b", "meta-llama/Llama-3.2-3B-Instruct", 128, -1, 0),
        ("causal_lm:llama-3.1-8b,lora", "meta-llama/Llama-3.1-8B-Instruct", 128, -1, 16),
        ("causal_lm:llama-3.1-70b", "meta-llama/Llama-3.1-70B-Instruct", 256, -1, 0),
    ],
)  # fmt: skip
def test_one_recipe_serves_several_models(arg, path, batch_size, fsdp, rank):
    config = settings.load(arg)
    assert (config.model.path, config.train.batch_size) == (path, batch_size)
    assert (config.mesh.fsdp, config.model.lora.rank) == (fsdp, rank)
    assert (config.model.quantize == "nf4") == (arg == "causal_lm:llama-3.1-8b,lora")


# Names


def test_a_recipe_is_found_by_its_name_from_anywhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert settings.read("t0_t5_small:random") == settings.read(f"{ROOT}/configs/t0_t5_small.py:random")
    assert settings.read("super_ni") == settings.read(f"{ROOT}/configs/benchmarks/super_ni.py")


def test_a_name_that_is_not_a_recipe_lists_those_there_are():
    with pytest.raises(UserError, match=r"'t0' is not a recipe; choose causal_lm, .*, lm_eval, super_ni, or name a"):
        settings.load("t0:random")
    with pytest.raises(UserError, match=r"config file .*quickstart\.py does not exist"):
        settings.load("quickstart.py")  # a path, though its name is a recipe's
    with pytest.raises(UserError, match=r"config file configs/none does not exist"):
        settings.load("configs/none")


@pytest.mark.slow
def test_the_recipes_are_in_the_wheel(tmp_path):
    def run(*words: Any, **options: Any) -> str:
        done = subprocess.run([sys.executable, *map(str, words)], capture_output=True, text=True, **options)
        assert done.returncode == 0, done.stderr
        return done.stdout

    pip = ("-m", "pip", "--disable-pip-version-check", "--quiet")
    run(*pip, "wheel", "--no-index", "--no-deps", "--no-build-isolation", "--wheel-dir", tmp_path / "wheel", ROOT)
    (wheel,) = (tmp_path / "wheel").iterdir()
    site = tmp_path / "site"
    run(*pip, "install", "--no-index", "--no-deps", "--target", site, wheel)
    code = "import jax_it, jax_it.config as c; print(jax_it.__file__, c.load('t0_t5_small:random').data.train[0].path)"
    out = run("-c", code, cwd=tmp_path, env={"PYTHONPATH": str(site), "PATH": ""})
    assert out == f"{site}/jax_it/__init__.py bigscience/P3\n"
    shipped = site / "jax_it" / "configs"
    assert sorted(file.name for file in shipped.glob("*.py")) == [file.name for file in RECIPES]
    assert (shipped / "benchmarks" / "super_ni.py").is_file()


# Rendering: column names, types and nesting are those of the data sets' cards

IDS = List(Value("int32"))
QUOTED = {"inputs": IDS, "inputs_pretokenized": TEXT, "targets": IDS, "targets_pretokenized": TEXT}
P3_ROW = {
    "inputs": [3, 9, 1], "inputs_pretokenized": "What label? \nSports or \nWorld \n\n",
    "targets": [7, 1], "targets_pretokenized": "\nSports",
}  # fmt: skip
ANSWERS = {"text": ["in 1066", "1066", "1066"], "answer_start": [3, 6, 6]}
SQUAD_ROW = {"id": "5", "title": "Normans", "context": "They came in 1066.", "question": "When?", "answers": ANSWERS}
MBPP_ROW = {
    "task_id": 11, "text": "Write a function to add.", "code": "def add(a, b):\r\n  return a + b",
    "test_list": ["assert add(1, 2) == 3", "assert add(0, 0) == 0"], "test_setup_code": "", "challenge_test_list": [],
}  # fmt: skip
DATA_SETS: dict[str, tuple[Features, list[dict[str, Any]]]] = {
    "bigscience/P3": (Features(QUOTED), [P3_ROW]),
    "abisee/cnn_dailymail": (
        Features({"article": TEXT, "highlights": TEXT, "id": TEXT}),
        [{"article": "(CNN) -- It rained.", "highlights": "It rained .\nAll day .", "id": "f00"}],
    ),
    "Helsinki-NLP/opus-100": (
        Features({"translation": Translation(languages=["de", "en"])}),
        [{"translation": {"de": "Guten Tag", "en": "Good day"}}],
    ),
    "rajpurkar/squad": (
        Features({
            "id": TEXT, "title": TEXT, "context": TEXT, "question": TEXT,
            "answers": {"text": List(TEXT), "answer_start": List(Value("int32"))},
        }),
        [SQUAD_ROW],
    ),
    "databricks/databricks-dolly-15k": (
        Features(dict.fromkeys(("instruction", "context", "response", "category"), TEXT)),
        [
            {"instruction": "Who?", "context": "It was Ada.", "response": "Ada", "category": "closed_qa"},
            {"instruction": "Why?", "context": "", "response": "Because.", "category": "open_qa"},
        ],
    ),
    "yahma/alpaca-cleaned": (
        Features(dict.fromkeys(("output", "input", "instruction"), TEXT)),
        [
            {"output": "Hola", "input": "Hello", "instruction": "Translate."},
            {"output": "42", "input": "", "instruction": "Give a number."},
        ],
    ),
    "google-research-datasets/mbpp": (
        Features({
            "task_id": Value("int32"), "text": TEXT, "code": TEXT, "test_list": List(TEXT), "test_setup_code": TEXT,
            "challenge_test_list": List(TEXT),
        }),
        [MBPP_ROW],
    ),
}  # fmt: skip
P3 = ("What label? \nSports or \nWorld", "Sports")
TO_GERMAN, TO_ENGLISH = ("Translate to German: Good day", "Guten Tag"), ("Translate to English: Guten Tag", "Good day")
HIGHLIGHTS = "It rained .\nAll day ."
TRIED = "Write a function to add.\nIt must pass: assert add(1, 2) == 3"
CODE = "def add(a, b):\r\n  return a + b"
SQUAD = [
    ("question: When? context: They came in 1066.", "in 1066"), ("They came in 1066.\n\nWhen?", "in 1066"),
    ("Read this and answer the question.\n\nThey came in 1066.\n\nQuestion: When?", "in 1066"),
]  # fmt: skip
RENDERED: dict[str, tuple[list[tuple[str, str]], list[tuple[str, str]]]] = {  # of data.train and of data.eval
    "t0_t5_small": ([P3] * 8, []),
    "t0_t5_small:random": ([P3] * 8, []),
    "summarization": (
        [
            ("summarize: (CNN) -- It rained.", HIGHLIGHTS),
            ("Write highlights of this article.\n\n(CNN) -- It rained.", HIGHLIGHTS),
            ("(CNN) -- It rained.\n\nWhat are the main points of the article above?", HIGHLIGHTS),
        ],
        [("summarize: (CNN) -- It rained.", HIGHLIGHTS)],
    ),
    "translation": ([TO_GERMAN, TO_ENGLISH], [TO_GERMAN, TO_ENGLISH]),
    "question_answering": (SQUAD, SQUAD[:1]),
    "dialogue": (
        [
            ("Who?\n\nIt was Ada.", "Ada"), ("Why?", "Because."), ("Translate.\n\nHello", "Hola"),
            ("Give a number.", "42"),
        ],
        [],
    ),
    "code_generation": ([(TRIED, CODE)], [(TRIED, CODE)]),
}  # fmt: skip


@pytest.fixture
def hub(monkeypatch):
    """Stands in for the hub: a few records of each data set, by their published features."""

    def load_dataset(path: str, subset: str | None, split: str, revision: str | None) -> datasets.Dataset:
        features, rows = DATA_SETS[path]
        return datasets.Dataset.from_list(rows, features=features)

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)


@pytest.mark.parametrize("name", RENDERED)
def test_every_template_of_a_recipe_renders_its_data_set(hub, name):
    data = settings.load(name).data
    for items, expected in zip((data.train, data.eval), RENDERED[name], strict=True):
        examples = [
            templates.render(record, template)
            for source in items
            for template in source.template
            for record in sources.read(source)
        ]
        assert [(example.prompt, example.completion) for example in examples] == expected


def test_all_answers_of_squad_are_references(hub):
    source = settings.load("question_answering").data.eval[0]
    (record,) = sources.read(source)
    assert templates.render(record, source.template[0]).references == ("in 1066", "1066", "1066")


def test_every_recipe_that_names_a_hub_data_set_is_rendered_here():
    named = {
        file.stem for file in RECIPES if any(item.format == "datasets" for item in settings.load(str(file)).data.train)
    }
    assert named == {name.partition(":")[0] for name in RENDERED}


# Mixtures of P3's data sets

TEMPLATES = """\
templates:
  1: !Template
    answer_choices: null
    jinja: "Summarize: {{document}} ||| {{summary}}"
    name: short
  2: !Template
    answer_choices: null
    jinja: "{{document}}\\n\\nIn a sentence: ||| {{summary}}"
    name: long
"""


@pytest.fixture
def promptsource_folder(tmp_path) -> Path:
    """A folder with two templates for each data set of the recipe."""
    tree = settings.read("instruction_mixture")
    for name in [each["name"] for each in tree["data"]["train"]]:
        (tmp_path / "templates" / name).mkdir(parents=True)
        (tmp_path / "templates" / name / "templates.yaml").write_text(TEMPLATES)
    return tmp_path / "templates"


def mixed(arg: str, sizes: dict[str, int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Any, Any]:
    """The recipe's data sets of these sizes, in xsum's schema, tokenized and mixed."""

    def load_dataset(path: str, subset: str | None, split: str, revision: str | None) -> datasets.Dataset:
        rows = [{"document": f"{path} {i}", "summary": f"of {i}", "id": str(i)} for i in range(sizes[path])]
        return datasets.Dataset.from_list(rows, features=Features(dict.fromkeys(("document", "summary", "id"), TEXT)))

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    config = settings.read(f"instruction_mixture:{arg}")
    config["data"]["train"] = [
        {**each, "format": "datasets"} for each in config["data"]["train"] if each["path"] in sizes
    ]
    config["data"] |= {"cache_dir": str(tmp_path / "cache"), "max_unknown": 1.0}
    data = settings.resolve(config).data
    bytes_, form = tokenizer_files.load("bytes"), Seq2SeqFormat(0, 0)
    made = [tokenized.tokenize(each, f"config.data.train.{i}", data, bytes_, form) for i, each in enumerate(data.train)]
    return made, mixture.mix(data.train, made, data)


def test_flans_mixture_caps_each_data_set_and_has_few_shot_prompts_half_of_the_time(
    promptsource_folder, tmp_path, monkeypatch
):
    sizes = {"xsum": 3200, "samsum": 300}
    made, found = mixed(f"flan,{promptsource_folder}", sizes, tmp_path, monkeypatch)
    drawn = found.epoch(0)
    names = [made[i][0].name for i in range(2)]
    assert {names[i]: int((drawn["source"] == i).sum()) for i in range(2)} == {"xsum": 3000, "samsum": 300}
    templates_ = [item.template.rpartition(":")[2] for item in made[0]]
    assert templates_ == ["short", "short, 5-shot", "long", "long, 5-shot"]
    shares = np.bincount(drawn["template"], minlength=4) / len(drawn)
    np.testing.assert_allclose(shares, 0.25, atol=4 * (0.25 * 0.75 / len(drawn)) ** 0.5)
    few = made[0][1]
    prompt = tokenizer_files.load("bytes").decode(few.example(7).source)
    assert prompt.count("\n\n\n") == 5 and prompt.endswith("\n\n\nSummarize: samsum 7")


def test_t0s_mixture_caps_the_templates_of_a_data_set_together(promptsource_folder, tmp_path, monkeypatch):
    sizes = {"xsum": 900, "samsum": 300}
    monkeypatch.setattr(settings, "read", lambda path, read=settings.read: scaled(read(path)))

    def scaled(tree: dict[str, Any]) -> dict[str, Any]:
        assert {each["mixing_cap"] for each in tree["data"]["train"]} == {250_000}  # 500,000 for two templates
        for each in tree["data"]["train"]:
            each["mixing_cap"] //= 500  # so that 1,000 examples are many
        return tree

    made, found = mixed(f"t0,{promptsource_folder}", sizes, tmp_path, monkeypatch)
    drawn = found.epoch(0)
    counted = {made[i][0].template.split("/")[-1]: int((drawn["source"] == i).sum()) for i in range(len(made))}
    assert counted == {"samsum:short": 300, "samsum:long": 300, "xsum:short": 500, "xsum:long": 500}
