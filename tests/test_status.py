"""What a long command prints while it works, if standard error is not a terminal."""

import io
import time

import pytest

from jax_it import status
from jax_it.status import Bar, activity, lines


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.fixture(autouse=True)
def short(monkeypatch):
    monkeypatch.setattr(status, "INTERVAL", 0.3)


def wait_for(text: str, stream: io.StringIO) -> None:
    deadline = time.monotonic() + 20
    while text not in stream.getvalue().splitlines():
        assert time.monotonic() < deadline, stream.getvalue()
        time.sleep(0.01)


def test_there_is_a_line_with_what_is_going_on_whenever_there_was_none_for_a_while():
    stream = io.StringIO()
    with lines("train", stream):
        wait_for("jax-it train: working", stream)
        with activity(lambda: "compiling, step 1 of 60"):
            wait_for("jax-it train: compiling, step 1 of 60", stream)
            with Bar("generating", total=100, unit="examples") as bar:
                bar.update(7)
                wait_for("jax-it train: generating, 7 of 100 examples", stream)
            with activity(lambda: ""):  # nothing to say
                before = stream.getvalue()
                time.sleep(0.5)
                assert stream.getvalue() == before
    found = stream.getvalue()
    time.sleep(0.5)
    assert stream.getvalue() == found


def test_there_is_none_soon_after_another_line_and_none_on_a_terminal():
    stream, terminal = io.StringIO(), Terminal()
    with lines("eval", stream), lines("eval", terminal):
        for _ in range(10):
            time.sleep(0.1)
            status.said()
    assert stream.getvalue() == terminal.getvalue() == ""


def test_a_bar_without_a_total_says_how_many():
    with Bar("tokenizing say", unit="examples") as bar:
        bar.update(1200)
        assert bar._text() == "tokenizing say, 1200 examples"
