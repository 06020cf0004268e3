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
from jax_it.data.encoding import Counts
from jax_it.data.formats import CausalFormat
from jax_it.data.templates import Example, Turn
from jax_it.errors import UserError
from jax_it.generation import Sampling
from jax_it.models import build
from jax_it.predict import encode, predict, read_prompts
from tests import tiny_run
from tests.data.chat_tokenizers import checkpoint
from tests.harness.conftest import CAUSAL, write
from tests.tiny_run import fails, succeeds, write_rows


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return tiny_run.finished(tmp_path_factory)


@pytest.fixture(scope="module")
def chat_model(tmp_path_factory):
    """The folder of a model of random weights, with a chat template."""
    return write(tmp_path_factory.mktemp("models") / "smollm2", CAUSAL, checkpoint("smollm2"))


@pytest.mark.parametrize("prompt", ["a\udc80", (Turn("user", "\ud83d"),)])
def test_half_a_character_in_a_prompt_is_refused_with_its_number(prompt):
    with pytest.raises(UserError, match=r"^prompt 2 has '\\u[a-f0-9]+', half of a surrogate pair, which is not text$"):
        encode(None, None, ["fine", prompt])


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


def test_rows_are_read_as_in_training_and_their_completions_are_not(tmp_path):
    rows = [
        {"prompt": " as it is\n", "completion": "not read"},
        {"instruction": "say", "input": "red"},
        messages(("user", "say red")),
        messages(("system", "be brief"), ("user", "say red"), ("assistant", "not read")),
        messages(("user", "a"), ("assistant", "b"), ("user", "c")),
    ]
    file = str(write_rows(tmp_path / "in.jsonl", rows))
    brief, red = Turn("system", "be brief"), Turn("user", "say red")
    conversation = (Turn("user", "a"), Turn("assistant", "b"), Turn("user", "c"))
    prompts = [(Turn("user", " as it is\n"),), (Turn("user", "say\n\nred"),), (red,), (brief, red), conversation]
    assert read_prompts(file) == (rows, prompts)
    told = Turn("system", "be kind")
    expected = [prompt if prompt[0] == brief else (told, *prompt) for prompt in prompts]
    assert read_prompts(file, system="be kind")[1] == expected


def test_a_template_makes_prompts_of_any_fields(tmp_path):
    rows = [{"question": "say red", "kept": 1}, {"question": "say teal", "answer": 5}]
    file = str(write_rows(tmp_path / "in.jsonl", rows))
    prompts = [(Turn("user", "Q: say red"),), (Turn("user", "Q: say teal"),)]
    assert read_prompts(file, "Q: {{question}} ||| {{answer}}") == (rows, prompts)
    assert read_prompts(file, "Q: {{question}} ||| {{answer}}", raw=True)[1] == ["Q: say red", "Q: say teal"]


def test_a_conversation_is_not_taken_raw(tmp_path):
    file = write_rows(
        tmp_path / "in.jsonl", [{"prompt": "x"}, messages(("user", "a"), ("assistant", "b"), ("user", "c"))]
    )
    with pytest.raises(UserError, match=f"{file}, line 2: --raw is for a single text, and this is a conversation"):
        read_prompts(str(file), raw=True)


