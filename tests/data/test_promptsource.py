"""P3's templates by name. The YAML is an excerpt of promptsource (github.com/bigscience-workshop), Apache-2.0."""

import json
from pathlib import Path

import numpy as np
import pytest

from jax_it.config import Data, Source, Task
from jax_it.data import promptsource, tasks, templates
from jax_it.data.formats import Seq2SeqFormat
from jax_it.data.mixture import mix
from jax_it.data.records import Record
from jax_it.data.tokenized import tokenize
from jax_it.errors import UserError
from tests.data.letters import Letters

RTE = """\
dataset: super_glue
subset: rte
templates:
  2b52a83c-0021-41fe-b44c-5aaa076d71a2: !Template
    answer_choices: Yes ||| No
    id: 2b52a83c-0021-41fe-b44c-5aaa076d71a2
    jinja: '{{premise}} Using only the above description and what you know about the
      world, is "{{hypothesis}}" definitely correct? Yes or no? ||| {% if label !=
      -1 %}{{ answer_choices[label] }}{% endif %}'
    metadata: !TemplateMetadata
      choices_in_prompt: true
      languages:
      - en
      metrics:
      - Accuracy
      original_task: true
    name: MNLI crowdsource
    reference: Adapted from Williams et al. 2018's instructions to crowdsourcing workers.
  4163e6f1-1a83-4c73-b867-02eb7ac80316: !Template
    answer_choices: Yes ||| No
    id: 4163e6f1-1a83-4c73-b867-02eb7ac80316
    jinja: Suppose {{premise}} Can we infer that "{{hypothesis}}"? Yes or no? |||
      {% if label != -1 %}{{ answer_choices[label] }}{% endif %}
    metadata: !TemplateMetadata
      original_task: true
    name: can we infer
    reference: Webson & Pavlick 2021
"""
PAWS = """\
dataset: paws
subset: labeled_final
templates:
  5d4cee7b-1d02-4cbf-9ad3-2d8c0b5a7b5b: !Template
    answer_choices: null
    id: 5d4cee7b-1d02-4cbf-9ad3-2d8c0b5a7b5b
    jinja: '{% if label == 1 %} Paraphrase the sentence: {{sentence1}} ||| {{sentence2}} {% endif %}'
    metadata: !TemplateMetadata
      original_task: false
    name: paraphrase-task
    reference: ''
  made-for-this-test: !Template
    answer_choices: '{{options | join("|||")}} '
    jinja: '{% set order = [0, 1] | choice %}{{ [sentence1, sentence2][order] }}{% for a, b in zip([1], [2]) %}
      {{a}}{{b}}{% endfor %} ||| {{ answer_choices[order] }}'
    name: 'ordered: at random'
"""
RECORD = {"premise": "It rains.", "hypothesis": "It is wet.", "label": 1}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name, content in {"super_glue/rte": RTE, "paws/labeled_final": PAWS}.items():
        (tmp_path / name).mkdir(parents=True)
        (tmp_path / name / "templates.yaml").write_text(content)
    return tmp_path


def expand(name: str) -> list[promptsource.Template]:
    return promptsource.expand([f"promptsource:{name}"], "config.data.train.0.template")


def test_a_template_by_name_is_what_promptsource_renders(folder):
    (one,) = expand(f"{folder}/super_glue/rte:can we infer")
    found = templates.render(Record(RECORD, "here"), one.text)
    assert (found.prompt, found.references) == ('Suppose It rains. Can we infer that "It is wet."? Yes or no?', ("No",))
    every = expand(f"{folder}/super_glue/rte")
    assert [template.name.rpartition("rte:")[2] for template in every] == ["MNLI crowdsource", "can we infer"]
    assert every[1].text == one.text
    assert promptsource.expand(["auto", "{{a}} ||| b"], "") == [("auto", "auto"), ("{{a}} ||| b",) * 2]


