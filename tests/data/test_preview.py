import re
from pathlib import Path
from typing import Any

import pytest

from jax_it import config as settings
from jax_it import data as chain
from jax_it.data import tokenizer_files as tokenizers
from jax_it.data.formats import CausalFormat
from jax_it.data.tokenizer import Tokenizer
from jax_it.errors import UserError
from jax_it.preview import preview, report, tokenize
from tests.data.chat_tokenizers import KINDS, checkpoint, made
from tests.data.letters import pairs, write

ARCHITECTURE = {
    "model_type": "t5", "vocab_size": 384, "d_model": 8, "d_kv": 4, "d_ff": 8, "num_layers": 1, "num_heads": 2,
    "decoder_start_token_id": 0,
}  # fmt: skip


def shown(
    folder: Path,
    number: int = 3,
    tokenizer: str = "bytes",
    batch_size: int = 4,
    sections: dict[str, dict[str, Any]] | None = None,
    **given: Any,
) -> str:
    records = pairs("abc>x", "de>", "abcdefghijklmnopqrstuvw>yz", "f>0123456789", "gh>uv", "i>j")
    data = {
        "train": [{"path": write(folder / "quiz.jsonl", records)}], "max_source_length": 16, "max_target_length": 8,
        "cache_dir": str(folder / "cache"), "max_dropped": 0.5, "max_unknown": 1.0, **given,
    }  # fmt: skip
    tree: dict[str, dict[str, Any]] = {
        "model": {"pretrained": False, "architecture": ARCHITECTURE, "tokenizer": tokenizer}, "data": data,
        "train": {"batch_size": batch_size, "duration": "2 epochs"},
    }  # fmt: skip
    for name, changes in (sections or {}).items():
        tree[name] = tree.get(name, {}) | changes
    return preview(settings.resolve(tree), number)


def test_what_is_tokenized_beforehand_is_shown_without_the_records(tmp_path):
    expected = shown(tmp_path)
    data = {
        "train": [{"path": str(tmp_path / "quiz.jsonl")}], "max_source_length": 16, "max_target_length": 8,
        "cache_dir": str(tmp_path / "other"), "max_dropped": 0.5, "max_unknown": 1.0,
    }  # fmt: skip
    model = {"pretrained": False, "architecture": ARCHITECTURE, "tokenizer": "bytes"}
    printed = tokenize(settings.resolve({"model": model, "data": data}), str(tmp_path / "tokens"))
    assert expected.startswith(printed)
    assert shown(tmp_path, tokenized=str(tmp_path / "tokens"), cache_dir=str(tmp_path / "third")) == expected


WSD = {"warmup": "4 steps", "decay": "5 steps", "schedule": "wsd"}


@pytest.mark.parametrize(
    "section, changes, message",
    [
        ("train", {"batch_size": 501}, "batch_size: 501 is more than 100 times the 5 training examples; lower it"),
        (
            "train", {"gradient_accumulation_steps": 4},
            "gradient_accumulation_steps: a step has 2 rows, which cannot be cut into 4 parts",
        ),
        ("train", {"duration": "1e12 steps"}, "duration: 1000000000000 steps is too long; a run has at most 21474836"),
        ("train", {"duration": "1e17 tokens"}, "duration: 1e+17 tokens ("),
        ("train", {"duration": "10001 epochs"}, "duration: 10001 epochs; at most 10000 epochs are allowed; use ste"),
        (
            "train", {"optimizer": {"warmup": "9 steps"}, "duration": 8},
            "optimizer.warmup: 9 steps is longer than the run of 8 steps; shorten it",
        ),
        ("train", {"optimizer": {"warmup": "101%"}, "duration": 80}, "optimizer.warmup: 101% (81 steps) is longer"),
        (
            "train", {"optimizer": WSD, "duration": 8},
            "optimizer.decay: 5 steps is longer than what the run has after its warmup, 4 steps; shorten it",
        ),
        (
            "train", {"profile": "8 steps", "duration": 8},
            "profile: 8 steps is not before the end of the run of 8 steps",
        ),
        ("data", {"max_seq_length": 64}, "max_seq_length has no effect on an encoder-decoder"),
        ("mesh", {"context": 3}, "context: 3 devices cannot share the 16 positions of data.max_source_length"),
        ("mesh", {"expert": 2}, "expert: 2, but this model has no experts; use fsdp"),
        ("model", {"lora": {"rank": 2, "targets": ["no"]}}, "lora.targets: 'no' matches no weight"),
        ("data", {"eval": [{"path": "nowhere.jsonl"}]}, "eval.0"),
    ],
)  # fmt: skip
def test_it_refuses_what_training_would_refuse_before_its_first_step(tmp_path, section, changes, message):
    with pytest.raises(UserError) as caught:
        shown(tmp_path, sections={section: changes})
    assert str(caught.value).startswith(f"config.{section}.{message}")


