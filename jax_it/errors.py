"""Errors caused by the user or by a signal, and texts and values in one line for messages."""

import os
import sys
from contextlib import suppress
from typing import Any, NoReturn


class UserError(Exception):
    """Bad input, in one line: what is wrong, where (file, line, field) and how to fix it.

    The command line prints it to standard error without a traceback and exits with code 2.
    """


class Interrupted(Exception):
    """The run has stopped before its end and nothing is lost: the same command continues it.

    `code` is the exit code: 75, or 130 after Ctrl-C.
    """

    def __init__(self, text: str, code: int = 75):
        super().__init__(text)
        self.code = code


def shorten(text: str, length: int = 80) -> str:
    """Put a text on one line of at most that many characters, leaving out its middle."""
    text = " ".join(text.split())
    return text if len(text) <= length else f"{text[: length // 2]}…{text[1 - length // 2 :]}"


def shown(value: Any, length: int = 100) -> str:
    """Show a value, such as a setting, in a message: its repr on one line of at most that many characters."""
    try:
        text = repr(value)
    except Exception as error:  # of a repr that fails, or of an integer with more digits than Python writes
        return f"a value of type {type(value).__name__} ({error})"
    return shorten(text, length)


def first_line(error: BaseException) -> str:
    """Return the first line of an error's text that has any, or the error's type."""
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)


def exit_now(code: int) -> NoReturn:
    """End the process without Python's own shutdown, which waits for all threads and runs other libraries' code."""
    for stream in (sys.stdout, sys.stderr):
        with suppress(Exception):
            stream.flush()
    os._exit(code)
