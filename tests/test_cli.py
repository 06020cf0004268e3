"""Exit codes and what is said with them. The commands themselves: tests/test_commands.py and tests/faults."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

import jax_it
from jax_it import cli
from jax_it.cli import main
from jax_it.errors import Interrupted, UserError
from tests.tiny_run import fails

HERE = Path(__file__).parents[1]


def python(*arguments, **options):
    """What Python said: (exit code, standard output, standard error)."""
    done = subprocess.run([sys.executable, *arguments], cwd=HERE, capture_output=True, text=True, **options)
    return done.returncode, done.stdout, done.stderr


@pytest.fixture(autouse=True)
def loud(monkeypatch):
    monkeypatch.setattr(cli, "silence_libraries", lambda: None)


@pytest.fixture
def raising(monkeypatch):
    """`raising(error)`: makes the export command raise it."""

    def raising(error):
        def export(*arguments):
            raise error

        monkeypatch.setattr("jax_it.export.export", export)

    return raising


COMMAND = ("export", "--workdir", "run", "--output", "out")


def exit_code(*arguments):
    with pytest.raises(SystemExit) as exit:
        main(list(arguments))
    return exit.value.code


@pytest.mark.parametrize(
    "arguments, message",
    [
        ((), "jax-it: the following arguments are required: COMMAND; see jax-it --help"),
        (("trian",), "'trian' (choose from"),
        (
            ("train",),
            "jax-it train: the following arguments are required: --config, --workdir; see jax-it train --help",
        ),
        (("train", "--conf", "x", "--work", "y"), "the following arguments are required: --config, --workdir"),
        (("train", "--config", "x", "--workdir", "y", "--lr=3"), "jax-it train: unknown option --lr=3"),
        (("train", "--config", "x", "--workdir", "y", "stray"), "jax-it train: unknown option stray"),
        (
            ("export", "--workdir", "y", "--output", "z", "--config.train.seed=3"),
            "jax-it export: unknown option --config.train.seed=3",
        ),
        (("eval",), "one of the arguments --workdir --model is required"),
        (("eval", "--workdir"), "--workdir: expected one argument"),
        (("train", "--config", "x", "--workdir", "y", "--config.train.seed"), "--config.train.seed needs a value"),
        (
            ("train", "--config", "x", "--workdir", "y", "--config.train.seed", "--config.train.keep=3"),
            "--config.train.seed needs a value: --config.train.seed=VALUE",
        ),
        (
            ("preview", "--config", "x", "--config.data.train.0.path=a", "--config.data.train[0].path=b"),
            "--config.data.train[0].path is given twice; keep one",
        ),
        (("preview", "--config", "x", "--num", "few"), "--num"),
        (("generate", "--model", "x"), "one of the arguments --prompt --input is required"),
        (("generate", "--model", "x", "--prompt", "y", "--input", "z"), "not allowed with"),
        (("export", "--workdir", "x", "--output", "y", "--dtype", "int8"), "'int8' (choose from"),
    ],
)
def test_a_command_that_cannot_be_understood_is_answered_in_one_line(capfd, arguments, message):
    assert message in fails(capfd, *arguments)


def test_a_value_may_look_like_anything_but_an_option():
    words = ["--config.a=", "--config.mesh.data", "-1", "--config.b=--x", "--config.c", "x=y", "--config.d=z"]
    assert cli.overrides(words, True) == {"a": "", "mesh.data": "-1", "b": "--x", "c": "x=y", "d": "z"}


def test_success_is_0(capsys, monkeypatch):
    monkeypatch.setattr("jax_it.export.export", lambda *arguments: 7)
    assert exit_code(*COMMAND) == 0
    assert capsys.readouterr() == ("step 7 is in out, in Transformers format\n", "")


def test_what_is_asked_for_is_handed_on_and_the_format_is_named(capsys, monkeypatch):
    asked = []
    monkeypatch.setattr("jax_it.export.export", lambda *arguments: asked.append(arguments) or 7)
    assert exit_code(*COMMAND, "--checkpoint", "best", "--dtype", "float16", "--adapter-only") == 0
    assert asked == [("run", "out", "best", "float16", True)]
    assert capsys.readouterr() == ("step 7 is in out, in PEFT format\n", "")


def test_an_error_that_the_user_can_mend_is_2_and_one_line(capfd, raising):
    raising(UserError("file x, line 3:\n   broken; mend it"))
    assert fails(capfd, *COMMAND) == "jax-it export: file x, line 3: broken; mend it"


def test_with_debug_the_traceback_comes_before_the_line(capsys, raising):
    raising(UserError("broken; mend it"))
    assert exit_code(*COMMAND, "--debug") == 2
    lines = capsys.readouterr().err.splitlines()
    assert lines[0] == "Traceback (most recent call last):" and "in export" in "".join(lines)
    assert lines[-1] == "jax-it export: broken; mend it"


@pytest.mark.parametrize("error", [ZeroDivisionError("by 0"), KeyError("a"), OSError(5, "lost"), AssertionError()])
def test_a_fault_of_ours_is_1_and_shows_its_traceback(capsys, raising, error):
    raising(error)
    assert exit_code(*COMMAND) == 1
    lines = capsys.readouterr().err.splitlines()
    assert lines[0] == "Traceback (most recent call last):" and type(error).__name__ in lines[-2]
    assert lines[-1] == "jax-it export: this is a fault of jax_it; please report the lines above"


def test_a_run_that_stopped_and_goes_on_with_the_same_command_is_75_and_one_line(capsys, raising):
    raising(Interrupted("stopped after step 3;\n  the same command goes on"))
    assert exit_code(*COMMAND) == 75
    assert capsys.readouterr() == ("", "jax-it export: stopped after step 3; the same command goes on\n")


def test_an_interrupt_is_130_and_one_line(capsys, raising):
    raising(KeyboardInterrupt())
    assert exit_code(*COMMAND) == 130
    assert (
        capsys.readouterr().err == "jax-it export: stopped by Ctrl-C before it was done; nothing half-written is left\n"
    )


def test_python_m_jax_it_is_the_command():
    code, out, err = python("-m", "jax_it", "--help")
    assert code == 0 and out.startswith("usage: jax-it") and err == ""
    code, out, err = python("-m", "jax_it", "eval", "--workdir", "nowhere")
    assert code == 2 and out == ""
    assert err == "jax-it eval: nowhere holds no run (no config.json); start one with jax-it train\n"


def test_a_reader_that_goes_away_is_no_fault(tmp_path):
    code = "import jax_it.export; jax_it.export.export = lambda *a: print('x' * 10**6)"
    code += "; from jax_it.cli import main; main()"
    process = subprocess.Popen(
        [sys.executable, "-c", code, *COMMAND], cwd=HERE, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    process.stdout.close()
    error = process.stderr.read()
    process.stderr.close()
    assert process.wait() == 128 + signal.SIGPIPE and error == b""


def test_the_functions_of_the_package_are_imported_when_they_are_first_used():
    code = """
import sys, jax_it
assert not {"jax", "transformers", "numpy"} & sys.modules.keys()
for name in jax_it.__all__:
    assert callable(getattr(jax_it, name)), name
assert "jax" in sys.modules and not {"torch", "tensorflow", "datasets"} & sys.modules.keys()
from jax_it import train, evaluate, load, generate, save
import jax_it.cli, jax_it.preview, jax_it.predict
assert jax_it.generate is generate
"""
    assert python("-c", code, env=os.environ | {"JAX_PLATFORMS": "cpu"}) == (0, "", "")
    assert sorted(jax_it.__all__) == ["evaluate", "generate", "load", "save", "train"]
    with pytest.raises(AttributeError, match="has no attribute 'trian'"):
        jax_it.trian  # noqa: B018


def test_help_and_bad_options_do_not_wait_for_jax():
    code = "import sys; from jax_it.cli import main\n"
    code += "try: main()\nfinally: assert not {'jax', 'numpy'} & sys.modules.keys()"
    for arguments in (["--help"], ["train", "--help"], ["train"], ["generate", "--modle", "x"]):
        assert "AssertionError" not in python("-c", code, *arguments)[2]