def test_the_installed_package_has_its_templates_by_data_set_and_subset(folder, monkeypatch, tmp_path):
    package = tmp_path / "site" / "promptsource"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("raise ImportError")  # which is not needed
    (package / "templates").symlink_to(folder)
    with pytest.raises(UserError, match="the package promptsource is not installed; write 'promptsource:FOLDER'"):
        expand("super_glue/rte")
    monkeypatch.syspath_prepend(str(tmp_path / "site"))
    assert [text for _, text in expand("super_glue/rte")] == [text for _, text in expand(f"{folder}/super_glue/rte")]


def test_choices_at_random_are_the_record_s_and_the_same_each_time(folder):
    ((_, text),) = expand(f"{folder}/paws/labeled_final:ordered: at random")
    records = [{"sentence1": f"{i}a", "sentence2": f"{i}b", "options": ["x", "y"]} for i in range(40)]
    found = [templates.render(Record(record, ""), text) for record in records]
    assert [templates.render(Record(record, ""), text) for record in records] == found
    said = [(example.prompt.split()[0][-1], example.completion) for example in found]
    assert 10 < said.count(("a", "x")) < 30 and said.count(("a", "x")) + said.count(("b", "y")) == 40
    assert found[0].prompt.endswith("12")


def test_a_template_that_is_meant_for_other_records_leaves_these_to_the_others(folder, tmp_path):
    file = tmp_path / "a.jsonl"
    records = [
        {"sentence1": "a", "sentence2": "b", "options": ["x", "y"], "label": int(i % 4 == 0)} for i in range(200)
    ]
    file.write_text("".join(json.dumps(record) + "\n" for record in records))
    source = Source(str(file), template=(f"promptsource:{folder}/paws/labeled_final",))
    data = Data((source,), cache_dir=str(tmp_path), max_unknown=1.0)
    made = tokenize(data.train[0], "config.data.train.0", data, Letters(), Seq2SeqFormat(0, 0))
    counts = [(item.counts.kept, item.counts.skipped, item.counts.dropped) for item in made]
    assert counts == [(50, 150, 0), (200, 0, 0)]
    epoch = mix(data.train, [made], data).epoch(0)
    assert sorted(epoch.example) == list(range(200)) and (epoch.target_length > 0).all()
    assert 10 < (epoch.template == 0).sum() < 40
    assert set(epoch.example[epoch.template == 0] % 4) == {0}
    assert np.array_equal(
        epoch.source_length, [len(made[t].example(i).source) for i, t in epoch[["example", "template"]]]
    )


def test_a_task_ranks_the_answer_choices_of_its_template(folder, tmp_path):
    file = tmp_path / "rte.jsonl"
    file.write_text(json.dumps(RECORD) + "\n")
    task = Task(
        name="rte", data=Source(str(file), template=(f"promptsource:{folder}/super_glue/rte:can we infer",)),
        score="multiple_choice",
    )  # fmt: skip
    (example,) = tasks.read(task, "config.eval.tasks.0", Data(), Letters(), Seq2SeqFormat(0, 0))
    assert [option.text for option in example.options] == ["Yes", "No"] and example.references == ("No",)


@pytest.mark.parametrize(
    "name, message",
    [
        ("{folder}/super_glue", "there is no templates.yaml in {folder}/super_glue; its subsets: rte"),
        ("{folder}/super_glue/rte:x", "{folder}/super_glue/rte has no template 'x'; its templates: MNLI crowdsource, "),
        ("{folder}/bad", "{folder}/bad/templates.yaml is not a YAML file of promptsource: could not determine a const"),
        ("{folder}/list", "{folder}/list/templates.yaml is not a YAML file of promptsource: list indices must be"),
        ("", "there is no such folder, and the package promptsource is not installed"),
    ],
)
def test_a_template_that_is_not_there_is_refused_with_those_that_are(folder, name, message):
    for broken, content in {"bad": "!!python/object/apply:os.system ['exit 1']", "list": "- a"}.items():
        (folder / broken).mkdir()
        (folder / broken / "templates.yaml").write_text(content)
    with pytest.raises(UserError) as caught:
        expand(name.format(folder=folder))
    assert str(caught.value).startswith("config.data.train.0.template: ") and "\n" not in str(caught.value)
    assert message.format(folder=folder) in str(caught.value)
