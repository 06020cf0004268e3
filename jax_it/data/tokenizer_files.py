"""Tokenizers from a Transformers folder, a SentencePiece file, for bytes, or trained on the data."""

import base64
import io
import os
import re
import tempfile
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import tokenizers

from jax_it import hosts
from jax_it.data.tokenizer import Tokenizer
from jax_it.errors import Interrupted, UserError, first_line
from jax_it.files import check_regular, read_json_object


def load(path: str) -> Tokenizer:
    """Load the tokenizer of a folder or hub name, of a SentencePiece model file, or "bytes" (ByT5's)."""
    import transformers  # slow to import; `jax-it --help` does without

    if path == "bytes":
        return Tokenizer(transformers.ByT5Tokenizer(), path)
    if path.endswith(".model"):
        try:
            check_regular(Path(path))
            return _from_sentencepiece(Path(path).read_bytes(), path, extra_ids=100)
        except OSError as error:
            raise UserError(f"tokenizer {path} cannot be read: {error.strerror}") from None
    is_local = os.path.exists(path)
    if path.startswith(("/", ".", "~")) and not is_local:
        raise UserError(f"tokenizer {path} does not exist")
    try:
        if is_local:
            return _from_files(path)
        with hosts.first_then_others():  # one downloads it from the hub
            return _from_files(path)
    except (UserError, Interrupted):
        raise
    except BaseException as error:  # the libraries raise many types for a file that is not as it should be
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":  # of the library in Rust
            raise
        if os.path.isdir(path) and not any(_is_vocabulary(file) for file in os.listdir(path)):
            raise UserError(f"{path}/tokenizer.json is missing, and the folder has no other vocabulary") from None
        raise UserError(
            f"tokenizer {path!r} could not be loaded: {type(error).__name__}: {first_line(error)[:300]}"
        ) from error


def _is_vocabulary(file: str) -> bool:
    return file in ("tokenizer.json", "tekken.json", "merges.txt", "bpe.codes") or bool(
        re.fullmatch(r".*\.(model|spm|tiktoken)|vocab.*\.(json|txt)", file)
    )


def _from_files(path: str) -> Tokenizer:
    """Load the tokenizer of a folder, a tokenizer.json or a hub name with Transformers, without running its code.

    Without a vocabulary, or without tokenizer_config.json, Transformers may quietly build another tokenizer of the
    same class; that raises UserError.
    """
    import transformers

    config_file = _find(path, "tokenizer_config.json")
    config = read_json_object(config_file) if config_file else {}
    code = config.get("auto_map")
    if isinstance(code, dict):
        code = code.get("AutoTokenizer")
    if code is not None:
        raise UserError(
            f"{config_file}: auto_map names Python code of the tokenizer's own, which jax_it does not run; "
            "remove auto_map if a tokenizer_class of Transformers does the same"
        )
    backend = transformers.AutoTokenizer.from_pretrained(path, trust_remote_code=False)
    if not os.path.isfile(path):
        _check_complete(path, backend, config_file)
    found = Tokenizer(backend, path)
    found.encode_with_offsets(found.show(range(min(found.size, 9))))  # what is wrong with it shows here, if not later
    if not isinstance(backend.model_max_length, int | float):
        raise UserError(f"{config_file}: model_max_length is {backend.model_max_length!r}; it must be a number")
    return found


def _find(path: str, name: str) -> Path | None:
    """Return a file of a folder or hub repository, or None."""
    from transformers.utils import cached_file

    found = None if os.path.isfile(path) else cached_file(path, name, _raise_exceptions_for_missing_entries=False)
    return None if found is None else Path(found)


def _check_complete(path: str, backend: Any, config_file: Path | None) -> None:
    """Refuse a tokenizer in which Transformers has made up what missing files should say."""
    names = {key: name for key, name in type(backend).vocab_files_names.items() if key != "tokenizer_config_file"}
    if not backend.is_fast or not names:  # those in Python ask for their files; bytes need none
        return
    whole = next((file for name in _whole_files(config_file) if (file := _find(path, name))), None)
    if whole is None:
        parts = sorted(name for key, name in names.items() if key != "tokenizer_file")
        missing = [name for name in parts if _find(path, name) is None]
        converted = any(_find(path, name) for name in ("tokenizer.model", "tekken.json", "tiktoken.model"))
        if (missing or not parts) and not converted:
            also = f", and so is {' or '.join(missing)}" if missing else ""
            raise UserError(
                f"{path}/tokenizer.json is missing{also}: the tokenizer has no vocabulary; download it again"
            )
    elif config_file is None:
        own = tokenizers.Tokenizer.from_file(str(whole)).get_vocab_size(with_added_tokens=True)
        if len(backend) > own:
            raise UserError(
                f"{path}/tokenizer_config.json is missing: without it Transformers adds {len(backend) - own} tokens "
                "that are not in tokenizer.json; download it again"
            )


