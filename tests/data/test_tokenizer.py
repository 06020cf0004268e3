import itertools
import json
import os
import random
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import sentencepiece
from sentencepiece import sentencepiece_model_pb2

from jax_it.data import builtin
from jax_it.data import tokenizer_files as tokenizer
from jax_it.data.tokenizer import Tokenizer
from jax_it.errors import UserError
from tests.data.chat_tokenizers import Kind, made

SIZE = 400
TEXTS = [text for row in builtin.records("test") for text in (row["prompt"], row["completion"])]
ODD = ["", " ", "  two  spaces ", "line\nbreak\ttab", "ﬁne Ⅳ ½ café", "e\u0301", "…", "a\u00a0b\u3000c", "x" * 300]
MARKS = {"pad_id": 0, "eos_id": 1, "unk_id": 2, "bos_id": -1}  # as T5 has them


@pytest.fixture(scope="module")
def trained() -> Tokenizer:
    return tokenizer.train(TEXTS, SIZE)


@pytest.fixture(scope="module")
def model_file(trained: Tokenizer, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What SentencePiece alone makes of the same texts: a model file as T5's, to load by its name."""
    path = tmp_path_factory.mktemp("spm") / "spiece.model"
    with path.open("wb") as file:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(TEXTS), model_writer=file, vocab_size=300, character_coverage=1.0,
            num_threads=1, minloglevel=2, **MARKS,
        )  # fmt: skip
    return path


def test_the_marks_are_where_t5_has_them(trained):
    assert (trained.pad, trained.end, trained.unknown) == (0, 1, 2)
    assert trained.show([0, 1, 2]) == ["<pad>", "</s>", "<unk>"]


def test_a_trained_tokenizer_has_at_most_the_ids_asked_for_and_few_where_the_text_is_short(trained):
    assert 0.9 * SIZE < trained.size <= SIZE
    assert tokenizer.train(["abc abc"], 100).size <= 12
    assert max(max(ids) for ids in trained.encode(TEXTS)) < trained.size


def test_a_trained_tokenizer_gives_back_the_text_it_was_trained_on(trained):
    encoded = trained.encode(TEXTS)
    assert [trained.decode(ids) for ids in encoded] == TEXTS
    assert not any({trained.pad, trained.end, trained.unknown} & set(ids) for ids in encoded)
    assert trained.decode([*encoded[0], trained.end, trained.pad, trained.pad]) == TEXTS[0]


def test_whole_words_become_pieces(trained):
    pieces = trained.show(range(trained.size))
    assert sum(piece.startswith("▁") and len(piece) > 4 for piece in pieces) > 100
    assert sum(map(len, trained.encode(TEXTS))) < 2 * sum(len(text.split()) for text in TEXTS)


def test_two_trainings_give_the_same_tokenizer(trained):
    again = tokenizer.train(iter(TEXTS), SIZE)
    assert again.digest() == trained.digest() and again.encode(TEXTS) == trained.encode(TEXTS)
    assert tokenizer.train(TEXTS[1:], SIZE).digest() != trained.digest()


def test_a_tokenizer_that_is_saved_and_loaded_is_the_same(trained, tmp_path):
    trained.save(tmp_path / "tokenizer")
    loaded = tokenizer.load(str(tmp_path / "tokenizer"))
    assert loaded.encode(TEXTS + ODD) == trained.encode(TEXTS + ODD)
    assert loaded.digest() == trained.digest()
    assert (loaded.pad, loaded.end, loaded.unknown, loaded.size) == (0, 1, 2, trained.size)
    loaded.save(tmp_path / "again")
    assert tokenizer.load(str(tmp_path / "again")).digest() == trained.digest()


def test_a_sentencepiece_file_gives_sentencepiece_s_own_ids(model_file):
    """As T5 has it: the model's pieces, then a hundred sentinels. SentencePiece itself is the reference."""
    reference = sentencepiece.SentencePieceProcessor(model_file=str(model_file))
    loaded = tokenizer.load(str(model_file))
    texts = [*TEXTS, *ODD, "漢字 and words", "ünknöwn {x}"]
    assert loaded.encode(texts) == reference.encode(texts)
    assert [loaded.decode(ids) for ids in loaded.encode(TEXTS)] == reference.decode(reference.encode(TEXTS))
    assert loaded.size == reference.get_piece_size() + 100
    assert loaded.show([loaded.size - 1]) == ["<extra_id_0>"] and loaded.unknown == reference.unk_id() == 2
    assert loaded.encode(["漢"])[0].count(2) == 1


