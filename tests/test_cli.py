"""Exit codes and what is said with them. The commands themselves: tests/test_commands.py and tests/faults."""

import importlib.metadata
import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

import jax_it
from jax_it import cli
from jax_it import config as settings
from jax_it.cli import main
from jax_it.commands.generate import stop_string
from jax_it.errors import Interrupted, UserError
from tests import tiny_run
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


GENERATE = ("generate", "--model", "x", "--prompt", "y")
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
            ("train", "--config", "x", "--workdir", "y", "--config.train.seed", "--config.train.max_to_keep=3"),
            "--config.train.seed needs a value: --config.train.seed=VALUE",
        ),
        (
            ("preview", "--config", "x", "--config.data.train.0.path=a", "--config.data.train[0].path=b"),
            "--config.data.train[0].path is given twice; keep one",
        ),
        (("preview", "--config", "x", "--config.=1"), "--config.=1 names no setting"),
        (("preview", "--config", "x", "--num", "few"), "--num"),
        (("generate", "--model", "x"), "one of the arguments --prompt --input --chat is required"),
        (("generate", "--model", "x", "--prompt", "y", "--input", "z"), "not allowed with"),
        (("export", "--workdir", "x", "--output", "y", "--dtype", "int8"), "'int8' (choose from"),
        (("train", "--config", "x", "--workdir", ""), "train: argument --workdir: a path is empty; name a folder"),
        (
            ("train", "--config", "x", "--workdir", "~nouser/x"),
            "argument --workdir: ~nouser/x: ~nouser is not a known home",
        ),
        (("plan", "--config", "x", "--topology", "y", "--json", ""), "argument --json: a path is empty"),
        (("plan", "--config", "x", "--topology", "y", "--rows", "²"), "argument --rows: '²' is not a whole number"),
        (("preview", "--config", "x", "--num", "-5"), "argument --num: -5 is not from 0 to 2147483647"),
        (("preview", "--config", "x", "--num", "9" * 5000), "9 is not from 0 to"),
        ((*GENERATE, "--seed", "4294967296"), "argument --seed: 4294967296 is not from 0 to 4294967295"),
        ((*GENERATE, "--max-new-tokens", "1" + "0" * 400), "0 is not from 1 to 1048576"),
        ((*GENERATE, "--temperature", "nan"), "argument --temperature: nan is not a finite number"),
        ((*GENERATE, "--length-penalty", "1e400"), "argument --length-penalty: 1e400 is not a finite number"),
        ((*GENERATE, "--top-p", "half"), "argument --top-p: 'half' is not a number"),
        ((*GENERATE, "--stop", ""), "argument --stop: an empty text would end every text where it begins"),
        ((*GENERATE, "--stop", "\udcff"), "argument --stop: '\\udcff' is not UTF-8"),
        (("generate", "--model", "x", "--prompt", "a\udcff"), "argument --prompt: 'a\\udcff' is not UTF-8"),
        (("export", "--workdir", "x", "--output", "gs://bucket/x"), "--output: gs://bucket/x: gs:// is not supported"),
    ],
)
def test_a_command_that_cannot_be_understood_is_answered_in_one_line(capfd, arguments, message):
    assert message in fails(capfd, *arguments)


def test_a_value_may_look_like_anything_but_an_option():
    words = ["--config.a=", "--config.mesh.data", "-1", "--config.b=--x", "--config.c", "x=y", "--config.d=z"]
    assert cli.overrides(words, True) == {"a": "", "mesh.data": "-1", "b": "--x", "c": "x=y", "d": "z"}


def test_escapes_in_stop_strings_are_read():
    read = [stop_string(text) for text in (r"\n\n", r"a\tb\r", r"\\n", "\n", r"\begin", "\\")]
    assert read == ["\n\n", "a\tb\r", r"\n", "\n", r"\begin", "\\"]


