"""Records in another shape say the same."""

import pytest

from jax_it.curation.settings import SETTINGS
from jax_it.data import templates
from jax_it.data.records import Record
from tests.curation.datasets import jax_it, read, write

PAIR = {"prompt": "Say red.", "completion": "red"}
ALPACA = {"instruction": "Sum up.", "input": "1 2", "output": "3"}
MESSAGES = {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Ho"}]}
SHAREGPT = {"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Ho"}]}


@pytest.mark.parametrize("to", ["prompt_completion", "alpaca", "messages", "sharegpt"])
def test_each_shape_renders_as_it_did_before(tmp_path, to):
    records = [PAIR, ALPACA, MESSAGES, SHAREGPT]
    output = tmp_path / "b.jsonl"
    assert jax_it("convert", write(tmp_path / "a.jsonl", records), "--to", to, "--output", str(output)) == 0
    before, after = (
        [templates.render(Record(fields, ""), "auto") for fields in some] for some in (records, read(output))
    )
    assert before == after


def test_alpaca_keeps_its_input_apart_and_references_stay(tmp_path):
    several = {"prompt": "a", "completion": ["b", "c"]}
    path = write(tmp_path / "a.jsonl", [ALPACA, several])
    jax_it("convert", path, "--to", "alpaca", "--output", str(tmp_path / "b.jsonl"))
    assert read(tmp_path / "b.jsonl")[0] == ALPACA
    jax_it("convert", path, "--to", "prompt_completion", "--output", str(tmp_path / "c.jsonl"))
    assert read(tmp_path / "c.jsonl")[1] == several


def test_other_fields_are_kept_where_asked(tmp_path):
    path = write(tmp_path / "a.jsonl", [{**PAIR, "id": 7}])
    jax_it("convert", path, "--to", "sharegpt", "--keep-fields", "--output", str(tmp_path / "b.jsonl"))
    (found,) = read(tmp_path / "b.jsonl")
    assert found["id"] == 7 and set(found) == {"id", "conversations"}


def test_a_conversation_is_no_single_prompt(tmp_path, capsys):
    talk = MESSAGES["messages"] * 2
    path = write(tmp_path / "a.jsonl", [{"messages": talk}])
    assert jax_it("convert", path, "--to", "alpaca") == 2
    assert "a conversation of 4 messages is not one prompt and its completion" in capsys.readouterr().err


def test_every_command_has_a_stage():
    from jax_it.curation.stages import STAGES

    assert list(STAGES) == list(SETTINGS)