def test_a_trained_tokenizer_segments_as_sentencepiece_does_with_its_pieces(trained, model_file):
    proto = sentencepiece_model_pb2.ModelProto.FromString(model_file.read_bytes())
    del proto.pieces[3:]
    for piece, score in json.loads(trained.backend.backend_tokenizer.to_str())["model"]["vocab"][3:]:
        proto.pieces.add(piece=piece, score=score)
    reference = sentencepiece.SentencePieceProcessor(model_proto=proto.SerializeToString())
    assert trained.encode(TEXTS + ODD) == reference.encode(TEXTS + ODD)


def test_long_lines_are_trained_on_too():
    made = tokenizer.train(["abc " * 3000 + "xyz", "abc abc"], 30)
    assert made.unknown not in made.encode(["xyz"])[0]


def test_bytes_are_byt5_s():
    made = tokenizer.load("bytes")
    text = "def f(x):\n\treturn {x: 'é 漢'}"
    assert made.encode([text, ""]) == [[byte + 3 for byte in text.encode()], []]
    assert made.decode(made.encode([text])[0]) == text
    assert (made.pad, made.end, made.unknown, made.size) == (0, 1, None, 384)
    assert made.digest() == tokenizer.load("bytes").digest()


def test_digests_of_different_tokenizers_differ(trained, model_file):
    others = [tokenizer.load("bytes"), tokenizer.load(str(model_file)), tokenizer.train(TEXTS, SIZE - 50)]
    assert len({trained.digest(), *(other.digest() for other in others)}) == 4


def test_no_text_gives_no_ids(trained):
    assert trained.encode([]) == [] and trained.encode([""]) == [[]] and trained.decode([]) == ""


def test_a_tokenizer_without_padding_pads_with_its_end_mark_and_names_no_end_mark_unknown():
    backend = made(Kind("gpt2", "<|endoftext|>", (), "<|endoftext|>"), None).backend
    backend.unk_token = "<|endoftext|>"
    found = Tokenizer(backend, "gpt2")
    assert (found.pad, found.end, found.unknown, found.start) == (0, 0, None, None) and found.chat_template is None
    assert made(Kind("llama3", "<e>", (), "<b>", True), None).start == 0
    backend.eos_token = None
    with pytest.raises(UserError, match=r"^tokenizer gpt2 has no end token \(eos_token\); jax_it needs one$"):
        Tokenizer(backend, "gpt2")


# What cannot be used


def refusal(path: Path | str) -> str:
    with pytest.raises(UserError) as caught:
        tokenizer.load(str(path))
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("content", [b"", b"hello", b"\x00" * 100, bytes(range(256)) * 20])
def test_a_file_that_is_no_sentencepiece_model_is_refused(tmp_path, content):
    path = tmp_path / "x.model"
    path.write_bytes(content)
    found = refusal(path)
    assert found.startswith(f"tokenizer {path} ") and ("is not a SentencePiece model" in found or "<pad>" in found)


def test_a_truncated_sentencepiece_model_is_refused(model_file, tmp_path):
    path = tmp_path / "half.model"
    path.write_bytes(model_file.read_bytes()[:3000])
    assert refusal(path) == f"tokenizer {path} is not a SentencePiece model"


@pytest.mark.parametrize(
    "options, message",
    [
        ({"model_type": "bpe", **MARKS}, "is not a plain unigram model like T5's"),
        ({"byte_fallback": True, **MARKS}, "is not a plain unigram model like T5's"),
        ({}, "does not begin with <pad>, </s>, <unk> as T5's does"),
    ],
)  # fmt: skip
def test_a_sentencepiece_model_of_another_kind_is_refused_rather_than_read_wrongly(tmp_path, options, message):
    path = tmp_path / "other.model"
    with path.open("wb") as file:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(TEXTS), model_writer=file, vocab_size=400, minloglevel=2, num_threads=1, **options
        )
    assert refusal(path) == f"tokenizer {path} {message}; give a tokenizer folder"


