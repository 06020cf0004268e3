"""The command line: `jax-it COMMAND` parses, calls the command's `run`, and reports an error in one line."""

import argparse
import errno
import importlib.metadata
import io
import logging
import os
import platform
import re
import sys
import traceback
from contextlib import nullcontext, suppress
from types import ModuleType
from typing import Any, NoReturn

from jax_it import typed
from jax_it.commands import data, evaluate, export, generate, plan, preview, serve, train
from jax_it.errors import Interrupted, UserError, exit_now, first_line, shorten

COMMANDS: dict[str, tuple[ModuleType, str]] = {
    "train": (train, "Train a model, or continue the run in the directory."),
    "eval": (evaluate, "Score a run's checkpoints, or any model: loss, text metrics, benchmarks."),
    "generate": (generate, "Generate text for one prompt, for a file of them, or in a conversation."),
    "serve": (serve, "Answer requests over HTTP, as OpenAI's API does."),
    "export": (export, "Write a checkpoint as a Transformers folder, or its adapters as a PEFT folder."),
    "preview": (preview, "Show what the model will see, and what happens to each data set."),
    "data": (data, "Check, clean and convert instruction data."),
    "plan": (plan, "Compile the training step for hardware you don't have: memory, traffic, time."),
}
LINE = 1500  # characters of a message at most
ON_DEVICES = ("train", "eval", "generate", "serve", "export")  # on several hosts, the same command on each


def main(arguments: list[str] | None = None) -> NoReturn:
    """Run a command and exit with 0: done, 2: the user can fix it, or 1: a bug.

    Or with 75, and 130 after Ctrl-C: stopped with nothing lost; the same command continues.
    """
    # Read by the libraries when they are imported: no advice for other frameworks, no threads after a fork.
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
    _open_streams()
    options, rest = make_parser().parse_known_args(arguments)
    if not options.debug:
        silence_libraries()
    try:
        options.changes = overrides(rest, takes_config="config" in options)
        if options.command in ON_DEVICES:
            from jax_it import hosts, status

            hosts.start()
            with hosts.watched(), status.lines(options.command) if hosts.is_first() else nullcontext():
                options.run(options)
        else:
            options.run(options)
    except UserError as error:
        if options.debug:
            traceback.print_exc()
        _say(options.command, error)
        leave(2, str(error))
    except Interrupted as stopped:
        _say(options.command, stopped)
        leave(stopped.code, "has stopped", at_once=arguments is None)  # 75 is BSD's EX_TEMPFAIL: to be tried again
    except KeyboardInterrupt:
        _say(options.command, "stopped by Ctrl-C before it was done; nothing half-written is left")
        leave(130, "was interrupted", at_once=arguments is None)
    except BrokenPipeError:
        leave(141, "has stopped")
    except Exception as error:
        if isinstance(error, OSError) and (reason := _lost_output("\n")):
            _say(options.command, f"cannot write to standard output: {reason}")
            leave(2, reason)
        if isinstance(error, MemoryError) or re.search("RESOURCE_EXHAUSTED|[Oo]ut of memory", str(error)):
            what = first_line(error)[:300]
            _say(options.command, f"not enough memory ({what}); use smaller batches, shorter texts or more devices")
            leave(2, "ran out of memory")
        with suppress(OSError):
            traceback.print_exc()
        _say(options.command, "this is a bug in jax_it; please report the lines above")
        leave(1, "hit a bug")
    leave(0)


def leave(code: int, message: str = "", at_once: bool = False) -> NoReturn:
    """End this process and, on several hosts, the other processes, if it has joined them.

    `at_once` skips Python's own shutdown, which waits for all threads: a signal may have interrupted a library just
    after it started one, before it recorded the thread to end it later.
    """
    if (reason := _lost_output()) and code == 0:
        if reason == os.strerror(errno.EPIPE):  # the reader has gone: end silently
            code, message = 141, "has stopped"
        else:
            code, message = 2, f"cannot write to standard output: {reason}"
            _say("", message)
    try:
        if hosts := sys.modules.get("jax_it.hosts"):
            hosts.leave(code, message)
        sys.exit(code)
    except SystemExit:
        if not at_once:
            raise
        exit_now(code)