def test_two_outputs_may_not_be_one_file(capfd, tmp_path):
    command = ("eval", "--workdir", tmp_path, "--summary", "--csv", tmp_path / "x", "--json", tmp_path / "." / "x")
    assert f"--json and --csv both name {tmp_path}/x; give each" in fails(capfd, *command)
    command = ("plan", "--config", "x", "--topology", "cpu:1", "--hlo", tmp_path / "nowhere" / "x")
    assert f"--hlo: cannot write {tmp_path}/nowhere/x: it must be a file in a folder" in fails(capfd, *command)


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
    raising(UserError("file x, line 3:\n   broken; fix it"))
    assert fails(capfd, *COMMAND) == "jax-it export: file x, line 3: broken; fix it"


def test_with_debug_the_traceback_comes_before_the_line(capsys, raising):
    raising(UserError("broken; fix it"))
    assert exit_code(*COMMAND, "--debug") == 2
    lines = capsys.readouterr().err.splitlines()
    assert lines[0] == "Traceback (most recent call last):" and "in export" in "".join(lines)
    assert lines[-1] == "jax-it export: broken; fix it"


@pytest.mark.parametrize("error", [ZeroDivisionError("by 0"), KeyError("a"), OSError(5, "lost"), AssertionError()])
def test_a_fault_of_ours_is_1_and_shows_its_traceback(capsys, raising, error):
    raising(error)
    assert exit_code(*COMMAND) == 1
    lines = capsys.readouterr().err.splitlines()
    assert lines[0] == "Traceback (most recent call last):" and type(error).__name__ in lines[-2]
    assert lines[-1] == "jax-it export: this is a bug in jax_it; please report the lines above"


def test_a_run_that_stopped_and_goes_on_with_the_same_command_is_75_and_one_line(capsys, raising):
    raising(Interrupted("stopped after step 3;\n  run the same command to continue"))
    assert exit_code(*COMMAND) == 75
    assert capsys.readouterr() == ("", "jax-it export: stopped after step 3; run the same command to continue\n")


def test_an_interrupt_is_130_and_one_line(capsys, raising):
    raising(KeyboardInterrupt())
    assert exit_code(*COMMAND) == 130
    assert (
        capsys.readouterr().err == "jax-it export: stopped by Ctrl-C before it was done; nothing half-written is left\n"
    )


@pytest.mark.parametrize("error, code", [("Interrupted('stopped')", 75), ("KeyboardInterrupt", 130)])
def test_a_stopped_command_waits_for_no_thread_that_nothing_ends(error, code):
    """A signal that interrupts the start of a thread pool leaves such a thread."""
    script = f"""
import sys, threading
from jax_it import cli, export
from jax_it.errors import Interrupted
threading.Thread(target=threading.Event().wait).start()
def stop(*arguments):
    print("so far")
    raise {error}
export.export = stop
sys.argv = ["jax-it", *{COMMAND}]
cli.main()
"""
    done = python("-c", script, timeout=60)
    assert done[:2] == (code, "so far\n") and "stopped" in done[2]


def test_python_m_jax_it_is_the_command():
    code, out, err = python("-m", "jax_it", "--help")
    assert code == 0 and out.startswith("usage: jax-it") and err == ""
    code, out, err = python("-m", "jax_it", "eval", "--workdir", "nowhere")
    assert code == 2 and out == ""
    assert err == "jax-it eval: nowhere is not a run directory (no config.json); start one with jax-it train\n"


