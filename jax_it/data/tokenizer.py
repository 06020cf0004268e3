"""Tokenizers: that of a Transformers folder, a SentencePiece file, bytes, or one trained on the data."""

import hashlib
import io
import tempfile
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from jax_it.errors import UserError


class Tokenizer:
    """Text to token ids and back, without the marks that templates and formats add.

    `end` closes a text, `pad` fills rows, `unknown` stands for what the vocabulary lacks (None where
    nothing is lacking, as with bytes). `size` is the number of ids.
    """

    def __init__(self, backend: Any, source: str):
        if backend.eos_token_id is None or backend.pad_token_id is None:
            raise UserError(f"tokenizer {source} has no end-of-text or no padding token; jax_it needs both")
        self.backend = backend
        self.end: int = backend.eos_token_id
        self.pad: int = backend.pad_token_id
        self.unknown: int | None = backend.unk_token_id if backend.is_fast else None
        self.size: int = len(backend)

    def encode(self, texts: Sequence[str]) -> list[list[int]]:
        return self.backend(list(texts), add_special_tokens=False, verbose=False)["input_ids"] if texts else []

    def decode(self, tokens: Iterable[int]) -> str:
        """The text, without padding and end marks."""
        return self.backend.decode(list(tokens), skip_special_tokens=True)

    def show(self, tokens: Iterable[int]) -> list[str]:
        """The pieces, special ones included, for people to read."""
        return self.backend.convert_ids_to_tokens([int(token) for token in tokens])

    def digest(self) -> str:
        """A hash of everything that decides `encode`."""
        if self.backend.is_fast:
            text = self.backend.backend_tokenizer.to_str()
        else:
            text = f"{self.backend!r} {sorted(self.backend.get_vocab().items())}"
        return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()

    def save(self, folder: Path) -> None:
        self.backend.save_pretrained(folder)


def load(path: str) -> Tokenizer:
    """The tokenizer of a folder or hub name, a SentencePiece model file, or "bytes" (ByT5's)."""
    import transformers  # slow to import; `jax-it --help` does without

    if path == "bytes":
        return Tokenizer(transformers.ByT5Tokenizer(), path)
    if path.endswith(".model"):
        try:
            return _from_sentencepiece(Path(path).read_bytes(), path, extra_ids=100)
        except OSError as error:
            raise UserError(f"tokenizer {path} cannot be read: {error.strerror}") from None
    if path.startswith(("/", ".", "~")) and not Path(path).exists():
        raise UserError(f"tokenizer {path} does not exist")
    try:
        return Tokenizer(transformers.AutoTokenizer.from_pretrained(path), path)
    except UserError:
        raise
    except Exception as error:  # the libraries raise many types for a file that is not as it should be
        reason = [*str(error).strip().splitlines(), ""][0]
        raise UserError(f"tokenizer {path!r} could not be loaded: {type(error).__name__}: {reason}") from error


def train(texts: Iterable[str], size: int) -> Tokenizer:
    """A SentencePiece unigram tokenizer of at most `size` ids, laid out as T5's: padding 0, end 1, unknown 2."""
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
    return _from_sentencepiece(model.getvalue(), "train", extra_ids=0)


def _seed_pieces(lines: Iterable[str], number: int) -> list[tuple[str, int]]:
    """The beginnings of words, and their inner parts, that occur most often: what pieces are chosen from.

    SentencePiece's own seeds are what several different words share, so that on a small vocabulary no
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
    """Transformers' T5 tokenizer of a SentencePiece model, with T5's sentinels as the last ids."""
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
        raise UserError(f"tokenizer {source} is no plain unigram model as T5's; give a tokenizer folder")
    if [piece for piece, _ in pieces[:3]] != ["<pad>", "</s>", "<unk>"]:
        raise UserError(f"tokenizer {source} does not begin with <pad>, </s>, <unk> as T5's; give a tokenizer folder")
    sentinels = [f"<extra_id_{i}>" for i in reversed(range(extra_ids))]
    backend = transformers.T5Tokenizer(
        vocab=pieces + [(piece, 0.0) for piece in sentinels],
        extra_ids=extra_ids,
        additional_special_tokens=sentinels,
        _spm_precompiled_charsmap=proto.normalizer_spec.precompiled_charsmap or None,
    )
    return Tokenizer(backend, source)
