import json
from pathlib import Path

import pytest
import sentencepiece
from sentencepiece import sentencepiece_model_pb2

from jax_it.data import builtin, tokenizer
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
    with pytest.raises(UserError, match=r"^tokenizer gpt2 has no end-of-text token; jax_it needs one$"):
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
        ({"model_type": "bpe", **MARKS}, "is no plain unigram model as T5's"),
        ({"byte_fallback": True, **MARKS}, "is no plain unigram model as T5's"),
        ({}, "does not begin with <pad>, </s>, <unk> as T5's"),
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
