import re
from pathlib import Path
from typing import Any

import pytest

from jax_it import config as settings
from jax_it.data import tokenizer as tokenizers
from jax_it.preview import preview
from tests.data.letters import pairs, write

ARCHITECTURE = {
    "model_type": "t5", "vocab_size": 384, "d_model": 8, "d_kv": 4, "d_ff": 8, "num_layers": 1, "num_heads": 2,
    "decoder_start_token_id": 0,
}  # fmt: skip


def shown(folder: Path, number: int = 3, tokenizer: str = "bytes", batch_size: int = 4, **given: Any) -> str:
    records = pairs("abc>x", "de>", "abcdefghijklmnopqrstuvw>yz", "f>0123456789", "gh>uv", "i>j")
    data = {
        "train": [{"path": write(folder / "quiz.jsonl", records)}], "source_length": 16, "target_length": 8,
        "cache_dir": str(folder / "cache"), "max_dropped": 0.5, "max_unknown": 1.0, **given,
    }  # fmt: skip
    model = {"pretrained": False, "architecture": ARCHITECTURE, "tokenizer": tokenizer}
    train = {"batch_size": batch_size, "duration": "2 epochs"}
    return preview(settings.resolve({"model": model, "data": data, "train": train}), number)


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> str:
    return shown(tmp_path_factory.mktemp("preview"))


def test_it_says_what_became_of_each_data_set(text):
    assert "  quiz: 6 examples, 5 kept\n" in text
    assert "    dropped    1 (16.67%) with an empty completion, 0 (0.00%) too long\n" in text
    assert "    truncated  1 (16.67%) sources, 1 (16.67%) targets\n" in text
    assert f"    tokens     mean source {38 / 6:.1f}, target {22 / 6:.1f} (before truncation)\n" in text
    assert "    supervised 22 (36.67%) of the tokens\n" in text
    assert "    unknown    0 (0.00%) of the tokens" in text


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


def test_it_shows_texts_and_tokens_with_what_is_supervised_in_brackets(tmp_path):
    text = shown(tmp_path, number=100, batch_size=16)
    examples = text.split("First examples of the first batch: tokens that the loss counts stand in [brackets]\n")[1]
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
    assert shown(tmp_path, number=number).count("source text") == number


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
        tmp_path, train=[{"path": write(tmp_path / "long.jsonl", pairs(f"{'a' * 900}z>b"))}], source_length=1024
    )
    assert re.search(r"source text   a{300} … a{299}z\n", text)
