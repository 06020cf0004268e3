"""A tokenizer, which turns text into token ids and back."""

import copy
import hashlib
import itertools
import json
import re
from collections.abc import Iterable, Sequence, Set
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import regex
import tokenizers

from jax_it.errors import UserError


class Tokenizer:
    """Turns text into token ids and back, without the special tokens that templates and formats add.

    `start` begins a text where the tokenizer adds such a token by itself (Llama, Gemma), `end` closes it, `pad` fills
    rows (the end token if there is none for that: segments tell padding apart), `unknown` replaces what the vocabulary
    lacks (None where it lacks nothing, as with bytes). All ids are below `size`.
    """

    def __init__(self, backend: Any, source: str):
        if backend.eos_token_id is None:
            raise UserError(f"tokenizer {source} has no end token (eos_token); jax_it needs one")
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

    def with_new_tokens(self, tokens: Sequence[str], where: str) -> "Tokenizer":
        """Return this tokenizer with tokens added as Transformers' `add_tokens` does: they are not special.

        Raises UserError, which names the setting `where`, for one that is empty, listed twice, or known already.
        """
        vocabulary = self.backend.get_vocab()
        for number, token in enumerate(tokens):
            if not token.strip():
                raise UserError(f"{where}.{number}: {token!r} is blank; leave it out")
            if token in tokens[:number]:
                raise UserError(f"{where}.{number}: {token!r} is listed twice; leave one out")
            if token in vocabulary:
                id = vocabulary[token]
                raise UserError(
                    f"{where}.{number}: {token!r} is in the vocabulary already, as token {id}; leave it out"
                )
        if not tokens:
            return self
        backend = copy.deepcopy(self.backend)
        backend.add_tokens(list(tokens))
        made = Tokenizer(backend, self.name)
        made.template_name = self.template_name
        for number, (token, found) in enumerate(zip(tokens, made.ids_of(tokens), strict=True)):
            if found not in made.encode([token])[0]:
                raise UserError(
                    f"{where}.{number}: the tokenizer cuts {token!r} up although it was added; choose another text"
                )
        return made

    def ids_of(self, tokens: Sequence[str]) -> tuple[int, ...]:
        """Return the ids of tokens that the vocabulary has."""
        return tuple(int(id) for id in self.backend.convert_tokens_to_ids(list(tokens)))

    @cached_property
    def added_texts(self) -> frozenset[str]:
        """The texts that are one token wherever they occur: special tokens, and others that were added."""
        added = self.backend.added_tokens_decoder.values()
        return frozenset({*(token.content for token in added), *self.backend.all_special_tokens})

    @cached_property
    def byte_tokens(self) -> frozenset[int]:
        """The ids of tokens that are a single byte each, such as Llama 2's `<0x0A>`."""
        found = self.backend.convert_tokens_to_ids([f"<0x{byte:02X}>" for byte in range(256)])
        return frozenset(found) - {self.backend.unk_token_id, None}

    @cached_property
    def special(self) -> frozenset[int]:
        """The ids of special tokens."""
        return frozenset(self.backend.all_special_ids).union(
            id for id, token in self.backend.added_tokens_decoder.items() if token.special
        )

    def encode(self, texts: Sequence[str]) -> list[list[int]]:
        if self._words is None or not texts:
            return self._encode(texts)
        return self._words.encode(texts)

    def _encode(self, texts: Sequence[str]) -> list[list[int]]:
        return self.backend(list(texts), add_special_tokens=False, verbose=False)["input_ids"] if texts else []

    @cached_property
    def _words(self) -> "_Words | None":
        """Encodes word by word, where the tokenizer does so itself (T5's); None for others."""
        if not self.backend.is_fast or not _splits_at_spaces(json.loads(self.backend.backend_tokenizer.to_str())):
            return None
        words = _Words(self._plain, self.added_texts)
        probes = [
            "It's  a test,\tof 3.5 words \n and é ü ﬁ ①.\n",
            " x",
            "",
            "a\r\nb\rc",
            "The the THE <b>x</b> 漢字 a-b",
        ]
        return words if words.encode(probes) == self._encode(probes) else None

    def lost(self, characters: Set[str]) -> set[str]:
        """Return those characters that leave no token of their own: T5's tokenizer turns line breaks into spaces.

        If " " is among them, "  " means a space that follows another.
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


def _splits_at_spaces(tree: dict[str, Any]) -> bool:
    """Return whether a tokenizer of this description encodes the words between spaces one by one, as T5's does."""
    normalizer = tree["normalizer"] or {"type": "Precompiled"}
    splitter = tree["pre_tokenizer"] or {}
    parts = splitter.get("pretokenizers", [])
    return (
        normalizer["type"] == "Precompiled"  # works on characters with the marks that follow them
        and [part["type"] for part in parts] == ["WhitespaceSplit", "Metaspace"]
        and parts[1]["prepend_scheme"] == "always"
        and tree["model"]["type"] == "Unigram"
    )


class _Words:
    """Encodes texts word by word, each word once: words are few, and occur again and again."""

    # Marks that may form one character with the space beside them, and control characters that may not be spaces.
    _JOINING = regex.compile(
        r"[\p{M}\p{Cf}\p{GCB=Extend}\p{GCB=SpacingMark}\p{GCB=Prepend}\p{GCB=ZWJ}\x00-\x08\x0b\x0c\x0e-\x1f]"
    )
    _PLAIN_ASCII = bytes({9, 10, 13, *range(32, 128)})
    _MOST = 1 << 18  # words that are kept, of at most 32 characters

    def __init__(self, backend: tokenizers.Tokenizer, added: Iterable[str]):
        self._backend = backend
        self._added = re.compile("|".join(re.escape(text) for text in sorted(added, key=len, reverse=True)) or "(?!)")
        self._known: dict[str, list[int]] = {}

    def encode(self, texts: Sequence[str]) -> list[list[int]]:
        split = [self._split(text) for text in texts]
        # Not `set(…) - keys()`, which goes through all words that are known: few-shot prompts come one by one.
        new = [word for word in set(itertools.chain.from_iterable(split)) if word not in self._known]
        found = self._backend.encode_batch_fast(new, add_special_tokens=False)
        self._known.update((word, item.ids) for word, item in zip(new, found, strict=True))
        known = self._known.__getitem__
        encoded = [list(itertools.chain.from_iterable(map(known, words))) for words in split]
        if len(self._known) > self._MOST:
            self._known.clear()
        else:
            for word in new:
                if len(word) > 32:
                    del self._known[word]
        return encoded

    def _split(self, text: str) -> list[str]:
        if self._added.search(text):  # it may take the spaces beside it
            return [text]
        if text.isascii():
            return [text] if text.encode().translate(None, self._PLAIN_ASCII) else text.split()
        return [text] if self._JOINING.search(text) else text.replace("\n", " ").split(" ")