def test_a_tokenizer_with_more_ids_than_the_models_embedding_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"the tokenizer has 384 ids and the model's embedding 99 rows"):
        shown(tmp_path, sections={"model": {"architecture": ARCHITECTURE | {"vocab_size": 99}}})


def test_the_shortest_durations_are_one_step(tmp_path):
    for duration in ("1e-12 steps", "1e-12 epochs", "1e-12 tokens"):
        train = {"duration": duration, "optimizer": {"warmup": "1e-12 steps"}}
        assert "has 1 steps" in shown(tmp_path, sections={"train": train})


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> str:
    return shown(tmp_path_factory.mktemp("preview"))


def test_it_says_what_became_of_each_data_set(text):
    assert "  quiz: 6 examples, 5 kept\n" in text
    assert "    dropped    1 (16.67%) with an empty completion, 0 (0.00%) too long\n" in text
    assert "    truncated  1 (16.67%) sources, 1 (16.67%) targets\n" in text
    assert f"    tokens     mean source {38 / 6:.1f}, target {22 / 6:.1f} (before truncation)\n" in text
    assert "    trained on 22 (36.67%) of the tokens\n" in text
    assert "    unknown    0 (0.00%) of the tokens\n    lost       no character" in text


def test_it_says_how_full_the_rows_are_and_how_long_the_run_is(text):
    found = re.search(
        r"Packed rows\n  source (\d) x 16 tokens, ([\d.]+)% full; target (\d+) tokens, ([\d.]+)% full\n"
        r"  (\d+) rows a step, ([\d.]+) examples a row: ([\d.]+) examples and (\d+) tokens a step\n"
        r"  an epoch has 5 examples and ([\d.]+) steps; the run \(2 epochs\) has (\d+) steps",
        text,
    )
    assert found, text
    blocks, source_fill, target, target_fill, rows, per_row, examples, tokens, epoch, steps = map(float, found.groups())
    sources, targets = 4 + 16 + 2 + 3 + 2, 2 + 3 + 8 + 3 + 2  # after truncation, end marks included
    number = round(5 / per_row)  # rows of an epoch
    assert source_fill == pytest.approx(100 * sources / (number * blocks * 16), abs=0.1)
    assert target_fill == pytest.approx(100 * targets / (number * target), abs=0.1)
    assert epoch == pytest.approx(number / rows, abs=0.1) and examples == pytest.approx(5 / epoch, rel=0.1)
    assert tokens == pytest.approx((sources + targets) / epoch, rel=0.1)
    assert epoch * 2 <= steps < epoch * 2 + 1


def test_it_shows_texts_and_tokens_with_what_is_trained_on_in_brackets(tmp_path):
    text = shown(tmp_path, number=100, batch_size=16)
    examples = text.split("First examples of the first batch: tokens that the loss counts are shown in [brackets]\n")[1]
    found = re.findall(
        r"  row \d+, segment \d: (\d+) source and (\d+) target tokens\n"
        r"    source text   (.*)\n    source tokens (.*)\n    target text   (.*)\n    target tokens (.*)",
        examples,
    )
    assert len(found) >= 14 and examples.count("\n") == 5 * len(found) - 1
    assert set(found) == {
        ("4", "2", "abc", "a b c </s>", "x", "[x] [</s>]"),
        ("16", "3", "abcdefghijklmno", "a b c d e f g h i j k l m n o </s>", "yz", "[y] [z] [</s>]"),
        ("2", "8", "f", "f </s>", "0123456", "[0] [1] [2] [3] [4] [5] [6] [</s>]"),
        ("3", "3", "gh", "g h </s>", "uv", "[u] [v] [</s>]"),
        ("2", "2", "i", "i </s>", "j", "[j] [</s>]"),
    }


@pytest.mark.parametrize("number", [0, 1, 2])
def test_it_shows_so_many_examples_as_are_asked_for(tmp_path, number):
    text = shown(tmp_path, number=number)
    assert text.count("source text") == number and ("First examples" in text) == (number > 0)


def test_dropped_examples_and_padded_rows_are_shown(tmp_path):
    text = shown(tmp_path, truncate="drop", packing=False)
    assert "  quiz: 6 examples, 3 kept\n" in text
    assert "    dropped    1 (16.67%) with an empty completion, 2 (33.33%) too long\n" in text
    assert "Rows, padded to the longest of each batch\n  source 1 x 16 tokens" in text
    assert "  4 rows a step, 1.00 examples a row: 4.0 examples" in text


def test_unknown_tokens_are_shown_for_each_template(tmp_path):
    tokenizers.train(["abc de f gh i x yz uv j 0123456789 klmnopqrstw"], 60).save(tmp_path / "tokenizer")
    source = {"path": str(tmp_path / "quiz.jsonl"), "template": ["auto", "§ {{prompt}} ||| {{completion}}"]}
    text = shown(tmp_path, tokenizer=str(tmp_path / "tokenizer"), train=[source])
    known, unknown = text.split("  quiz, template ")[1:3]
    assert known.startswith("'auto': 6 examples") and "    unknown    0 (0.00%)" in known
    assert unknown.startswith("'§ {{prompt}} ||| {{completion}}': 6 examples")
    assert re.search(r"    unknown    6 \(\d+\.\d\d%\) of the tokens", unknown)