def test_an_absent_tokenizer_is_refused(tmp_path):
    assert refusal(tmp_path / "a.model") == f"tokenizer {tmp_path}/a.model cannot be read: No such file or directory"
    os.mkfifo(tmp_path / "pipe.model")
    assert refusal(tmp_path / "pipe.model") == f"tokenizer {tmp_path}/pipe.model cannot be read: Not a regular file"
    assert refusal(tmp_path / "folder") == f"tokenizer {tmp_path}/folder does not exist"
    assert refusal("./absent") == "tokenizer ./absent does not exist"
    assert refusal("no-such-org/no-such-tokenizer").startswith("tokenizer 'no-such-org/no-such-tokenizer' could not be")


def test_a_damaged_tokenizer_folder_is_refused(trained, tmp_path):
    trained.save(tmp_path)
    (tmp_path / "tokenizer.json").write_text((tmp_path / "tokenizer.json").read_text()[:2000])
    assert refusal(tmp_path).startswith(f"tokenizer '{tmp_path}' could not be loaded: ")
    (tmp_path / "tokenizer.json").write_text("{}")
    assert refusal(tmp_path).startswith(f"tokenizer '{tmp_path}' could not be loaded: ")


@pytest.mark.parametrize("texts, size", [(TEXTS, 20), ([], 100), ([""], 100)])
def test_training_that_cannot_be_done_is_refused_with_the_name_of_the_setting(texts, size):
    with pytest.raises(UserError, match=rf"^config\.model\.tokenizer_size: {size} pieces cannot be trained: "):
        tokenizer.train(texts, size)


# Folders that are not as they should be


@pytest.fixture(scope="module")
def saved(trained, tmp_path_factory) -> dict[str, Path]:
    """Tokenizer folders, by the class that Transformers makes of them."""
    folders = {
        "t5": trained,
        "gpt2": made(Kind("gpt2", "<|endoftext|>"), None),
        "llama": made(Kind("gemma", "<e>"), None),
    }
    for name, one in folders.items():
        one.save(tmp_path_factory.getbasetemp() / f"saved_{name}")
    return {name: tmp_path_factory.getbasetemp() / f"saved_{name}" for name in folders}


def changed(folder: Path, file: str, **values) -> None:
    (folder / file).write_text(json.dumps(json.loads((folder / file).read_text()) | values))


@pytest.mark.parametrize("name", ["t5", "gpt2", "llama"])
@pytest.mark.parametrize("model_type", [None, "t5", "llama", "gpt2"])
@pytest.mark.parametrize("lost", ["tokenizer.json", "tokenizer_config.json"])
def test_a_lost_file_is_never_replaced_by_another_vocabulary(name, model_type, lost, saved, tmp_path):
    folder = shutil.copytree(saved[name], tmp_path / "folder")
    if model_type:
        (folder / "config.json").write_text(json.dumps({"model_type": model_type}))
    whole = tokenizer.load(str(folder))
    (folder / lost).unlink()
    try:
        found = tokenizer.load(str(folder))
    except UserError as error:
        assert "\n" not in str(error) and str(folder) in str(error)
        assert lost == "tokenizer_config.json" or f"{folder}/tokenizer.json is missing" in str(error)
    else:  # without its configuration a vocabulary may be complete
        assert lost == "tokenizer_config.json" and found.encode(TEXTS) == whole.encode(TEXTS)
        assert (found.end, found.size) == (whole.end, whole.size)


def test_the_older_files_of_a_vocabulary_are_enough_if_all_are_there(saved, tmp_path):
    whole = tokenizer.load(str(saved["gpt2"]))
    model = json.loads((saved["gpt2"] / "tokenizer.json").read_text())["model"]
    (tmp_path / "vocab.json").write_text(json.dumps(model["vocab"]))
    (tmp_path / "merges.txt").write_text("".join(" ".join(merge) + "\n" for merge in model["merges"]))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "GPT2Tokenizer"}))
    assert tokenizer.load(str(tmp_path)).encode(TEXTS) == whole.encode(TEXTS)
    (tmp_path / "merges.txt").unlink()
    assert "`merges`" in refusal(tmp_path)


