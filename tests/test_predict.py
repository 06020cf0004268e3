"""Generation for rows of a file: what they may look like, and what is refused before the work begins."""

import datetime
import json

import jax
import pyarrow
import pyarrow.parquet
import pytest

import jax_it
from jax_it import config as settings
from jax_it.cli import main
from jax_it.data.templates import Turn
from jax_it.errors import UserError
from jax_it.generation import Sampling
from jax_it.models import build
from jax_it.predict import _encode, predict, read_prompts
from tests import tiny_run
from tests.tiny_run import fails, succeeds, write_rows


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return tiny_run.finished(tmp_path_factory)


@pytest.mark.parametrize("prompt", ["a\udc80", (Turn("user", "\ud83d"),)])
def test_half_a_character_in_a_prompt_is_refused_with_its_number(prompt):
    with pytest.raises(UserError, match=r"^prompt 2 has '\\u[a-f0-9]+', half of a surrogate pair, which is not text$"):
        _encode(None, None, ["fine", prompt])


@pytest.fixture
def generate(capfd, run, tmp_path):
    """`generate(file, *options)`: the rows of the output."""

    def generate(file, *options):
        output = tmp_path / "out.jsonl"
        output.unlink(missing_ok=True)
        succeeds(
            capfd, "generate", "--model", run, "--input", file, "--output", output, "--max-new-tokens", 6, *options
        )
        return [json.loads(line) for line in output.read_text().splitlines()]

    return generate


def messages(*turns):
    return {"messages": [{"role": role, "content": content} for role, content in turns]}


def test_a_prompt_is_its_text_and_messages_are_the_turns_of_a_conversation_that_ends_with_the_user(tmp_path):
    rows = [
        {"prompt": " as it is\n", "messages": "not read"},
        messages(("user", "say red")),
        messages(("system", "be brief"), ("user", "say red")),
        messages(("user", "a"), ("assistant", "b"), ("user", "c")),
    ]
    found, prompts = read_prompts(str(write_rows(tmp_path / "in.jsonl", rows)))
    assert found == rows
    assert prompts == [
        " as it is\n",
        (Turn("user", "say red"),),
        (Turn("system", "be brief"), Turn("user", "say red")),
        (Turn("user", "a"), Turn("assistant", "b"), Turn("user", "c")),
    ]


@pytest.mark.parametrize(
    "row, message",
    [
        ({"text": "x"}, "no text in the field 'prompt', and no 'messages'; its fields: text"),
        ({"prompt": 3}, "no text in the field 'prompt'"),
        ({"prompt": None}, "no text in the field 'prompt'"),
        ({"prompt": None, "messages": []}, "there is no message of the user or the assistant (roles: none)"),
        (messages(("user", "a"), ("assistant", "b")), "the messages end with the assistant; the last one must be the"),
        (messages(("user", "a"), ("user", "b")), "two user messages in a row, the second of which is turn 2"),
        (
            messages(("assistant", "a")),
            "the messages begin with the assistant, as many ShareGPT threads do; the user must",
        ),
        ({"messages": "say red"}, "no text in the field 'prompt'"),
        ({}, "no text in the field 'prompt'"),
    ],
)
def test_a_row_without_a_question_is_named_with_its_line(tmp_path, row, message):
    file = write_rows(tmp_path / "in.jsonl", [{"prompt": "fine"}, row])
    with pytest.raises(UserError) as error:
        read_prompts(str(file))
    assert f"{file}, line 2: " in str(error.value) and message in str(error.value)


def test_rows_of_csv_and_parquet_come_back_as_json_lines(generate, tmp_path):
    (tmp_path / "in.csv").write_text('id,prompt\n1,"say red, 3"\n2,say teal 5\n')
    rows = generate(tmp_path / "in.csv")
    assert [(row["id"], row["prompt"]) for row in rows] == [("1", "say red, 3"), ("2", "say teal 5")]
    day = datetime.date(2026, 1, 2)
    pyarrow.parquet.write_table(
        pyarrow.Table.from_pylist([{"prompt": "say teal 5", "day": day}]), tmp_path / "in.parquet"
    )
    (row,) = generate(tmp_path / "in.parquet")
    assert row == {"prompt": "say teal 5", "day": "2026-01-02", "prediction": rows[1]["prediction"]}


def test_the_order_and_the_texts_do_not_depend_on_lengths_or_batches(generate, run, tmp_path):
    words = ("red", "green", "blue", "pink", "grey", "teal")
    prompts = ["more " * (i * 7 % 5) + f"say {words[i % 6]} {i}" for i in range(11)]
    rows = generate(write_rows(tmp_path / "in.jsonl", [{"prompt": prompt} for prompt in prompts]))
    assert [row["prompt"] for row in rows] == prompts
    model, params, tokenizer = jax_it.load(str(run))
    assert [row["prediction"] for row in rows] == jax_it.generate(model, params, tokenizer, prompts, 6, batch_size=3)
    assert len({row["prediction"] for row in rows}) > 1


