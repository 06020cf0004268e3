"""Texts end where a stop string comes."""

import pytest

from jax_it.generation import Engine, Sampling, StopStrings, generate
from tests.generation.conftest import by_prompt

LENGTH = 40


def decode(tokens):
    return "".join(chr(64 + token) for token in tokens)


def test_a_text_is_cut_before_the_first_of_the_strings_and_before_nothing_else():
    stop = StopStrings(["BB", "C"], decode)
    assert [stop.cut(text) for text in ("ABBA", "ACBB", "ABA", "BB", "")] == ["A", "A", "ABA", "", ""]
    assert [stop(tokens) for tokens in ([1, 2, 2], [1, 2], [3], [])] == [True, False, True, False]


@pytest.fixture(scope="module")
def whole(tiny):
    return by_prompt(generate(Engine(tiny.model, tiny.mesh, LENGTH, 4), tiny.params, tiny.sources))


def test_texts_that_are_stopped_are_the_beginnings_of_the_whole_ones_and_their_slots_are_used_again(tiny, whole):
    longest = max(whole.values(), key=len)
    stop = StopStrings([decode(longest[3:5])], decode)
    found = by_prompt(generate(Engine(tiny.model, tiny.mesh, LENGTH, 4), tiny.params, tiny.sources, stop=stop))
    assert found.keys() == whole.keys()
    for i, text in found.items():
        assert text == whole[i][: len(text)]
        assert stop.cut(decode(text)) == stop.cut(decode(whole[i]))
        assert (stop(text) and not stop(text[:-1])) or text == whole[i], "cut where it was over, not where it was seen"
    assert sum(map(len, found.values())) < sum(map(len, whole.values())), "decoding went on for nothing"


def test_stop_is_asked_of_no_beams(tiny):
    engine = Engine(tiny.model, tiny.mesh, 4, 4, Sampling(num_beams=2))
    assert len(list(generate(engine, tiny.params, tiny.sources[:3], stop=lambda tokens: 1 / 0))) == 3
