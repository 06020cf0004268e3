import os
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest

from jax_it.errors import UserError
from jax_it.evaluation import sandbox
from jax_it.evaluation.sandbox import Limits, run

THERE = sandbox.in_force()


def needs(*layers):
    missing = set(layers) - THERE
    return pytest.mark.skipif(bool(missing), reason=f"this system has no {', '.join(missing)}")


def test_a_program_that_runs_to_its_end_has_passed():
    assert run("def f(x):\n    return x + 1\nassert f(1) == 2") == (True, "")


@pytest.mark.parametrize(
    "program, reason",
    [
        ("assert 1 == 2, 'one is\\nnot two'", "AssertionError: one is not two"),
        ("def f(:", "SyntaxError: invalid syntax (program, line 1)"),
        ("import sys; sys.exit(0)", "SystemExit: 0"),
        ("raise SystemExit", "SystemExit: "),
        ("raise KeyboardInterrupt", "KeyboardInterrupt: "),
        ("quit()", "NameError: name 'quit' is not defined"),
        ("import os; os._exit(0)", "it left Python before its end (exit code 0)"),
        ("import os; os._exit(3)", "it left Python before its end (exit code 3)"),
        ("import ctypes; ctypes.string_at(0)", "it was ended by SIGSEGV"),
        ("print(input())", "EOFError: EOF when reading a line"),
        ("def f(): f()\nf()", "RecursionError: maximum recursion depth exceeded"),
        ("x = '\\ud800'; raise ValueError(x)", "ValueError: \\ud800"),
        ("raise ValueError('x' * 10**6)", f"ValueError: {'x' * 187}…"),
    ],
)
def test_a_program_that_does_not_reach_its_end_has_failed(program, reason):
    if "quit" in program:
        program = f"import builtins\ndel builtins.quit\n{program}"
    assert run(program) == (False, reason)


def test_an_error_that_ends_the_process_when_it_is_shown_has_failed():
    program = "class E(Exception):\n    def __str__(self):\n        import os; os._exit(0)\nraise E"
    assert run(program) == (False, "it left Python before its end (exit code 0)")


def test_what_a_program_prints_or_writes_to_any_open_stream_proves_nothing():
    program = (
        "import os\nfor n in range(64):\n    try: os.write(n, b'[]\\npassed\\n')\n    except OSError: pass\nos._exit(0)"
    )
    assert not run(program).passed


def test_an_end_said_by_another_program_is_none():
    """Each has a token of its own, which stands in nothing that a program is given."""
    program = "import os, sys\nassert not any(len(a) == 32 for a in [*sys.argv, *os.environ.values()])"
    assert run(program).passed


def test_a_main_block_is_no_part_of_the_program():
    assert run("if __name__ == '__main__':\n    raise ValueError").passed


def test_dataclasses_with_written_out_types_work():
    program = (
        "from __future__ import annotations\nfrom dataclasses import dataclass\n@dataclass\nclass A:\n    x: int\nA(1)"
    )
    assert run(program).passed


@pytest.mark.parametrize(
    "program",
    [
        "while True: pass",
        "while True:\n    try:\n        while True: pass\n    except BaseException: pass",
        "while True: print('x' * 10000)",
    ],
)
def test_an_endless_loop_is_ended_by_its_processor_time(program):
    started = time.monotonic()
    assert run(program, Limits(seconds=30, cpu_seconds=1)) == (False, "it used more than 1 s of processor time")
    assert time.monotonic() - started < 20


def test_signals_that_are_ignored_end_an_endless_loop_all_the_same():
    ignore = "try: signal.signal(n, signal.SIG_IGN)\n    except (OSError, ValueError): pass"
    program = f"import signal\nfor n in range(1, 64):\n    {ignore}\nwhile True: pass"
    assert run(program, Limits(seconds=30, cpu_seconds=1)) == (False, "it was ended by SIGKILL")


def test_one_that_waits_is_ended_by_the_clock():
    program = "import time\ntry: time.sleep(1000)\nfinally: time.sleep(1000)"
    started = time.monotonic()
    assert run(program, Limits(seconds=1.5)) == (False, "it ran longer than 1.5 s")
    assert time.monotonic() - started < 10


def test_threads_left_behind_end_with_the_program():
    assert run("import threading, time\nthreading.Thread(target=time.sleep, args=(1000,)).start()").passed


