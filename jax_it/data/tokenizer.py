"""Tokenizers: from a Transformers folder, a SentencePiece file, for bytes, or trained on the data."""

import base64
import copy
import hashlib
import io
import os
import re
import tempfile
from collections import Counter
from collections.abc import Iterable, Sequence, Set
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers

from jax_it import hosts
from jax_it.errors import Interrupted, UserError, first_line
from jax_it.files import check_regular, read_json_object


class Tokenizer:
    """Turns text into token ids and back, without the special tokens that templates and formats add.

    `start` begins a text where the tokenizer adds such a token by itself (Llama, Gemma), `end` closes it, `pad` fills
    rows (the end token, where there is no other: segments tell padding apart), `unknown` replaces what the vocabulary
    lacks (None where it lacks nothing, as with bytes). All ids are below `size`.
    """

    def __init__(self, backend: Any, source: str):
        if backend.eos_token_id is None:
            raise UserError(f"tokenizer {source} has no end-of-text token; jax_it needs one")
        templates = backend.chat_template
        templates = templates if isinstance(templates, dict) else {"default": templates}
        if not all(isinstance(template, str | None) for template in templates.values()):
            raise UserError(f"tokenizer {source}: chat_template must be Jinja text, or several by name")
        self.backend = backend
        self.name = self.template_name = source
        self.end: int = backend.eos_token_id
        self.pad: int = self.end if backend.pad_token_id is None else backend.pad_token_id
        unknown = backend.unk_token_id
        # Byte-level tokenizers name another special token as the unknown one, and never produce it.
        self.unknown: int | None = (
            unknown if backend.is_fast and unknown not in (self.end, backend.bos_token_id) else None
        )
        start = backend.bos_token_id
        self.start: int | None = start if start is not None and backend("a")["input_ids"][:1] == [start] else None
        self.size: int = max(len(backend), 1 + max(backend.get_vocab().values(), default=-1))  # there may be gaps

    @property
    def chat_template(self) -> str | None:
        """The Jinja text that renders conversations, or None."""
        template = self.backend.chat_template
        return template.get("default") if isinstance(template, dict) else template

    def with_chat_template(self, template: str | None, name: str) -> "Tokenizer":
        """Return this tokenizer with another chat template, or with none; `name` is the template's in messages."""
        backend = copy.copy(self.backend)
        backend.chat_template = template
        changed = Tokenizer(backend, self.name)
        changed.template_name = name
        return changed

    @cached_property
    def added_texts(self) -> frozenset[str]:
        """The texts that are one token wherever they occur: special tokens, and others that were added."""
        added = self.backend.added_tokens_decoder.values()
        return frozenset({*(token.content for token in added), *self.backend.all_special_tokens})

    @cached_property
    def special(self) -> frozenset[int]:
        """The ids of special tokens."""
        return frozenset(self.backend.all_special_ids).union(
            id for id, token in self.backend.added_tokens_decoder.items() if token.special
        )

    def encode(self, texts: Sequence[str]) -> list[list[int]]:
        return self.backend(list(texts), add_special_tokens=False, verbose=False)["input_ids"] if texts else []

    def lost(self, characters: Set[str]) -> set[str]:
        """Return those characters that leave no token of their own: T5's tokenizer turns line breaks into spaces.

        If " " is among them, "  " stands for a space after another.
        """
        return self._of_kind("lost", characters | ({"  "} if " " in characters else set()))

    def unknown_of(self, characters: Set[str]) -> set[str]:
        """Return those characters that become unknown tokens."""
        return self._of_kind("unknown", characters)

    def _of_kind(self, kind: str, characters: Set[str]) -> set[str]:
        new = sorted(characters - self._kinds.keys())
        # Each is encoded between letters of which one is known, whatever the script.
        between = next((x for x in ["a", "e", "0", *new] if self._is_known(x)), None) if new else None
        if between is not None:
            nothing, space = self.encode([between * 2, f"{between} {between}"])
            found = self.encode([f"{between}{character}{between}" for character in new])
            for character, tokens in zip(new, found, strict=True):
                is_lost = character != " " and tokens in (nothing, space)
                self._kinds[character] = "lost" if is_lost else "unknown" if self.unknown in tokens else ""
        return {character for character in characters if self._kinds.get(character) == kind}

    def _is_known(self, character: str) -> bool:
        (tokens,) = self.encode([character])
        return character.isalnum() and bool(tokens) and self.unknown not in tokens

    @cached_property
    def _kinds(self) -> dict[str, str]:
        """What becomes of the characters seen so far: "lost", "unknown", or "" where they keep a token of their own."""
        return {}

    def encode_with_offsets(self, texts: Sequence[str]) -> list[tuple[np.ndarray, np.ndarray]] | None:
        """Return the ids [n] of each text, as `encode` does, and the offsets [n, 2] of each token in characters.

        Returns None where the tokenizer has no offsets.
        """
        if not self.backend.is_fast:
            return None
        encodings = self._plain.encode_batch(list(texts), add_special_tokens=False)
        return [(np.array(item.ids, np.int32), np.array(item.offsets, np.int64).reshape(-1, 2)) for item in encodings]

    @cached_property
    def _plain(self) -> tokenizers.Tokenizer:
        """The tokenizer without its post-processor, which shortens the offsets of tokens that begin with a space."""
        plain = tokenizers.Tokenizer.from_str(self.backend.backend_tokenizer.to_str())
        plain.post_processor = None
        plain.no_padding()
        plain.no_truncation()
        return plain

    def decode(self, tokens: Iterable[int]) -> str:
        """Return the text without special tokens."""
        return self.backend.decode(list(tokens), skip_special_tokens=True)

    def text(self, tokens: Iterable[int]) -> str:
        """Return the text with special tokens."""
        return self.backend.decode(list(tokens), skip_special_tokens=False, clean_up_tokenization_spaces=False)

    def id_of(self, piece: str, where: str) -> int:
        """Return the id of a piece. Raises UserError where there is none of this name."""
        found = self.backend.convert_tokens_to_ids(piece)
        if found is None or (found == self.backend.unk_token_id and piece != self.backend.unk_token):
            raise UserError(f"{where}: the tokenizer has no token {piece!r}; name one of its pieces")
        return int(found)

    def show(self, tokens: Iterable[int]) -> list[str]:
        """Return the pieces, special tokens included, for people to read."""
        return self.backend.convert_ids_to_tokens([int(token) for token in tokens])

    def digest(self) -> str:
        """Return a hash of everything that decides how texts and conversations become ids."""
        if self.backend.is_fast:
            text = self.backend.backend_tokenizer.to_str()
        else:
            text = f"{self.backend!r} {sorted(self.backend.get_vocab().items())}"
        around = (self.start, self.end, self.pad, self.backend.special_tokens_map, self.chat_template)
        return hashlib.blake2b(f"{around} {text}".encode(), digest_size=16).hexdigest()

    def save(self, folder: Path) -> None:
        self.backend.save_pretrained(folder)


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
        with hosts.first_then_others():  # one fetches it from the hub
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
            raise UserError(f"{path}/tokenizer.json is missing{also}: the tokenizer has no vocabulary; fetch it again")
    elif config_file is None:
        own = tokenizers.Tokenizer.from_file(str(whole)).get_vocab_size(with_added_tokens=True)
        if len(backend) > own:
            raise UserError(
                f"{path}/tokenizer_config.json is missing: without it Transformers adds {len(backend) - own} tokens "
                "that are not in tokenizer.json; fetch it again"
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
