"""A conversation with a model: what it is asked, what is remembered, and how the command reads and prints."""

import io
import os
import pty
import subprocess
import sys
import time
from contextlib import closing
from pathlib import Path

import pytest

import jax_it
from jax_it.chat_session import ChatSession
from jax_it.cli import main
from jax_it.data.templates import Turn
from jax_it.errors import UserError
from tests import tiny_run
from tests.data.chat_tokenizers import checkpoint
from tests.harness.conftest import CAUSAL, write
from tests.tiny_run import fails, succeeds


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A model of random weights with a chat template."""
    return write(tmp_path_factory.mktemp("chat") / "model", CAUSAL, checkpoint("smollm2"))


@pytest.fixture(scope="module")
def loaded(folder):
    return jax_it.load(str(folder))


def expected(loaded, *turns, new=8, **options):
    """The text that `generate` gives for a conversation."""
    (text,) = jax_it.generate(*loaded, [turns], new, **options)
    return text


def user(text):
    return Turn("user", text)


def test_an_answer_in_parts_is_the_text_that_generate_gives_and_the_next_one_follows_it(loaded):
    session = ChatSession(*loaded, system="Be brief.", max_new_tokens=8)
    turns = [Turn("system", "Be brief.")]
    for question in ("Say hello", "Who are you?", "Is grass green?"):
        parts = list(session.answer(question))
        turns.append(user(question))
        assert "".join(parts) == expected(loaded, *turns) and len(parts) > 1
        turns.append(Turn("assistant", "".join(parts)))
        assert session.turns == tuple(turns)
    session.reset()
    assert session.turns == (turns[0],)
    assert "".join(session.answer("Say hello")) == turns[2].text


def test_an_answer_that_is_stopped_is_remembered_as_far_as_it_got(loaded):
    session = ChatSession(*loaded, max_new_tokens=8)
    said = ""
    with closing(session.answer("Say hello")) as parts:
        while not said.strip():
            said += next(parts)
    assert expected(loaded, user("Say hello")).startswith(said)
    assert session.turns == (user("Say hello"), Turn("assistant", said))
    again = "".join(session.answer("Who are you?"))
    assert again == expected(loaded, user("Say hello"), Turn("assistant", said), user("Who are you?"))


def test_a_stop_string_and_the_beginning_of_one_are_not_shown(loaded):
    whole = expected(loaded, user("Say hello"))
    stop = whole[3:6]
    session = ChatSession(*loaded, max_new_tokens=8, stop=[stop, f"{whole[:2]}never"])
    parts = list(session.answer("Say hello"))
    assert "".join(parts) == whole[: whole.index(stop)] == session.turns[-1].text


def test_an_empty_answer_is_not_remembered(loaded):
    first = expected(loaded, user("Say hello"))[0]
    session = ChatSession(*loaded, max_new_tokens=8, stop=[first])
    assert "".join(session.answer("Say hello")) == "" and session.turns == ()


def test_a_character_of_several_tokens_is_shown_when_it_is_whole(loaded, monkeypatch):
    session = ChatSession(*loaded, max_new_tokens=8)
    letters = "é☃\U0001f600".encode()
    monkeypatch.setattr(
        session._tokenizer.backend, "decode", lambda ids, **_: letters[: len(ids)].decode(errors="replace")
    )
    parts = list(session.answer("Say hello"))
    assert "\ufffd" not in "".join(parts[:-1]) and "".join(parts).startswith("é☃")


def test_a_model_without_a_chat_template_is_refused(capfd, tmp_path_factory):
    run = tiny_run.finished(tmp_path_factory)
    with pytest.raises(UserError, match="has no chat template, so the model was not trained on conversations"):
        ChatSession(*jax_it.load(str(run)))
    line = fails(capfd, "generate", "--model", run, "--chat")
    assert "use --prompt, or train it with config.model.chat_template='default'" in line


@pytest.mark.parametrize(
    "option", [["--raw"], ["--output", "x"], ["--num-return-sequences", "2", "--temperature", "1"]]
)
def test_options_that_a_conversation_does_not_have_are_refused(capfd, option):
    line = fails(capfd, "generate", "--model", "any", "--chat", *option)
    assert "--raw, --output and --num-return-sequences do not go with --chat" in line


def test_each_line_of_standard_input_is_answered(capfd, folder, loaded, monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.StringIO("Say hello\n\nWho are you?\n/reset\nWho are you?"))
    out = succeeds(capfd, "generate", "--model", folder, "--chat", "--max-new-tokens", 8)
    hello = expected(loaded, user("Say hello"))
    answers = [
        hello,
        expected(loaded, user("Say hello"), Turn("assistant", hello), user("Who are you?")),
        expected(loaded, user("Who are you?")),
    ]
    assert out == "".join(f"{answer}\n" for answer in answers)


def test_what_is_wrong_with_an_answer_is_said_on_standard_error(capfd, folder, loaded, monkeypatch):
    first = expected(loaded, user("Say hello"))[0]
    for options, line in (
        (("--max-new-tokens", 1, "--min-new-tokens", 1), "(the answer reached --max-new-tokens before it ended)\n"),
        (("--stop", first), "(the answer is empty)\n"),
    ):
        monkeypatch.setattr(sys, "stdin", io.StringIO("Say hello\n"))
        with pytest.raises(SystemExit) as exit:
            main([str(word) for word in ("generate", "--model", folder, "--chat", *options)])
        assert exit.value.code == 0 and line in capfd.readouterr().err


@pytest.mark.slow  # it starts two processes
@pytest.mark.parametrize("end", [b"\x04", b"\x03"])
def test_on_a_terminal_ctrl_c_stops_an_answer_and_ctrl_d_or_another_ends_the_conversation(folder, end):
    terminal, other = pty.openpty()
    # The terminal becomes the process's own, so that Ctrl-C is a signal to it.
    code = "import fcntl, termios; fcntl.ioctl(0, termios.TIOCSCTTY, 0); from jax_it.cli import main; main()"
    command = [sys.executable, "-c", code, "generate", "--model", str(folder), "--chat"]
    command += ["--max-new-tokens", "20000", "--min-new-tokens", "20000"]
    here = Path(__file__).parents[1]
    process = subprocess.Popen(command, stdin=other, stdout=other, stderr=other, start_new_session=True, cwd=here)
    os.close(other)
    seen = b""

    def wait_for(text):
        nonlocal seen
        until = time.monotonic() + 300
        while text not in seen:
            assert time.monotonic() < until, seen
            seen += os.read(terminal, 4096)
        seen = seen[seen.index(text) + len(text) :]

    try:
        wait_for(b">>> ")
        os.write(terminal, b"Say hello\n")
        wait_for(b"Say hello")
        while len(seen) < 60:  # the answer has begun
            seen += os.read(terminal, 4096)
        os.write(terminal, b"\x03")
        wait_for(b">>> ")
        os.write(terminal, end)
        assert process.wait(60) == 0
    finally:
        process.kill()
        os.close(terminal)