def _whole_files(config_file: Path | None) -> list[str]:
    """Return the names that a file with the whole tokenizer may have."""
    versions = read_json_object(config_file).get("fast_tokenizer_files") if config_file else None
    return ["tokenizer.json", *(name for name in versions or () if isinstance(name, str))]


def train(texts: Iterable[str], size: int) -> Tokenizer:
    """Train a SentencePiece unigram tokenizer of at most `size` ids, laid out as T5's: padding 0, end 1, unknown 2.

    Of several hosts the first trains it and sends it to the others.
    """
    model = hosts.from_first(lambda: base64.b64encode(_train(texts, size)).decode())
    return _from_sentencepiece(base64.b64decode(model), "train", extra_ids=0)


def _train(texts: Iterable[str], size: int) -> bytes:
    """Train and return a SentencePiece model file."""
    import sentencepiece

    lines = [line for text in texts for line in text.splitlines()]
    model = io.BytesIO()
    with tempfile.NamedTemporaryFile("w", suffix=".tsv", encoding="utf-8") as seeds:
        seeds.write("".join(f"{piece}\t{count}\n" for piece, count in _seed_pieces(lines, 10 * size)))
        seeds.flush()
        try:
            sentencepiece.SentencePieceTrainer.train(
                sentence_iterator=iter(lines), model_writer=model, vocab_size=size, hard_vocab_limit=False,
                model_type="unigram", seed_sentencepieces_file=seeds.name, character_coverage=1.0,
                pad_id=0, eos_id=1, unk_id=2, bos_id=-1, num_threads=1, minloglevel=2,
                max_sentence_length=1 << 30,  # bytes; it skips longer lines
            )  # fmt: skip
        except (RuntimeError, OSError) as error:
            reason = str(error).strip().splitlines()[-1]
            raise UserError(f"config.model.tokenizer_size: {size} pieces cannot be trained: {reason}") from None
    return model.getvalue()


def _seed_pieces(lines: Iterable[str], number: int) -> list[tuple[str, int]]:
    """Return the parts of words that occur most often, from which the pieces are chosen.

    SentencePiece's own seeds are what several different words share, so that with a small vocabulary no
    whole word ever becomes a piece.
    """
    words = Counter(f"▁{word}" for line in lines for word in line.split())
    seeds: Counter[str] = Counter()
    for word, count in words.items():
        for start in range(len(word)):
            for stop in range(start + 2, min(len(word), start + 16) + 1):
                seeds[word[start:stop]] += count
    # Longer pieces save more tokens; ties are broken by the text, so that training repeats itself.
    ranked = sorted(seeds.items(), key=lambda item: (-item[1] * len(item[0]), item[0]))
    return ranked[:number]


def _from_sentencepiece(model: bytes, source: str, extra_ids: int) -> Tokenizer:
    """Return Transformers' T5 tokenizer for a SentencePiece model, with T5's sentinels as the last ids."""
    import transformers
    from google.protobuf.message import DecodeError
    from sentencepiece import sentencepiece_model_pb2

    proto: Any = sentencepiece_model_pb2.ModelProto()  # type: ignore[attr-defined]
    try:
        proto.ParseFromString(model)
    except DecodeError:
        raise UserError(f"tokenizer {source} is not a SentencePiece model") from None
    pieces = [(piece.piece, piece.score) for piece in proto.pieces]
    if proto.trainer_spec.model_type != proto.trainer_spec.UNIGRAM or proto.trainer_spec.byte_fallback:
        raise UserError(f"tokenizer {source} is not a plain unigram model like T5's; give a tokenizer folder")
    if [piece for piece, _ in pieces[:3]] != ["<pad>", "</s>", "<unk>"]:
        raise UserError(
            f"tokenizer {source} does not begin with <pad>, </s>, <unk> as T5's does; give a tokenizer folder"
        )
    sentinels = [f"<extra_id_{i}>" for i in reversed(range(extra_ids))]
    backend = transformers.T5Tokenizer(
        vocab=pieces + [(piece, 0.0) for piece in sentinels],
        extra_ids=extra_ids,
        additional_special_tokens=sentinels,
        _spm_precompiled_charsmap=proto.normalizer_spec.precompiled_charsmap or None,
    )
    return Tokenizer(backend, source)