def test_output_that_cannot_be_written_is_2_and_one_line(tmp_path):
    """A full disk, a closed stream; at once or only at the end."""
    code = "import jax_it.export; jax_it.export.export = lambda *a: print('x' * int(a[0])) or 7"
    code += "; from jax_it.cli import main; main()"
    for redirection, arguments, reason in (
        (">/dev/full", "export --workdir 1 --output out", "cannot write to standard output: No space left on device"),
        (">/dev/full", "export --workdir 99999 --output out", "cannot write to standard output: No space left on"),
        (">&-", "export --workdir 1 --output out", "standard output is closed; send it to a file or to /dev/null"),
        (">/dev/full", "--help", "cannot write to standard output: No space left on device"),
    ):
        script = f'exec "{sys.executable}" -c "{code}" {arguments} {redirection}'
        done = subprocess.run(["sh", "-c", script], cwd=HERE, capture_output=True, text=True)
        assert done.returncode == 2, (redirection, arguments, done)
        assert done.stderr.startswith("jax-it") and reason in done.stderr and done.stderr.count("\n") == 1, done.stderr
    for redirection in ("2>&-", "2>/dev/full"):
        script = f'exec "{sys.executable}" -c "{code}" export --workdir x --output out {redirection}'
        assert subprocess.run(["sh", "-c", script], cwd=HERE, capture_output=True).stdout == b""


def test_text_that_the_terminal_cannot_show_is_escaped(capfd, monkeypatch):
    monkeypatch.setattr("jax_it.export.export", lambda *a: print("ü \udcff"))
    monkeypatch.setattr(sys, "stdout", os.fdopen(1, "w", encoding="ascii", closefd=False))
    assert exit_code(*COMMAND) == 0
    assert capfd.readouterr().out.startswith("\\xfc \\udcff\n")


def test_too_little_memory_is_2_and_one_line(capfd, raising):
    raising(MemoryError())
    assert "export: not enough memory (MemoryError); use smaller batches" in fails(capfd, *COMMAND)
    raising(RuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 9 bytes.\nmore"))
    assert "not enough memory (RESOURCE_EXHAUSTED: Out of memory allocating 9 bytes.)" in fails(capfd, *COMMAND)


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


def test_the_version_is_that_of_the_package(capsys):
    assert exit_code("--version") == 0
    assert capsys.readouterr().out.startswith(f"jax-it {importlib.metadata.version('jax-it')} (JAX ")


@pytest.mark.parametrize("command", [("train", "--workdir", "nowhere"), ("preview",)])
def test_a_config_is_printed_as_it_was_resolved_and_can_be_read_back(capsys, tmp_path, monkeypatch, command):
    monkeypatch.chdir(tmp_path)
    options = ("--config", tiny_run.write_recipe(tmp_path), "--config.train.seed=7", "--print-config")
    assert exit_code(*map(str, (*command, *options))) == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed["train"]["seed"] == 7 and printed["train"]["duration"] == "60 steps"
    assert settings.resolve(printed) == settings.load(str(tmp_path / "config.py"), {"train.seed": "7"})
    assert not (tmp_path / "nowhere").exists()


def test_training_ends_with_where_the_run_is_and_what_comes_next(capsys, tmp_path, monkeypatch):
    asked = []

    def train(*arguments):
        asked.append(arguments[1:])
        return SimpleNamespace(step=60)

    monkeypatch.setattr("jax_it.training.train", train)
    monkeypatch.setattr("jax_it.training.dry_run", lambda *arguments: asked.append(arguments[1:]) or "as planned")
    run = str(tmp_path / "my run")
    command = ("train", "--config", str(tiny_run.write_recipe(tmp_path)), "--workdir", run)
    assert exit_code(*command, "--allow-change", "train.duration", "--allow-change", "train.z_loss") == 0
    out = capsys.readouterr().out
    assert out.startswith(f"step 60 is saved in {run}; next: jax-it eval --workdir '{run}', jax-it generate --model '")
    assert exit_code(*command, "--dry-run") == 0
    assert capsys.readouterr().out == "as planned\n"
    assert asked == [(run, ["train.duration", "train.z_loss"]), (run, [])]


def test_help_and_bad_options_do_not_wait_for_jax():
    code = "import sys; from jax_it.cli import main\n"
    code += "try: main()\nfinally: assert not {'jax', 'numpy'} & sys.modules.keys()"
    for arguments in (["--help"], ["train", "--help"], ["train"], ["generate", "--modle", "x"]):
        assert "AssertionError" not in python("-c", code, *arguments)[2]
