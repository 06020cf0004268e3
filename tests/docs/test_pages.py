"""Links between pages, and the pages that are generated from the code."""

import dataclasses
import re

import pytest

from docs import generated
from jax_it.config import settings
from tests.docs.pages import FENCE, PAGES, ROOT


@pytest.mark.parametrize("page", PAGES, ids=str)
def test_links_between_files_lead_somewhere(page):
    text = FENCE.sub("", (ROOT / page).read_text(encoding="utf-8"))
    for link in re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", text):
        if "://" not in link:
            assert ((ROOT / page).parent / link).resolve().exists(), link


@pytest.mark.parametrize("page", PAGES, ids=str)
def test_files_that_a_page_names_exist(page):
    """Written from the checkout's root, or from jax_it/, or after another file of the same folder."""
    text = FENCE.sub("", (ROOT / page).read_text(encoding="utf-8"))
    files = {path.name for path in ROOT.glob("jax_it/**/*.py")} | {path.name for path in ROOT.glob("tests/**/*.py")}
    for name in re.findall(r"`([a-z_]\w*(?:/\w+)*\.py)`", text):
        exists = (ROOT / name).exists() or (ROOT / "jax_it" / name).exists()
        assert exists or ("/" not in name and name in files), name


def test_the_reference_has_every_setting_with_its_default():
    sections = {cls: where for cls, (where, _) in generated.SECTIONS.items()}
    for name, where in sections.items():
        fields = [field.name for field in dataclasses.fields(getattr(settings, name))]
        assert [setting.name for setting in generated.settings_of(name)] == [f"{where}.{field}" for field in fields]
    found = {setting.name: setting for name in sections for setting in generated.settings_of(name)}
    assert found["train.batch_size"].default == "128" and found["train.batch_size"].comment.startswith(
        "examples per step"
    )
    assert found["train.optimizer.warmup"].default == '"5%"'
    assert found["train.max_spike"].comment.startswith("A step is skipped"), "the comment above a setting is its own"
    nested = {"model.lora", "train.optimizer", "eval.tasks.0.data", "eval.tasks.0.fewshot"}
    assert {name for name, setting in found.items() if not setting.default} == nested


def test_every_setting_is_explained_or_explains_itself():
    silent = {s.name for name in generated.SECTIONS for s in generated.settings_of(name) if s.default and not s.comment}
    assert len(silent) < 40, sorted(silent)


def test_the_reference_has_every_command_and_option():
    page = generated.commands_page()
    assert re.findall(r"^## (\w+)$", page, re.MULTILINE)[:3] == ["train", "eval", "generate"]
    for option in (
        "--version",
        "--workdir",
        "--follow",
        "--num-beams N",
        "--checkpoint latest|best|STEP",
        "--topology",
    ):
        assert f"{{option}} {option}" in page


def test_architecture_lists_every_module():
    page = generated.modules_page()
    modules = {str(path.relative_to(ROOT / "jax_it")) for path in (ROOT / "jax_it").rglob("*.py")}
    listed = set(re.findall(r"\| `(\S+\.py)` \|", page))
    assert modules - {"__init__.py"} == listed
    assert not re.findall(r"\| `(\S+)` \|  \|", page), "a module without a docstring"