def test_long_texts_are_shortened_in_the_middle(tmp_path):
    text = shown(
        tmp_path, train=[{"path": write(tmp_path / "long.jsonl", pairs(f"{'a' * 900}z>b"))}], max_source_length=1024
    )
    assert re.search(r"source text   a{300} … a{299}z\n", text)


# Causal models


def shown_causal(folder: Path, it: Tokenizer, records: list[dict[str, Any]], **given: Any) -> str:
    data = {
        "train": [{"path": write(folder / "talks.jsonl", records)}], "max_seq_length": 128,
        "cache_dir": str(folder / "cache"), "max_dropped": 0.5, **given,
    }  # fmt: skip
    train = {"batch_size": 3, "duration": "2 epochs"}
    config = settings.resolve({"model": {"path": "unused"}, "data": data, "train": train})
    built = chain.build(config.data, it, CausalFormat(it.pad), config.train.batch_size, lambda shape: 1.0)
    return report(config, built, it, 9)


TALK = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "I am"}] * 2


def test_invalid_records_are_shown_with_their_reasons(tmp_path):
    rows = [*pairs("q>x"), {"messages": TALK[1:]}, *pairs("q>y")]
    text = shown_causal(tmp_path, checkpoint("chatml"), rows, on_invalid="drop", max_dropped=1.0)
    assert "  talks: 3 examples, 2 kept\n    dropped    0 (0.00%) with an empty completion" in text
    assert re.search(
        r"\n    invalid    1 \(33.33%\): .*talks.jsonl, line 2: the messages begin with the assistant", text
    )


def test_of_a_causal_model_it_shows_the_texts_the_pieces_and_the_packing(tmp_path):
    text = shown_causal(tmp_path, checkpoint("chatml"), [{"messages": TALK}, *pairs("q>x", "q>")])
    assert "  talks: 3 examples, 2 kept\n    dropped    1 (33.33%) with an empty completion" in text
    assert " targets\n" in text and "by turns" not in text
    assert re.search(r"Packed rows\n  128 tokens, [\d.]+% full\n  2 rows a step, 2\.00 examples a row", text)
    trained_on, of = re.search(r"trained on (\d+) \((.*)%\) of the tokens", text).groups()
    shown = re.findall(r"  row \d+, segment \d: (\d+) tokens, (\d+) of them trained on\n(.*\n.*\n.*)", text)
    assert len(shown) == 4  # the step is two epochs
    shown = sorted(set(shown))
    assert len(shown) == 2
    assert sum(int(number) for _, number, _ in shown) == int(trained_on)
    assert float(of) == pytest.approx(100 * int(trained_on) / sum(int(tokens) for tokens, _, _ in shown), abs=0.01)
    (talk,) = [lines for _, _, lines in shown if "am" in lines]
    assert "assistant\\nI am<|im_end|>" in talk
    assert "loss on 'I am<|im_end|>I am<|im_end|>'" in talk
    assert talk.count("[<|im_end|>]") == 2 and talk.count("[") == talk.count("]")
    pieces = talk.split("tokens ")[1].split()
    brackets = [piece for piece in pieces if piece.startswith("[")]
    assert "".join(piece[1:-1] for piece in brackets).replace("▁", " ") == "I am<|im_end|>I am<|im_end|>"
    assert "  an answer ends with <|im_end|>\n" in text
    # The tokenizer begins texts with <s>, which this template leaves to it.
    assert re.search(r"in training       '<s>.*\n    generation prompt '<\|im_start", text)


def test_it_says_where_the_generation_prompt_differs_and_what_ends_an_answer(tmp_path):
    text = shown_causal(tmp_path, checkpoint("qwen3"), pairs("q>x"))
    assert "the template's generation prompt differs from the text before an answer in training" in text
    assert re.search(r"in training       '.*assistant\\n<think>\\n\\n</think>\\n\\n'\n", text)
    assert re.search(r"generation prompt '.*assistant\\n'\n", text)
    text = shown_causal(tmp_path / "gemma", checkpoint("gemma"), pairs("q>x"))
    assert "  an answer ends with <eos> or <end_of_turn>\n" in text
    assert "  the template's generation prompt is the text before an answer in training" in text


def test_conversations_that_lost_turns_are_shown(tmp_path):
    text = shown_causal(
        tmp_path, checkpoint("phi4"), [{"messages": TALK * 9}, *pairs("q>x")], max_seq_length=64, packing=False
    )
    assert " targets, 1 (50.00%) by turns\n" in text
    assert "Rows, padded to the longest of each batch\n  64 tokens, " in text


def test_without_a_chat_template_nothing_is_said_of_one(tmp_path):
    text = shown_causal(tmp_path, made(KINDS["llama2"], None), pairs("q>x"))
    assert "Chat template" not in text and "loss on 'x</s>'" in text