@pytest.mark.parametrize("program", ["x = bytearray(1 << 40)", "x = []\nwhile True: x.append(bytearray(1 << 22))"])
def test_memory_is_limited(program):
    assert run(program, Limits(memory=1 << 28)) == (False, "MemoryError: ")


def test_threads_without_end_are_refused():
    program = "import threading, time\nwhile True: threading.Thread(target=time.sleep, args=(1000,)).start()"
    assert run(program, Limits(memory=1 << 28)) == (False, "RuntimeError: can't start new thread")


def test_files_are_limited_in_size_and_number():
    assert run("open('a', 'wb').write(bytes(1 << 20))").passed
    assert "File too large" in run("open('a', 'wb').write(bytes(1 << 20))", Limits(file=1 << 16)).reason
    assert "Too many open files" in run("x = [open('a', 'w') for _ in range(1000)]").reason


def test_each_program_has_an_empty_folder_that_goes_with_it(tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    assert run("import os\nassert os.listdir() == []\nopen('a', 'w').write('a')").passed
    assert run("import os\nassert os.listdir() == []\nos.makedirs('b/c')\nos.chmod('b', 0)\nos.chmod('.', 0)").passed
    assert run("import os\nfor name in os.listdir(): os.remove(name)\nos.mkdir('d')\nos.rmdir('d')").passed
    run("import os, shutil\nshutil.rmtree(os.getcwd())")
    assert os.listdir(tmp_path) == []


def test_nothing_of_the_environment_is_seen(monkeypatch):
    monkeypatch.setenv("SECRET_TOKEN", "secret")
    monkeypatch.setenv("PYTHONPATH", "/nowhere")
    names = {"SECRET_TOKEN", "HOME", "USER", "PYTHONPATH"}
    assert run(f"import os\nassert not {names} & set(os.environ), os.environ") == (True, "")
    assert run("import sys\nassert '/nowhere' not in sys.path") == (True, "")


@pytest.mark.parametrize(
    "program, what",
    [
        ("import socket\nsocket.socket()", "use the network"),
        ("import urllib.request\nurllib.request.urlopen('http://127.0.0.1')", "use the network"),
        ("import os\nwhile True: os.fork()", "start processes"),
        ("import os\nos.system('true')", "start processes"),
        ("import subprocess\nsubprocess.run(['true'])", "start processes"),
        ("import multiprocessing\nmultiprocessing.get_context('fork').Process().start()", "start processes"),
        ("import os\nos.kill(os.getppid(), 9)", "send signals"),
        ("import os\nos.killpg(os.getppid(), 9)", "send signals"),
    ],
)
def test_python_refuses_network_processes_and_signals_on_every_system(program, what):
    outcome = run(program, Limits(), layers=())
    assert not outcome.passed
    assert f"a model's code may not {what}" in outcome.reason


C = "import ctypes, os\nc = ctypes.CDLL(None, use_errno=True)\n"


@needs("seccomp")
def test_the_kernel_refuses_what_goes_round_python():
    calls = [
        "c.socket(2, 1, 0)",
        "c.socket(1, 1, 0)",
        "c.fork()",
        "c.vfork()",
        "c.kill(os.getppid(), 0)",
        "c.kill(-1, 0)",
        "c.ptrace(16, os.getppid(), 0, 0)",
        "c.unshare(0x10000000)",
        "c.setpriority(0, os.getppid(), 19)",
        "c.prlimit(os.getppid(), 0, None, ctypes.create_string_buffer(16))",
        "c.syscall(425, 8, ctypes.create_string_buffer(120))",
    ]
    program = "".join(f"assert {call} == -1 and ctypes.get_errno() == 1, {call!r}\n" for call in calls)
    assert run(C + program) == (True, "")


@needs("seccomp")
def test_no_process_is_left_behind():
    program = f"{C}for _ in range(100): assert c.fork() == -1\nc.system(b'touch a')\nassert os.listdir() == []"
    assert run(program) == (True, "")


@needs("seccomp")
def test_threads_work_under_the_filter():
    program = "from concurrent.futures import ThreadPoolExecutor as T\nassert list(T(4).map(abs, [-1, -2])) == [1, 2]"
    assert run(program) == (True, "")


@needs("seccomp")
def test_the_network_is_closed_where_a_server_listens():
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        program = f"{C}assert c.socket(2, 1, 0) == -1\nimport socket\nsocket.create_connection(('127.0.0.1', {port}))"
        assert not run(program).passed
        server.settimeout(0.1)
        with pytest.raises(TimeoutError):
            server.accept()


@needs("namespace")
def test_a_program_has_a_network_of_its_own():
    own = os.readlink("/proc/self/ns/net")
    program = f"import os\nassert os.readlink('/proc/self/ns/net') != {own!r}"
    assert run(program, Limits(), ["namespace"]) == (True, "")


@needs("landlock")
def test_files_elsewhere_can_be_neither_read_nor_written_nor_removed(tmp_path):
    file = tmp_path / "mine"
    file.write_text("mine")
    for action in (
        f"open({str(file)!r})",
        f"open({str(file)!r}, 'w')",
        f"open({str(tmp_path / 'new')!r}, 'w')",
        f"os.remove({str(file)!r})",
        f"os.truncate({str(file)!r}, 0)",
        f"os.rename({str(file)!r}, 'mine')",
        f"os.listdir({str(tmp_path)!r})",
        f"os.listdir({str(Path.home())!r})",
        f"open('/proc/{os.getpid()}/environ')",
        f"open({str(Path(sandbox.__file__).with_name('new'))!r}, 'w')",
    ):
        outcome = run(f"import os\n{action}")
        assert not outcome.passed and outcome.reason.startswith(("PermissionError", "OSError")), (action, outcome)
    assert file.read_text() == "mine" and os.listdir(tmp_path) == ["mine"]


@needs("landlock")
def test_pythons_own_modules_can_be_read():
    assert run("import math, re, collections, heapq, hashlib, decimal, sqlite3, zoneinfo, numpy") == (True, "")
    assert run("import os\nopen(os.devnull, 'w').write('a')\nassert len(os.urandom(8)) == 8") == (True, "")


def test_what_a_program_has_started_ends_with_it_where_the_kernel_has_no_filter(tmp_path):
    """Round Python's own refusal, by C."""
    file = tmp_path / "pid"
    child = f"open({str(file)!r}, 'w').write(str(os.getpid())); import time; time.sleep(1000)"
    program = (
        f"{C}if c.fork() == 0:\n    {child}\nimport time\nwhile not os.path.exists({str(file)!r}): time.sleep(0.01)"
    )
    assert run(program, Limits(), ()) == (True, "")
    pid, deadline = int(file.read_text() or "0"), time.monotonic() + 10
    while pid and is_running(pid):
        assert time.monotonic() < deadline, f"process {pid} is left"
        time.sleep(0.01)


def is_running(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux ends children with their parent")
def test_a_program_ends_with_the_process_that_runs_it(tmp_path):
    file = tmp_path / "pid"
    program = f"import os, time\nopen({str(file)!r}, 'w').write(str(os.getpid()))\ntime.sleep(1000)"
    code = f"from jax_it.evaluation import sandbox\nsandbox.run({program!r}, sandbox.Limits(seconds=1000), ())"
    running = subprocess.Popen([sys.executable, "-c", code])
    deadline = time.monotonic() + 60
    while not (file.exists() and file.read_text()):
        assert time.monotonic() < deadline
        time.sleep(0.01)
    pid = int(file.read_text())
    assert is_running(pid)
    running.kill()
    running.wait()
    while is_running(pid):
        assert time.monotonic() < deadline, f"process {pid} is left"
        time.sleep(0.01)


def test_programs_run_side_by_side_and_their_outcomes_keep_their_order():
    programs = [f"import time\ntime.sleep({0.3 if i % 2 else 0})\nassert {i} % 3" for i in range(6)]
    calls = []
    outcomes = sandbox.run_all(programs, done=lambda: calls.append(1))
    assert [outcome.passed for outcome in outcomes] == [False, True, True, False, True, True]
    assert len(calls) == 6


def test_what_is_not_limited_is_said(monkeypatch):
    monkeypatch.setattr(sandbox, "in_force", lambda: {"seccomp", "landlock", "namespace", "AS"})
    assert sandbox.gaps.__wrapped__() == ()
    monkeypatch.setattr(sandbox, "in_force", lambda: {"namespace", "AS"})
    assert len(sandbox.gaps.__wrapped__()) == 2
    monkeypatch.setattr(sandbox, "in_force", set)
    assert sandbox.gaps.__wrapped__() == tuple(sandbox.GAPS.values())


def test_a_python_that_does_not_start_is_an_error_and_no_failed_program(monkeypatch):
    monkeypatch.setattr(sys, "executable", "/bin/false")
    with pytest.raises(UserError, match="no program can be run with /bin/false under limits"):
        run("pass")
