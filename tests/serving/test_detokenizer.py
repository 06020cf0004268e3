"""Text of growing tokens: the parts together are the whole, and no part is taken back."""

import pytest

from jax_it.serving.detokenizer import Detokenizer
from tests.data.chat_tokenizers import checkpoint


def parts(pieces: list[bytes], stop=(), cleans_up=False, decode=None) -> list[str]:
    """What each token adds, when token i is the bytes `pieces[i]`."""
    decode = decode or (lambda tokens: b"".join(pieces[token] for token in tokens).decode(errors="replace"))
    detokenizer = Detokenizer(decode, stop, cleans_up)
    number = len(pieces)
    found = [detokenizer.add(range(n), n == number) for n in range(1, number + 1)]
    assert "".join(found) == detokenizer.text
    return found


def test_a_character_of_several_tokens_is_shown_when_it_is_whole():
    assert parts([b"a\xf0", b"\x9f", b"\x98\x80", b"b"]) == ["a", "", "😀", "b"]


def test_bytes_that_never_become_a_character_are_shown_at_the_end():
    assert parts([b"a", b"\xf0\x9f"]) == ["a", "\ufffd"]
    assert parts([b"a\xf0", b"b"]) == ["a", "\ufffdb"]


def test_what_may_be_a_stop_string_is_held_back_and_the_string_is_never_shown():
    assert parts([b"one", b" S", b"TO", b"P two"], stop=["STOP"]) == ["one", " ", "", ""]
    assert parts([b"one", b" S", b"TO", b"RY"], stop=["STOP"]) == ["one", " ", "", "STORY"]
    assert parts([b"aa", b"ab", b"x"], stop=["aab", "b"]) == ["", "", "a"]


def test_a_text_that_ends_with_the_beginning_of_a_stop_string_is_shown_whole():
    assert parts([b"one", b" ST"], stop=["STOP"]) == ["one", " ST"]


def test_a_space_before_punctuation_waits_where_the_tokenizer_removes_it():
    pieces = [b"Hello", b" ", b", you", b" do", b" n", b"'t"]

    def decode(tokens):
        text = b"".join(pieces[token] for token in tokens).decode()
        return text.replace(" ,", ",").replace(" n't", "n't")

    assert parts(pieces, cleans_up=True, decode=decode) == ["Hello", "", ", you", " do", "", "n't"]


@pytest.mark.parametrize("stop", [["\n\n"], ["a", "ab"], ["é!"]])
def test_the_parts_of_any_split_are_the_text_before_the_first_stop_string(stop):
    data = "é ab\n\nx é!é".encode()
    whole = data.decode()
    end = min((at for string in stop if (at := whole.find(string)) >= 0), default=len(whole))
    assert "".join(parts([data[i : i + 1] for i in range(len(data))], stop=stop)) == whole[:end]


def test_bytes_are_held_back_that_a_later_one_makes_wrong():
    tokenizer = checkpoint("gemma")
    six, broken = tokenizer.backend.convert_tokens_to_ids(["<0x36>", "<0x81>"])
    growing = Detokenizer(tokenizer.decode, byte_tokens={six, broken})
    tokens = [*tokenizer.encode(["a"])[0], six, broken]
    parts = [growing.add(tokens[:n], n == len(tokens)) for n in range(1, len(tokens) + 1)]
    assert "".join(parts) == tokenizer.decode(tokens) == "a��"
