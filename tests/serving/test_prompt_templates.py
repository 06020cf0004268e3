"""The templates of a run, for those who fill in their fields."""

from types import SimpleNamespace

import pytest

from jax_it import config
from jax_it.serving import prompt_templates
from jax_it.serving.errors import ApiError

CASES = {
    "{{ premise }} Question: {{hypothesis}}? ||| {{ label }}": ["premise", "hypothesis"],
    "{% if text %}{{ text }} ||| {{ answer }}{% endif %}": ["text", "answer"],  # a block spans the bar
    "alpaca": ["instruction", "input"],
}


def run(*templates: str) -> SimpleNamespace:
    source = config.Source(path="unread", template=templates)
    return SimpleNamespace(config=config.Config(data=config.Data(train=(source, source))))


def test_templates_are_described_once_with_the_fields_of_their_prompts():
    found = prompt_templates.describe(run("auto", *CASES))
    assert found == [{"template": template, "fields": fields} for template, fields in CASES.items()]
    assert prompt_templates.describe(SimpleNamespace(config=config.Config())) == []


def test_a_prompt_is_rendered_as_in_training():
    fields = {"premise": "It rains", "hypothesis": "Is it wet"}
    assert prompt_templates.render(run(*CASES), next(iter(CASES)), fields) == "It rains Question: Is it wet?"
    alpaca = {"instruction": "Add.", "input": "1 2"}
    assert prompt_templates.render(run("alpaca"), "alpaca", alpaca) == "Add.\n\n1 2"


@pytest.mark.parametrize(
    "template, fields, param", [("{{ x }} ||| {{ y }}", {"x": "1"}, "template"), (next(iter(CASES)), {}, "fields")]
)
def test_templates_of_others_and_missing_fields_are_refused(template, fields, param):
    with pytest.raises(ApiError) as caught:
        prompt_templates.render(run(*CASES), template, fields)
    assert (caught.value.status, caught.value.param) == (400, param)