def _say(command: str, what: object) -> None:
    """Print one line to standard error, unless that cannot be written to."""
    try:
        print(f"{f'jax-it {command}'.rstrip()}: {shorten(str(what), LINE)}", file=sys.stderr, flush=True)
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stderr.fileno())  # or Python tries again at its exit


def _lost_output(probe: str = "") -> str:
    """Write `probe` to standard output and flush it. Return why that failed, "" if it did not."""
    try:
        sys.stdout.write(probe)
        sys.stdout.flush()
    except OSError as error:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return error.strerror or str(error)
    return ""


def _open_streams() -> None:
    """Replace closed standard streams, whose numbers other files would get, and allow any text in standard output."""
    for number, name in ((0, "stdin"), (2, "stderr")):
        if getattr(sys, name) is None:
            null = os.open(os.devnull, os.O_RDWR)
            if null != number:
                os.dup2(null, number)
            setattr(sys, name, os.fdopen(number, "w" if number else "r", closefd=False))
    if sys.stdout is None:
        _say("", "standard output is closed; send it to a file or to /dev/null")
        sys.exit(2)
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # as standard error does


def silence_libraries() -> None:
    """Keep libraries from reporting failures on standard error: they also raise them, and `main` prints those."""
    for name in ("absl", "asyncio"):  # Orbax logs through the first and runs on the second
        logging.getLogger(name).setLevel(logging.CRITICAL)
    sys.unraisablehook = lambda unraisable: None  # writes still under way when one fails


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        """Print the error in one line, without the usage."""
        if message.endswith("expected one argument"):
            message += " (write --OPTION=VALUE where it begins with '-')"
        _say(self.prog.removeprefix("jax-it").strip(), f"{message}; see {self.prog} --help")
        leave(2)

    def exit(self, status: int = 0, message: str | None = None) -> NoReturn:
        leave(status)


class _Version(argparse.Action):
    def __call__(self, *arguments: Any) -> NoReturn:
        version = importlib.metadata.version
        print(f"jax-it {version('jax-it')} (JAX {version('jax')}, Python {platform.python_version()})")
        leave(0)


def make_parser() -> argparse.ArgumentParser:
    """Return the parser of all commands; --config.a.b=VALUE is left over, for `overrides`."""
    parser = _Parser(prog="jax-it", description="Instruction tuning in JAX.", allow_abbrev=False)
    parser.add_argument("--version", action=_Version, nargs=0, help="show the versions of jax-it, JAX and Python")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, (module, description) in COMMANDS.items():
        command = commands.add_parser(name, help=description, description=description, allow_abbrev=False)
        command.add_argument("--debug", action="store_true", help="show the traceback of an error")
        command.set_defaults(run=module.run)
        module.add_arguments(command)
    return parser


def overrides(rest: list[str], takes_config: bool) -> dict[str, str]:
    """Return {"train.seed": "1"} from ["--config.train.seed=1"], or from the same in two words."""
    found: dict[str, str] = {}
    words = iter(rest)
    for word in words:
        name, equals, value = word.partition("=")
        if not name.startswith("--config.") or not takes_config:
            raise UserError(f"unknown option {shorten(word)}; see jax-it COMMAND --help")
        if not equals and (value := next(words, "--")).startswith("--"):
            raise UserError(f"{name} needs a value: {name}=VALUE")
        name = name.removeprefix("--config.")
        if not name:
            raise UserError(f"{shorten(word)} names no setting; write --config.SECTION.SETTING=VALUE")
        if typed.parts(name) in map(typed.parts, found):
            raise UserError(f"--config.{typed.shown_name(name)} is given twice; keep one")
        found[name] = value
    return found