def test_without_a_chat_template_a_conversation_is_the_text_of_its_turns(run):
    model, params, tokenizer = jax_it.load(str(run))
    turns = (Turn("system", "be brief"), Turn("user", "say red 3"))
    found = jax_it.generate(model, params, tokenizer, [turns, "be brief\n\nsay red 3", "say red 3", turns[1:]], 6)
    assert found[0] == found[1] and found[2] == found[3]


def test_a_seed_gives_the_same_draws_again_and_another_seed_others(generate, tmp_path):
    file = write_rows(tmp_path / "in.jsonl", [{"prompt": f"say red {i}"} for i in range(8)])
    draw = ("--temperature", "2", "--top-k", "50", "--top-p", "0.99")
    first, again, other = (generate(file, *draw, "--seed", seed) for seed in (1, 1, 2))
    assert first == again != other


def test_texts_that_reach_their_limit_are_counted(capfd, run, tmp_path):
    file = write_rows(tmp_path / "in.jsonl", [{"prompt": "say red 3"}, {"prompt": "say teal 5"}])
    options = ("--min-new-tokens", 3, "--max-new-tokens", 3, "--output", "/dev/stdout")
    with pytest.raises(SystemExit) as exit:
        main([str(word) for word in ("generate", "--model", run, "--input", file, *options)])
    out, err = capfd.readouterr()
    assert exit.value.code == 0 and [json.loads(line)["prompt"] for line in out.splitlines()] == [
        "say red 3",
        "say teal 5",
    ]
    assert err == "jax-it generate: 2 of 2 texts reached --max-new-tokens 3 before they ended\n"


def test_half_a_surrogate_pair_is_refused_in_a_prompt_and_kept_elsewhere(generate, capfd, run, tmp_path):
    file = tmp_path / "in.jsonl"
    file.write_text('{"prompt": "say red", "other": "\\ud800 ü"}\n')
    assert generate(file)[0]["other"] == "\ud800 ü"
    file.write_text('{"prompt": "say \\ud800"}\n')
    line = fails(capfd, "generate", "--model", run, "--input", file, "--output", tmp_path / "other.jsonl")
    assert "prompt 1 has '\\ud800', half of a surrogate pair" in line and not (tmp_path / "other.jsonl").exists()


def test_no_prompts_make_no_texts(run):
    assert jax_it.generate(*jax_it.load(str(run)), [], sampling=Sampling(num_beams=2)) == []


def test_several_texts_of_a_prompt_are_a_list_with_the_log_probabilities_of_their_tokens(generate, run, tmp_path):
    file = write_rows(tmp_path / "in.jsonl", [{"prompt": "say red 3"}, {"prompt": "say teal 5"}])
    draw = ("--temperature", "3", "--num-samples", "3", "--log-probs")
    for row in generate(file, *draw):
        assert len(row["prediction"]) == len(row["log_probs"]) == 3 and len(set(row["prediction"])) > 1
        assert all(0 < len(each) <= 6 and max(each) <= 0 for each in row["log_probs"])
    beams = generate(file, "--num-beams", "3", "--num-samples", "2", "--early-stopping", "yes")
    best = generate(file, "--num-beams", "3", "--early-stopping", "yes")
    assert [row["prediction"][0] for row in beams] == [row["prediction"] for row in best]
    assert all(len(set(row["prediction"])) == 2 for row in beams)


def test_a_text_ends_before_the_first_stop_string(generate, tmp_path):
    file = write_rows(tmp_path / "in.jsonl", [{"prompt": f"say red {i}"} for i in range(4)])
    whole = generate(file, "--min-new-tokens", 6, "--log-probs")
    stops = whole[0]["prediction"][2:4], whole[1]["prediction"][-1:]
    cut = generate(file, "--min-new-tokens", 6, "--log-probs", "--stop", stops[0], "--stop", stops[1])
    for before, after in zip(whole, cut, strict=True):
        text = before["prediction"]
        at = min((text.find(stop) for stop in stops if stop in text), default=len(text))
        assert after["prediction"] == text[:at]
        assert after["log_probs"] == pytest.approx(before["log_probs"][: len(after["log_probs"])])
    assert cut != whole


def test_every_text_begins_with_the_first_token_and_a_repetition_penalty_bars_repeats(generate, tmp_path):
    file = write_rows(tmp_path / "in.jsonl", [{"prompt": "say red 3"}])
    plain, forced = generate(file), generate(file, "--forced-bos-token", "\u2581teal")
    assert forced[0]["prediction"].startswith("teal") and not plain[0]["prediction"].startswith("teal")
    (row,) = generate(file, "--min-new-tokens", 6, "--repetition-penalty", "1e9")
    (other,) = generate(file, "--min-new-tokens", 6)
    assert row["prediction"] != other["prediction"]


def test_a_first_token_that_the_tokenizer_has_not_is_refused(capfd, run, tmp_path):
    line = fails(capfd, "generate", "--model", run, "--prompt", "say red", "--forced-bos-token", "de_DE")
    assert "--forced-bos-token: the tokenizer has no token 'de_DE'" in line