@pytest.mark.parametrize(
    "row, message",
    [
        ({"text": "x"}, "none of the fields 'messages', 'conversations', 'prompt'"),
        ({"text": "x"}, "which template 'auto' needs; its fields: text"),
        ({"prompt": ["a"]}, "field 'prompt' is list, not text"),
        ({"prompt": None}, "field 'prompt' is missing or null"),
        ({"prompt": "b"} | messages(("user", "a")), "it has both 'messages' and 'prompt', and they differ; set the"),
        ({"prompt": "a", "prediction": "b"}, "the row already has a field 'prediction'; rename or remove it"),
        ({"prompt": None, "messages": []}, "neither the user nor the assistant has a message (roles: none)"),
        (messages(("user", "a"), ("user", "b")), "two user messages in a row, the second of which is turn 2"),
        (
            messages(("assistant", "a")),
            "the messages begin with the assistant, as many ShareGPT threads do; the user must",
        ),
        ({"messages": "say red"}, "the messages are not a list of objects with role and content"),
        ({}, "none of the fields 'messages', 'conversations', 'prompt'"),
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


@pytest.mark.parametrize("name", ["smollm2", "llama3", "gemma", "mistral_v1", "qwen3", "none"])
def test_a_prompt_is_rendered_as_training_renders_it(name):
    tokenizer = checkpoint("smollm2" if name == "none" else name)
    if name == "none":
        tokenizer = tokenizer.with_chat_template(None, "none")
    format = CausalFormat(tokenizer.pad)
    example = Example((Turn("user", "Say hello"), Turn("assistant", "Hello")), ("Hello",))
    (trained,) = format.encode([example], ["here"], settings.Data(), tokenizer, Counts())
    (prompt,) = encode(format, tokenizer, ["Say hello"])
    assert prompt == format.prompt_of(trained) == trained.target[: len(prompt)].tolist()
    (raw,) = encode(format, tokenizer, ["Say hello"], raw=True)
    start = [] if tokenizer.start is None else [tokenizer.start]
    assert raw == [*start, *tokenizer.encode(["Say hello"])[0]] and (raw == prompt) == (name == "none")


def test_the_command_and_python_render_a_prompt_alike_and_the_command_says_so(capfd, chat_model, tmp_path):
    model, params, tokenizer = jax_it.load(str(chat_model))
    turns = (Turn("user", "Say hello"),)
    rendered, raw = (jax_it.generate(model, params, tokenizer, ["Say hello"], 6, raw=raw)[0] for raw in (False, True))
    assert jax_it.generate(model, params, tokenizer, [turns], 6) == [rendered] != [raw]
    (told,) = jax_it.generate(model, params, tokenizer, [(Turn("system", "Be kind."), *turns)], 6)
    command = ("generate", "--model", chat_model, "--max-new-tokens", 6)
    note = "jax-it generate: prompts are rendered with the model's chat template; --raw leaves them unchanged\n"
    for options, text in (((), rendered), (("--raw",), raw), (("--system", "Be kind."), told)):
        with pytest.raises(SystemExit) as exit:
            main([str(word) for word in (*command, "--prompt", "Say hello", *options)])
        out, err = capfd.readouterr()
        assert exit.value.code == 0 and out == f"{text}\n"
        assert err.count(note) == ("--raw" not in options)
    rows = [{"prompt": "Say hello"}, {"instruction": "Say hello"}, messages(("user", "Say hello"))]
    file = write_rows(tmp_path / "in.jsonl", rows)
    for options, text in (((), rendered), (("--raw",), raw), (("--system", "Be kind."), told)):
        output = tmp_path / f"out{len(options)}{''.join(options)[2:5]}.jsonl"
        succeeds(capfd, *command, "--input", file, "--output", output, *options)
        found = [json.loads(line) for line in output.read_text().splitlines()]
        assert found == [{**row, "prediction": text} for row in rows]


def test_empty_texts_are_counted(capfd, chat_model, tmp_path):
    model, params, tokenizer = jax_it.load(str(chat_model))
    (text,) = jax_it.generate(model, params, tokenizer, ["Say hello"], 6)
    file = write_rows(tmp_path / "in.jsonl", [{"prompt": "Say hello"}, {"prompt": "Say hello"}])
    for options, line in (
        ((), "jax-it generate: 2 of 2 texts are empty\n"),
        (("--raw",), "2 of 2 texts are empty; without --raw, prompts are rendered with the model's chat template\n"),
    ):
        (text,) = jax_it.generate(model, params, tokenizer, ["Say hello"], 6, raw=bool(options))
        options = (*options, "--stop", text[0], "--max-new-tokens", 6, "--output", "/dev/stdout")
        with pytest.raises(SystemExit) as exit:
            main([str(word) for word in ("generate", "--model", chat_model, "--input", file, *options)])
        out, err = capfd.readouterr()
        assert exit.value.code == 0 and {json.loads(row)["prediction"] for row in out.splitlines()} == {""}
        assert line in err


@pytest.mark.parity
def test_the_text_for_a_prompt_is_that_of_transformers_chat(chat_model):
    torch = pytest.importorskip("torch")
    import transformers

    theirs = transformers.AutoModelForCausalLM.from_pretrained(chat_model)
    tokenizer = transformers.AutoTokenizer.from_pretrained(chat_model)
    for prompt in ("Say hello", "What is the capital of France?"):
        inputs = tokenizer.apply_chat_template(
            [{"role": "user", "content": prompt}], add_generation_prompt=True, return_tensors="pt", return_dict=True
        )
        with torch.no_grad():
            tokens = theirs.generate(**inputs, max_new_tokens=12, do_sample=False)[0, inputs["input_ids"].shape[1] :]
        expected = tokenizer.decode(tokens, skip_special_tokens=True)
        assert jax_it.generate(*jax_it.load(str(chat_model)), [prompt], 12) == [expected]


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
    assert f"{file}, line 1: '\\ud800' is half of a surrogate pair" in line and not (tmp_path / "other.jsonl").exists()


def test_no_prompts_make_no_texts(run):
    assert jax_it.generate(*jax_it.load(str(run)), [], sampling=Sampling(num_beams=2)) == []


def test_several_texts_of_a_prompt_are_a_list_with_the_log_probabilities_of_their_tokens(generate, run, tmp_path):
    file = write_rows(tmp_path / "in.jsonl", [{"prompt": "say red 3"}, {"prompt": "say teal 5"}])
    draw = ("--temperature", "3", "--num-return-sequences", "3", "--logprobs")
    for row in generate(file, *draw):
        assert len(row["prediction"]) == len(row["logprobs"]) == 3 and len(set(row["prediction"])) > 1
        assert all(0 < len(each) <= 6 and max(each) <= 0 for each in row["logprobs"])
    beams = generate(file, "--num-beams", "3", "--num-return-sequences", "2", "--early-stopping", "yes")
    best = generate(file, "--num-beams", "3", "--early-stopping", "yes")
    assert [row["prediction"][0] for row in beams] == [row["prediction"] for row in best]
    assert all(len(set(row["prediction"])) == 2 for row in beams)


def test_a_text_ends_before_the_first_stop_string(generate, tmp_path):
    file = write_rows(tmp_path / "in.jsonl", [{"prompt": f"say red {i}"} for i in range(4)])
    whole = generate(file, "--min-new-tokens", 6, "--logprobs")
    stops = whole[0]["prediction"][2:4], whole[1]["prediction"][-1:]
    cut = generate(file, "--min-new-tokens", 6, "--logprobs", "--stop", stops[0], "--stop", stops[1])
    for before, after in zip(whole, cut, strict=True):
        text = before["prediction"]
        at = min((text.find(stop) for stop in stops if stop in text), default=len(text))
        assert after["prediction"] == text[:at]
        assert after["logprobs"] == pytest.approx(before["logprobs"][: len(after["logprobs"])])
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
    assert f"{file} already exists; name another --output" in line
    assert json.loads(file.read_text()) == {"prompt": "say red 3"}


@pytest.mark.parametrize(
    "options, message",
    [
        ((), "--input needs --output"),
        (("--output", "{here}/out.jsonl", "--raw", "--system", "be brief"), "--system and --raw exclude each other"),
        (("--output", "{here}/out.jsonl", "--template", "alpacca"), "template 'alpacca' is not one of auto, "),
        (
            ("--output", "{here}/out.jsonl", "--num-return-sequences", "2"),
            "--num-return-sequences needs a --temperature above 0",
        ),
        (
            ("--output", "{here}/out.jsonl", "--num-return-sequences", "3", "--num-beams", "2"),
            "at least as many --num-beams",
        ),
        (("--output", "{here}/out.jsonl", "--length-penalty", "2"), "are for beam search; add --num-beams"),
        (("--output", "{here}/out.jsonl", "--min-p", "0.1"), "--min-p need a --temperature above 0"),
        (("--output", "{here}/out.jsonl", "--repetition-penalty", "0"), "--repetition-penalty more than 0"),
        (("--output", "{here}/out.jsonl", "--min-new-tokens", "200"), "must be from 0 to --max-new-tokens, 128"),
        (("--output", "{here}/out.jsonl", "--early-stopping", "yes"), "are for beam search; add --num-beams"),
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
    with pytest.raises(UserError, match="prompt 2 is empty, and the tokenizer has no token to begin with"):
        predict(model, params, tokenizer, ["say red", ""], max_new_tokens=3)
    assert succeeds(capfd, "generate", "--model", run, "--prompt", "", "--max-new-tokens", 3).endswith("\n")