@pytest.mark.parametrize(
    "auto_map", [{"AutoTokenizer": ["evil.Evil", None]}, ["evil.Evil", None], {"AutoTokenizer": "x"}]
)
def test_a_folders_python_is_never_run_nor_asked_about(auto_map, saved, tmp_path, monkeypatch):
    monkeypatch.setattr("builtins.input", lambda *_: "y")
    folder = shutil.copytree(saved["t5"], tmp_path / "folder")
    (folder / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\nclass Evil: pass\n")
    changed(folder, "tokenizer_config.json", auto_map=auto_map, tokenizer_class="Evil")
    assert f"{folder}/tokenizer_config.json: auto_map names Python code" in refusal(folder)
    shutil.copy(saved["t5"] / "tokenizer_config.json", folder)
    code = {"AutoConfig": "evil.Evil", "AutoModelForCausalLM": "evil.Evil"}
    (folder / "config.json").write_text(json.dumps({"model_type": "evil", "auto_map": code}))
    assert tokenizer.load(str(folder)).encode(TEXTS) and not (tmp_path / "ran").exists()


ODD_VALUES: list[Any] = [
    None, True, 0, -1, 10**30, 10**400, float("nan"), "", "x", "\ud800", "a\nb", "<unk>", [], ["a"], [1], {}, {"a": 1},
    {"content": "x"}, {"content": 3}, [[]], {"default": 3}, [{"name": "default", "template": "x"}], "../x",
    "LlamaTokenizer", "BertTokenizer",
]  # fmt: skip
FIELDS = """tokenizer_class eos_token bos_token unk_token pad_token chat_template model_max_length extra_ids
    added_tokens_decoder additional_special_tokens extra_special_tokens auto_map add_bos_token legacy vocab merges
    fast_tokenizer_files vocab_file tokenizer_file init_inputs errors model_input_names backend padding_side""".split()


@pytest.mark.parametrize("seed", [0, 1])
def test_any_value_of_any_field_of_a_tokenizer_is_used_or_refused_in_one_line(seed, saved, tmp_path):
    random = np.random.default_rng(seed)
    for number in range(40):
        folder = shutil.copytree(saved[("t5", "gpt2")[number % 2]], tmp_path / str(number))
        if random.random() < 0.7:
            odd = {str(field): ODD_VALUES[random.integers(len(ODD_VALUES))] for field in random.choice(FIELDS, 2)}
            changed(folder, "tokenizer_config.json", **odd)
        else:
            part = str(random.choice(["model", "normalizer", "pre_tokenizer", "decoder", "added_tokens", "version"]))
            odd = {part: ODD_VALUES[random.integers(len(ODD_VALUES))]}
            changed(folder, "tokenizer.json", **odd)
        try:
            found = tokenizer.load(str(folder))
        except UserError as error:
            assert "\n" not in str(error) and len(str(error)) < 1000, odd
            continue
        ids = found.encode(["Hello world", "a\nb", "", "漢"])
        assert all(0 <= id < found.size for id in [*itertools.chain(*ids), found.end, found.pad]), odd
        found.save(folder / "again")
        assert tokenizer.load(str(folder / "again")).encode(["Hello world", "a\nb", "", "漢"]) == ids, odd


def test_characters_that_become_unknown_are_told_from_those_that_are_lost():
    made = tokenizer.train(["abc cab bca"] * 20, 20)
    assert made.unknown_of(set("abé漢\n ")) == {"é", "漢"} and made.lost(set("abé漢\n")) == {"\n"}
    assert tokenizer.load("bytes").unknown_of(set("é漢")) == set()


def test_words_that_are_encoded_once_give_what_the_whole_text_does(trained):
    """T5's tokenizers split texts at spaces, so that words can be remembered."""
    assert trained._words is not None
    pieces = [
        *"aé漢😀", " ", "  ", "\n", "\t", "\r\n", "\u00a0", "\u3000", "\u0301", "\u200d", "\u200b", "\ufeff", "\x1c",
        "\x0b", "\ufb01", "</s>", "<unk>", "▁", "the", "cup", "\u0600", "\U0001f3fd", "\uff9e", "x" * 40,
    ]  # fmt: skip
    chance = random.Random(0)
    texts = ["".join(chance.choices(pieces, k=chance.randint(0, 12))) for _ in range(3000)]
    for start in range(0, len(texts), 100):
        part = texts[start : start + 100]
        assert trained.encode(part) == trained._encode(part)


def test_encoding_a_short_text_does_not_go_through_all_words_that_are_known(trained):
    class LookedUp(dict):
        def __iter__(self):
            raise AssertionError("all known words are gone through")

        keys = values = items = __iter__

    words = type(trained._words)(trained._plain, ())
    words._known = LookedUp()
    for text in ("the cup", "a cup"):
        assert words.encode([text]) == trained._encode([text])
    assert len(words._known) == 3