def test_a_file_that_is_there_is_not_written_over(capfd, run, tmp_path):
    file = write_rows(tmp_path / "in.jsonl", [{"prompt": "say red 3"}])
    line = fails(capfd, "generate", "--model", run, "--input", file, "--output", file)
    assert f"{file} is there already; name another --output" in line
    assert json.loads(file.read_text()) == {"prompt": "say red 3"}


@pytest.mark.parametrize(
    "options, message",
    [
        ((), "--input needs --output"),
        (("--output", "{here}/out.jsonl", "--num-samples", "2"), "--num-samples needs a --temperature above 0"),
        (("--output", "{here}/out.jsonl", "--num-samples", "3", "--num-beams", "2"), "as many --num-beams at least"),
        (("--output", "{here}/out.jsonl", "--length-penalty", "2"), "are of beams; give --num-beams"),
        (("--output", "{here}/out.jsonl", "--min-p", "0.1"), "--min-p need a --temperature above 0"),
        (("--output", "{here}/out.jsonl", "--repetition-penalty", "0"), "--repetition-penalty more than 0"),
        (("--output", "{here}/out.jsonl", "--min-new-tokens", "200"), "must be from 0 to --max-new-tokens, 128"),
        (("--output", "{here}/out.jsonl", "--early-stopping", "yes"), "are of beams; give --num-beams"),
        (("--output", "{here}/nowhere/out.jsonl"), "cannot write {here}/nowhere/out.jsonl: it must be a file"),
        (("--output", "{here}"), "cannot write {here}: it must be a file in a folder that exists"),
        (("--output", "{here}/out.jsonl", "--temperature", "-1"), "--temperature and --top-k must not be negative"),
        (("--output", "{here}/out.jsonl", "--temperature", "nan"), "--temperature"),
        (("--output", "{here}/out.jsonl", "--top-p", "0"), "--top-p must be in (0, 1]"),
        (("--output", "{here}/out.jsonl", "--top-k", "5"), "--top-k, --top-p and --min-p need a --temperature"),
        (("--output", "{here}/out.jsonl", "--num-beams", "2", "--temperature", "1"), "exclude each other"),
        (("--output", "{here}/out.jsonl", "--temperature", "1e-40"), "temperature 1e-40: it must be 0 (greedy), or"),
        (("--output", "{here}/out.jsonl", "--repetition-penalty", "1e-300"), "repetition_penalty 1e-300: it must be"),
        (("--output", "{here}/out.jsonl", "--num-beams", "2", "--length-penalty", "15"), "128 tokens to this power"),
        (("--output", "/proc/out.jsonl"), "cannot write /proc/out.jsonl: No such file or directory; fix that or name"),
        (("--output", "{here}/out.jsonl", "--num-beams", "0"), "0 is not from 1 to"),
    ],
)
def test_what_cannot_be_is_refused_before_a_model_is_loaded(capfd, tmp_path, monkeypatch, options, message):
    monkeypatch.setattr("jax_it.predict.load", None)
    file = write_rows(tmp_path / "in.jsonl", [{"prompt": "say red"}])
    options = [option.format(here=tmp_path) for option in options]
    line = fails(capfd, "generate", "--model", "any", "--input", file, *options)
    assert message.format(here=tmp_path) in line
    assert [file.name for file in tmp_path.iterdir()] == ["in.jsonl"]


def gpt2(tokenizer, positions):
    """A model with as many learned positions, and random weights."""
    values = {
        "model_type": "gpt2", "vocab_size": len(tokenizer.backend), "n_embd": 16, "n_layer": 1, "n_head": 2,
        "n_positions": positions, "eos_token_id": tokenizer.end,
    }  # fmt: skip
    model = build(values, "the test", settings.Model(pretrained=False))
    return model, model.init(jax.random.key(0))


def test_a_prompt_may_be_as_long_as_leaves_room_for_its_text_and_no_longer(run):
    tokenizer = jax_it.load(str(run))[2]
    short, long = "say red", "say red and say blue"
    length = len(tokenizer.encode([long])[0])
    model, params = gpt2(tokenizer, length + 3)
    assert len(predict(model, params, tokenizer, [short, long], max_new_tokens=3)) == 2
    message = f"prompt 2 has {length} tokens, and with 4 new ones it is too long for the model's {length + 3} positions"
    with pytest.raises(UserError, match=message):
        predict(model, params, tokenizer, [short, long], max_new_tokens=4)


def test_an_empty_prompt_is_refused_where_nothing_comes_before_the_text(capfd, run):
    tokenizer = jax_it.load(str(run))[2]
    model, params = gpt2(tokenizer, 32)
    with pytest.raises(UserError, match="prompt 2 is empty, and the tokenizer has no mark to begin with"):
        predict(model, params, tokenizer, ["say red", ""], max_new_tokens=3)
    assert succeeds(capfd, "generate", "--model", run, "--prompt", "", "--max-new-tokens", 3).endswith("\n")
