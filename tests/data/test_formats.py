"""What a causal model sees: tokens, masks, lengths and batches."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from jax_it import data as chain
from jax_it.config import Data, Duration, Source
from jax_it.data import chat, tokenized
from jax_it.data.encoded import Encoded
from jax_it.data.encoding import Counts
from jax_it.data.formats import CausalBatch, CausalFormat, Seq2SeqFormat, pack_rows
from jax_it.data.loader import WHOLE, Part
from jax_it.data.packing import Layout, Shape
from jax_it.data.templates import Example, Turn
from jax_it.data.tokenized import Tokenized, tokenize
from jax_it.errors import UserError
from tests.data.chat_tokenizers import KINDS, Kind, checkpoint, made
from tests.data.letters import END, Letters, ids, pairs, write

FORMAT = CausalFormat(pad=0)
LENIENT = {"max_dropped": 1.0, "max_truncated": 1.0, "max_unknown": 1.0}
NOTHING = np.zeros(0, np.int32)


class Started(Letters):
    """Letters with a mark of beginning."""

    start = 50


def example(*turns: str, system: str = "") -> Example:
    roles = ["user", "assistant"] * len(turns)
    said = [Turn(role, text) for role, text in zip(roles, turns, strict=False)]
    return Example((*([Turn("system", system)] if system else []), *said), (turns[-1],))


def encoded(examples: list[Example], tokenizer: Any, **given: Any) -> tuple[list[Encoded | None], Counts]:
    counts = Counts()
    evaluation = given.pop("evaluation", False)
    data = Data(**{"max_seq_length": 12, **given})
    places = [f"line {number}" for number, _ in enumerate(examples, 1)]
    return list(FORMAT.encode(examples, places, data, tokenizer, counts, evaluation)), counts


def shown(item: Encoded | None, tokenizer: Any) -> tuple[str, str] | None:
    """Text, and what of it is trained on."""
    assert item is None or (not len(item.source) and item.loss_mask is not None)
    return None if item is None else (tokenizer.text(item.target), tokenizer.text(item.target[item.loss_mask]))


def sequence(tokens: str, trained: str) -> Encoded:
    """An example of letters; a 1 marks a token that is trained on."""
    return Encoded(NOTHING, np.array(ids(tokens), np.int32), loss_mask=np.array([mark == "1" for mark in trained]))


# Plain text


@pytest.mark.parametrize("tokenizer, first", [(Letters(), []), (Started(), [50])])
def test_completion_and_end_mark_are_trained_on_after_the_prompt(tokenizer, first):
    (found,), counts = encoded([example("abc", "xy")], tokenizer)
    assert found.target.tolist() == [*first, *ids("abcxy"), END]
    assert found.loss_mask.tolist() == [False] * (3 + len(first)) + [True] * 3
    assert FORMAT.prompt_of(found) == [*first, *ids("abc")] == FORMAT.text_prompts(["abc"], tokenizer)[0]
    assert FORMAT.prompts([[Turn("user", "abc")]], tokenizer, ["here"]) == [[*first, *ids("abc")]]
    assert (counts.source_tokens, counts.target_tokens, counts.kept) == (3 + len(first), 3, 1)


@pytest.mark.parametrize(
    "truncate, expected",
    [
        ("end", [
            ("abcdefgh", "xyz|"), ("abcdefgh", "xyz|"), ("abc", "uvwxyzuvw"), ("ab", "uvwxyzuvwx"), ("abcdefg", "xyz|"),
        ]),
        ("start", [
            ("abcdefgh", "xyz|"), ("bcdefghi", "xyz|"), ("cde", "uvwxyzuvw"), ("ab", "uvwxyzuvwx"), ("abcdefg", "xyz|"),
        ]),
        ("drop", [("abcdefgh", "xyz|"), None, None, None, ("abcdefg", "xyz|")]),
    ],
)  # fmt: skip
def test_the_prompt_is_cut_first_and_a_completion_that_is_cut_has_no_end_mark(truncate, expected):
    texts = [
        ("abcdefgh", "xyz"),
        ("abcdefghi", "xyz"),
        ("abcde", "uvwxyzuvwxyz"),
        ("ab", "uvwxyzuvwxyz"),
        ("abcdefg", "xyz"),
    ]
    found, counts = encoded([example(*pair) for pair in texts], Letters(), truncate=truncate)
    for item, wanted in zip(found, expected, strict=True):
        if wanted is None:
            assert item is None
            continue
        marks = [END] if wanted[1].endswith("|") else []
        assert item.target.tolist() == [*ids(wanted[0]), *ids(wanted[1].rstrip("|")), *marks]
        assert item.loss_mask.tolist() == [False] * len(wanted[0]) + [True] * len(wanted[1])
    if truncate == "drop":
        assert (counts.too_long, counts.truncated) == (3, 0)
    else:
        assert (counts.too_long, counts.truncated, counts.truncated_source, counts.truncated_target) == (0, 3, 2, 2)


def test_the_mark_of_beginning_stays_where_a_prompt_is_cut_at_its_start():
    (found,), _ = encoded([example("abcdefghij", "xyz")], Started(), truncate="start")
    assert found.target.tolist() == [50, *ids("defghijxyz"), END]


def test_refuse_names_the_first_line_that_does_not_fit():
    texts = [example("abcdefgh", "xyz"), example("abcdefghi", "xyz")]
    with pytest.raises(
        UserError, match=r"^line 2: 13 tokens exceed the limit of 12; raise config\.data\.max_seq_length, or"
    ):
        encoded(texts, Letters(), truncate="error")


def test_an_example_without_a_target_token_is_dropped_and_counted():
    found, counts = encoded([example("a", ""), example("b", " \n"), example("", "x"), example("c", "d")], Letters())
    assert found[:2] == [None, None] and counts.empty_completion == 2 and counts.kept == 2
    # Nothing comes before the first token, so that it cannot be trained on.
    assert found[2].target.tolist() == [*ids("x"), END] and found[2].loss_mask.tolist() == [False, True]


def test_several_turns_need_a_chat_template():
    with pytest.raises(UserError, match=r"^line 1: a conversation of several turns needs a chat template, which"):
        encoded([example("a", "b", "c", "d")], Letters())


@pytest.mark.parametrize("kind", [KINDS["smollm2"], KINDS["llama2"], KINDS["mistral_v3"], KINDS["gemma"]])
def test_with_real_tokenizers_the_prompt_is_what_is_generated_from(kind):
    it = made(kind, None)
    texts = [("Question: 4 + 4?\nAnswer:", "8"), ("  a ", "b \n"), ("Hi", "Hello there")]
    found, _ = encoded([example(*pair) for pair in texts], it, max_seq_length=100)
    for item, (prompt, completion) in zip(found, texts, strict=True):
        assert FORMAT.prompt_of(item) == it.backend(prompt)["input_ids"]  # with <s> where the tokenizer sets it
        assert it.decode(item.target[item.loss_mask]) == completion
        assert item.target[-1] == it.end and item.loss_mask[-1]


# Conversations


def test_every_record_is_a_conversation_where_there_is_a_chat_template():
    it = checkpoint("qwen2_5")
    texts = [example("a", "b"), example("a", "b", "c", "d", system="Be kind."), example("a", "b", "c", " ")]
    found, counts = encoded(texts, it, max_seq_length=200)
    begin = "<|im_start|>system\nYou are Qwen, created by Alibaba Cloud. You are a helpful assistant.<|im_end|>\n"
    assert shown(found[0], it) == (
        begin + "<|im_start|>user\na<|im_end|>\n<|im_start|>assistant\nb<|im_end|>\n", "b<|im_end|>"
    )  # fmt: skip
    assert shown(found[1], it)[1] == "b<|im_end|>d<|im_end|>"
    assert found[2] is None and counts.empty_completion == 1 and counts.kept == 2
    assert counts.target_tokens == 6
    assert counts.source_tokens == sum(len(item.target) for item in found[:2]) - 6
    last, _ = encoded(texts[:2], it, max_seq_length=200, train_on="last")
    assert shown(last[1], it)[1] == "d<|im_end|>"
    assert FORMAT.prompt_of(last[1]) == FORMAT.prompt_of(found[1])
    assert FORMAT.prompts([texts[1].turns[:-1]], it, ["here"]) == [FORMAT.prompt_of(found[1])]


TALK = example("one", "a", "two", "b", "three", "c", system="Be kind.")


def parts(text: str) -> str:
    """What is said of TALK in a rendering."""
    return " ".join(word for word in ("Be kind.", "one", "a", "two", "b", "three", "c") if f"\n{word}<" in text)


@pytest.mark.parametrize(
    "truncate, train_on, exchanges, said, trained",
    [
        ("end", "all", 3, "Be kind. one a two b three c", "a b c"),
        ("end", "all", 2, "Be kind. one a two b", "a b"),
        ("end", "last", 2, "Be kind. one a two b", "b"),
        ("start", "all", 2, "Be kind. two b three c", "b c"),
        ("start", "last", 1, "Be kind. three c", "c"),
        ("end", "all", 1, "Be kind. one a", "a"),
    ],
)
def test_a_long_conversation_is_cut_at_turn_borders_and_counted(truncate, train_on, exchanges, said, trained):
    it = checkpoint("smollm2")
    fits = [encoded([Example(TALK.turns[: 1 + 2 * n], ())], it, max_seq_length=500)[0][0] for n in (1, 2, 3)]
    room = len(fits[exchanges - 1].target) + (0 if exchanges == 3 else 3)
    (found,), counts = encoded([TALK], it, max_seq_length=room, truncate=truncate, train_on=train_on)
    text, taught = shown(found, it)
    assert parts(text) == said and taught == "".join(f"{word}<|im_end|>" for word in trained.split())
    assert len(found.target) <= room and text.endswith("<|im_end|>\n")
    cut = int(exchanges < 3)
    assert (counts.truncated, counts.truncated_turns, counts.too_long) == (cut, cut, 0)
    assert (counts.truncated_source, counts.truncated_target) == (0, 0)


def test_a_conversation_of_which_no_exchange_fits_is_dropped_and_counted():
    it = checkpoint("smollm2")
    for truncate in ("end", "start", "drop"):
        found, counts = encoded([TALK, example("q", "r")], it, max_seq_length=20, truncate=truncate)
        assert found == [None, None] and (counts.too_long, counts.truncated, counts.kept) == (2, 0, 0)
    whole = len(encoded([TALK], it, max_seq_length=500)[0][0].target)
    found, counts = encoded([TALK], it, max_seq_length=whole - 1, truncate="drop")
    assert found == [None] and counts.too_long == 1
    with pytest.raises(
        UserError, match=rf"^line 1: {whole} tokens exceed the limit of {whole - 1}; raise config\.data\.max_seq"
    ):
        encoded([TALK], it, max_seq_length=whole - 1, truncate="error")


def test_for_evaluation_the_last_answer_stays_and_nothing_is_dropped():
    it = checkpoint("smollm2")
    for truncate in ("end", "start", "drop", "error"):
        (whole,), _ = encoded([TALK], it, max_seq_length=500, truncate=truncate, evaluation=True)
        (found,), counts = encoded([TALK], it, max_seq_length=len(whole.target) - 1, truncate=truncate, evaluation=True)
        assert parts(shown(found, it)[0]) == "Be kind. two b three c" and counts.cut_prompts == 1
        long = example("q", "c " * 100)
        (found,), counts = encoded([long], it, max_seq_length=50, truncate=truncate, evaluation=True)
        assert len(found.target) == 50 and (counts.cut_prompts, counts.truncated_target) == (0, 1)
        assert FORMAT.prompt_of(found) == FORMAT.prompts([long.turns[:-1]], it, ["here"])[0]
        long = example("q " * 100, "c")
        (found,), counts = encoded([long], it, max_seq_length=50, truncate=truncate, evaluation=True)
        assert FORMAT.prompt_of(found) == FORMAT.prompts([long.turns[:-1]], it, ["here"])[0][-50:]
        assert (counts.cut_prompts, counts.truncated_target) == (1, 0) and not found.loss_mask.any()
        assert pack_rows(FORMAT, [found], Layout(Shape(0, 0, 50), 4, 1.0, 0.0, 0.0), 4) == []


def test_the_source_of_an_encoder_decoder_is_rendered_by_its_chat_template_if_it_has_one():
    it, format = checkpoint("qwen2_5"), Seq2SeqFormat(0, 0)
    turns = TALK.turns
    (found,) = format.encode([TALK], ["here"], Data(), it, Counts())
    text = it.text(found.source)
    assert text.startswith("<|im_start|>system\nBe kind.<|im_end|>\n")
    assert text.endswith("three<|im_end|>\n<|im_start|>assistant\n<|im_end|>")  # the end mark is that of a source
    assert it.text(found.target) == "c<|im_end|>"
    assert format.prompt_of(found) == format.prompts([turns[:-1]], it, ["here"])[0]
    (found,) = format.encode([TALK], ["here"], Data(), Letters(), Counts())
    assert found.source.tolist() == [*ids("Be kind.\n\none\n\na\n\ntwo\n\nb\n\nthree"), END]


# Batches


def test_a_batch_is_laid_out_as_its_examples_say():
    one, two = sequence("abcde", "00110"), sequence("xyz", "011")
    rows = [[Encoded(*one[:2], 0, one.loss_mask), Encoded(*two[:2], 0, two.loss_mask)], []]
    for prefix_lm in (False, True):
        batch = CausalFormat(pad=9, prefix_lm=prefix_lm).batch(rows, Shape(0, 0, 10))
        a, b, c, d, e, x, y, z = *ids("abcde"), *ids("xyz")
        assert batch.tokens_BT.tolist() == [[a, b, c, d, e, x, y, z, 9, 9], [9] * 10]
        assert batch.targets_BT.tolist() == [[b, c, d, e, 9, y, z, 9, 9, 9], [9] * 10]
        assert batch.weights_BT.tolist() == [[0, 1, 1, 0, 0, 1, 1, 0, 0, 0], [0] * 10]
        assert batch.segments_BT.tolist() == [[1, 1, 1, 1, 1, 2, 2, 2, 0, 0], [0] * 10]
        assert batch.positions_BT.tolist() == [[0, 1, 2, 3, 4, 0, 1, 2, 0, 0], [0] * 10]
        assert prefix_lm == (batch.prefix_BT is not None)
        if prefix_lm:  # up to the position that predicts the first token that is trained on
            assert batch.prefix_BT.tolist() == [[1, 1, 0, 0, 0, 1, 0, 0, 0, 0], [0] * 10]
        assert batch.weights_BT.dtype == np.float32
        assert all(array.dtype == np.int32 for array in (*batch[:2], *batch[3:]) if array is not None)


@pytest.mark.parametrize("packing", [True, False])
def test_the_end_of_text_is_trained_on_where_it_is_the_padding_too(packing, tmp_path):
    """Segments tell padding apart, never ids."""
    it = made(Kind("gpt2", "<|endoftext|>", (), "<|endoftext|>"), None)
    assert it.pad == it.end and it.unknown is None
    path = write(tmp_path / "a.jsonl", pairs("Hi>Hello", "How are you?>I am well."))
    data = Data(train=(Source(path),), max_seq_length=32, packing=packing, cache_dir=str(tmp_path / "cache"))
    batch = chain.build(data, it, CausalFormat(it.pad), 2, lambda shape: 1.0).train.batch(0).batch
    ends = (batch.targets_BT == it.end) & (batch.weights_BT > 0)
    assert ends.sum() == 2
    assert (batch.weights_BT[batch.segments_BT == 0] == 0).all() and (
        batch.tokens_BT[batch.segments_BT == 0] == it.pad
    ).all()


def test_examples_are_packed_into_batches_of_so_many_rows():
    examples = [sequence("abcde", "00110"), sequence("xyz", "011"), sequence("qrs", "000"), sequence("tuv", "001")]
    found = pack_rows(FORMAT, examples, Layout(Shape(0, 0, 8), 1, 1.0, 0.0, 0.0), 2)
    assert len(found) == 1 and isinstance(found[0], CausalBatch)
    assert found[0].segments_BT.tolist() == [[1, 1, 1, 1, 1, 2, 2, 2], [1, 1, 1, 0, 0, 0, 0, 0]]
    assert found[0].weights_BT.sum() == 5  # the one without a token to train on is left out
    pairs_of = [Encoded(np.array([4, 1]), np.array([5, 6, 1])), Encoded(np.array([7, 8, 1]), np.array([9, 1]))]
    found = pack_rows(Seq2SeqFormat(0, 0), pairs_of, Layout(Shape(2, 4, 6), 1, 1.0, 0.0, 0.0), 2)
    assert found[0].source_BGS.shape == (2, 2, 4) and found[0].weights_BT.sum() == 5


def test_examples_longer_than_the_training_rows_are_evaluated_whole():
    examples = [Encoded(np.arange(2, 9), np.array([5, 1])), Encoded(np.array([7, 1]), np.arange(2, 12))]
    (found,) = pack_rows(Seq2SeqFormat(0, 0), examples, Layout(Shape(1, 4, 6), 2, 1.0, 0.0, 0.0), 2)
    assert found.source_BGS.shape == (2, 1, 8) and found.targets_BT.shape == (2, 12)
    assert found.weights_BT.sum() == 12 and (found.source_segments_BGS > 0).sum() == 9


# From files to batches


def build(
    folder: Path, tokenizer: Any, records: list[dict[str, Any]], batch_size: int = 4, **given: Any
) -> chain.Built:
    path = write(folder / "a.jsonl", records)
    settings = {"max_seq_length": 24, "cache_dir": str(folder / "cache"), **LENIENT, **given}
    return chain.build(Data(train=(Source(path),), **settings), tokenizer, FORMAT, batch_size, lambda shape: 1.0)


TEXTS = [f"{'abcdefghij'[: 1 + i % 9]} {i}>{'xyz'[: 1 + i % 3]}" for i in range(60)]


@pytest.mark.parametrize("packing", [True, False])
def test_from_files_to_batches_every_example_arrives_once_with_its_mask(tmp_path, packing):
    built = build(tmp_path, Letters(), pairs(*TEXTS, "only a prompt>"), packing=packing)
    arrived, tokens = [], 0
    for step in built.train.read(0, Duration(1, "epochs"), WHOLE):
        batch, sizes = step.batch, step.sizes
        assert step.shape == (Shape(0, 0, 24) if packing else Shape(0, 0, batch.tokens_BT.shape[1]))
        assert (sizes.source_tokens, sizes.source_positions) == (0, 0)
        assert sizes.target_tokens == (batch.segments_BT > 0).sum() and sizes.target_positions == batch.tokens_BT.size
        tokens += sizes.tokens
        for row in range(len(batch.tokens_BT)):
            for segment in range(1, batch.segments_BT[row].max() + 1):
                here = batch.segments_BT[row] == segment
                text, weights = batch.tokens_BT[row][here], batch.weights_BT[row][here]
                assert batch.targets_BT[row][here][:-1].tolist() == text[1:].tolist()
                prompt = int(np.argmax(weights)) + 1
                assert weights.tolist() == [0.0] * (prompt - 1) + [1.0] * (len(text) - prompt) + [0.0]
                assert text[-1] == END
                arrived.append(f"{Letters().decode(text[:prompt])}>{Letters().decode(text[prompt:])}")
    assert sorted(arrived) == sorted(TEXTS)
    assert tokens == sum(len(text) for text in TEXTS)  # an end mark for each ">"
    layout = built.train.layout
    assert layout.source_fill == 0 and 0 < layout.target_fill <= 1
    assert layout.rows == 4 if not packing else layout.examples_per_row > 1.5


def test_hosts_share_the_rows_of_a_causal_batch(tmp_path):
    built = build(tmp_path, Letters(), pairs(*TEXTS), batch_size=12)
    whole = built.train.batch(1, Part((0,), 1, 4)).batch
    halves = [built.train.batch(1, Part((i,), 2, 4)).batch for i in (0, 1)]
    for field, array in whole._asdict().items():
        if array is not None:
            assert np.concatenate([getattr(half, field) for half in halves]).tolist() == array.tolist()


def test_settings_of_packed_pairs_are_refused(tmp_path):
    with pytest.raises(UserError, match=r"^config\.data\.packed_source_length has no effect on a causal model"):
        build(tmp_path, Letters(), pairs("a>b"), packed_source_length=512, packed_target_length=128)


# The cache


def cached(path: str, cache: Path, tokenizer: Any, format: Any = FORMAT, **given: Any) -> Tokenized:
    data = Data(**{"max_seq_length": 300, "cache_dir": str(cache), **LENIENT, **given})
    (item,) = tokenize(Source(path), "config.data.train.0", data, tokenizer, format)
    return item


def test_the_cache_gives_back_tokens_and_masks(tmp_path):
    it = checkpoint("llama3")
    messages = [{"role": turn.role, "content": turn.text} for turn in TALK.turns]
    path = write(tmp_path / "a.jsonl", [{"messages": messages}, *pairs("a>", "é>漢")])
    wanted, counts = encoded([TALK, example("a", ""), example("é", "漢")], it, max_seq_length=300)
    for _ in range(2):
        item = cached(path, tmp_path / "cache", it)
        assert item.counts == counts and item.source_lengths.tolist() == [0, 0, 0]
        assert item.target_lengths.tolist() == [0 if one is None else len(one.target) for one in wanted]
        for number in (0, 2):
            found = item.example(number)
            assert found.target.tolist() == wanted[number].target.tolist() and found.target.dtype == np.int32
            assert found.loss_mask.tolist() == wanted[number].loss_mask.tolist() and not len(found.source)
        assert tokenized.eligible([item]).tolist() == [0, 2]


def test_whatever_decides_a_conversation_s_tokens_makes_another_cache(tmp_path):
    it, cache = checkpoint("qwen2_5"), tmp_path / "cache"
    path = write(tmp_path / "a.jsonl", pairs("a>b"))
    cached(path, cache, it)
    for number, given in enumerate(
        (
            {"train_on": "last"}, {"max_seq_length": 299}, {"truncate": "start"}, {"format": Seq2SeqFormat(0, 0)},
            {"tokenizer": chat.with_chat_template(it, "default")}, {"tokenizer": chat.with_chat_template(it, "none")},
        ), 2,
    ):  # fmt: skip
        cached(path, cache, **{"tokenizer": it, **given})
        assert len(list(cache.iterdir())) == number, given
    for same in ({"packing": False}, {"max_source_length": 7}, {"format": CausalFormat(1, True)}):
        cached(path, cache, **{"tokenizer": it, **same})
    assert len(list(cache.iterdir())) == 7


def test_conversations_that_the_chat_template_refuses_are_dropped_and_the_others_keep_their_order(tmp_path):
    it = checkpoint("qwen2_5")
    answers = ["a", "b<|im_end|>", "c", "d", "e<|im_end|>", "f"]
    rows = [{"prompt": f"q{i}", "completion": answer} for i, answer in enumerate(answers)]
    source = Source(write(tmp_path / "a.jsonl", rows))
    data = Data(cache_dir=str(tmp_path / "cache"), max_seq_length=100, on_invalid="drop", **LENIENT)
    (item,) = tokenize(source, "", data, it, FORMAT)
    assert (item.counts.examples, item.counts.invalid, item.counts.kept) == (6, 2, 4)
    assert [reason.split(": ")[0] for reason in sorted(item.counts.reasons)] == [
        f"{source.path}, line {n}" for n in (2, 5)
    ]
    texts = [it.text(item.example(i).target) for i in range(6)]
    assert [text.endswith(f"{answer}<|im_end|>\n") for text, answer in zip(texts, answers, strict=True)] == [
        True, False, True, True, False, True,
    ]  # fmt: skip
    (whole,) = tokenize(Source(write(tmp_path / "b.jsonl", [rows[i] for i in (0, 2, 3, 5)])), "", data, it, FORMAT)
    for name in ("examples", "invalid", "reasons"):
        setattr(item.counts, name, getattr(whole.counts, name))
    assert item.counts == whole.counts  # what was counted of the refused ones before is forgotten
    with pytest.raises(
        UserError, match=r"2 of 6 records are invalid: .*line 2: the assistant's turn .*; .*line 5: .*; fix them"
    ):
        tokenize(source, "", Data(**{**vars(data), "on_invalid": "error"}), it, FORMAT)
