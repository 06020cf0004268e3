"""Files of local folders and of object stores: whole or not at all, and growing ones as far as they can."""

import fcntl
import json
import os
import platform
import re
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from jax_it import files
from jax_it.errors import UserError


def test_a_local_name_is_a_path_and_needs_no_library() -> None:
    assert files.locate("runs/a") == Path("runs/a")
    assert files.local(files.locate("runs/a")) == Path("runs/a")


def test_a_local_folder_is_not_taken_for_an_object_store(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("/gs/run", "/s3/run", "/hf/run"):
        assert os.fspath(files.locate(name)) == f"/{name}" and files.local(files.locate(name)) == Path(f"/{name}")
    assert files.local(files.locate("a/b://c")) == Path("a/b:/c")
    monkeypatch.setattr(os, "getcwd", lambda: "/gs/runs")
    assert files.local(files.absolute(files.locate("a")) / "b") == Path("//gs/runs/a/b")


@pytest.mark.parametrize(
    ("name", "wanted"),
    [
        ("az://bucket/run", "az://bucket/run: unknown scheme az://; give a local folder, gs:// or s3://"),
        ("gs://bucket/run", "gs://bucket/run needs gcsfs: pip install 'jax-it[gcs]'"),
        ("s3://bucket/run", "s3://bucket/run needs s3fs: pip install 'jax-it[s3]'"),
    ],
)
def test_what_cannot_be_opened_is_said_in_one_line(monkeypatch: pytest.MonkeyPatch, name: str, wanted: str) -> None:
    monkeypatch.setattr(files, "find_spec", lambda package: None)
    with pytest.raises(UserError, match=f"^{re.escape(wanted)}$"):
        files.locate(name)


def test_a_name_without_a_bucket_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files, "find_spec", lambda package: object())
    with pytest.raises(UserError, match="has no bucket"):
        files.locate("gs://")


@pytest.mark.parametrize(
    ("name", "wanted"),
    [
        ("", "--workdir is empty; name a folder or a file"),
        ("~nouser", "--workdir ~nouser: ~nouser is not a known home folder; write ./~nouser for a file of that name"),
        (
            "~nouser/x",
            "--workdir ~nouser/x: ~nouser is not a known home folder; write ./~nouser/x for a file of that name",
        ),
        ("gs:/bucket/run", "--workdir gs:/bucket/run: write gs://bucket/run for the object store"),
        ("az://bucket", "--workdir az://bucket: unknown scheme az://; give a local folder, gs:// or s3://"),
        ("file:///tmp", "--workdir file:///tmp: unknown scheme file://; give a local folder, gs:// or s3://"),
        ("a\0b", "--workdir a\0b: no file can have a name with a null byte"),
        ("\ud800", "--workdir \ud800: this name is not UTF-8; give another path"),
        ("é" * 128, f"--workdir {'é' * 128}: File name too long; give another path"),
    ],
)
def test_a_path_that_can_be_none_is_refused_by_the_option_that_names_it(name: str, wanted: str) -> None:
    with pytest.raises(UserError, match=f"^{re.escape(wanted)}"):
        files.locate(name, "--workdir")


def test_home_folders_are_expanded_and_loops_of_links_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    assert files.locate("~") == tmp_path and files.locate("~/run") == tmp_path / "run"
    assert files.locate("a~b") == Path("a~b") and files.locate("./~") == Path("~")
    assert files.locate("runs/a:b") == Path("runs/a:b") and files.locate("c:/x") == Path("c:/x")
    (tmp_path / "a").symlink_to("b")
    (tmp_path / "b").symlink_to("a")
    with pytest.raises(UserError, match=r"--json .*: Too many levels of symbolic links"):
        files.locate(tmp_path / "a" / "x", "--json")


def test_an_object_store_is_refused_where_a_local_path_is_needed() -> None:
    for name in ("gs://bucket/x", "s3:/bucket/x", "az://x"):
        with pytest.raises(UserError, match=f"^--output {name}: {name[:2]}:// is not supported here; give a local"):
            files.locate_local(name, "--output")
    assert files.locate_local("x", "--output") == Path("x")


def test_a_link_stays_and_the_file_that_it_points_to_is_replaced_with_its_permissions(tmp_path: Path) -> None:
    (tmp_path / "inner").mkdir()
    target, link = tmp_path / "inner" / "target", tmp_path / "link"
    link.symlink_to("inner/target")
    for text in ("new", "again"):
        files.write_atomically(link, text)
        assert link.is_symlink() and target.read_text() == text
        target.chmod(0o640)
    assert target.stat().st_mode & 0o777 == 0o640


def test_a_device_or_a_pipe_is_written_to_as_it_is(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    null, link = tmp_path / "null", tmp_path / "link"
    link.symlink_to("/dev/null")
    files.write_atomically(link, "nothing")
    assert link.is_symlink() and link.is_char_device()
    print("before")
    files.write_atomically(Path("/dev/stdout"), "here\n")  # which is a regular file, under pytest
    print("after")
    assert capfd.readouterr().out == "before\nhere\nafter\n"
    os.mkfifo(null)
    with pytest.raises(OSError, match="No such device or address"):  # nobody reads it
        files.write_atomically(null, "x")
    reading = os.open(null, os.O_RDONLY | os.O_NONBLOCK)
    files.write_atomically(null, "piped")
    assert os.read(reading, 99) == b"piped" and files.is_stream(null)
    os.close(reading)
    with pytest.raises(OSError, match="No space left on device"):
        files.write_atomically(Path("/dev/full"), "x")


def test_an_output_is_refused_before_the_work_and_its_failure_afterwards_is_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("", "nowhere/x"):
        with pytest.raises(UserError, match=r"--json: cannot write .*: it must be a file in a folder that exists"):
            files.locate_output(tmp_path / name, "--json")
    assert files.locate_output("/dev/null", "--json") == Path("/dev/null")
    long = files.locate_output(tmp_path / ("x" * 255), "--json")
    files.write_output(long, [1], "--json")
    assert json.loads(long.read_text()) == [1] and list(tmp_path.iterdir()) == [long]
    assert capsys.readouterr().err == ""
    files.write_output(long, [2], "--json")
    assert capsys.readouterr().err == f"--json: {long} existed and has been replaced\n"
    with pytest.raises(UserError, match="--json: cannot write /dev/full: No space left on device; free space or name"):
        files.write_output(Path("/dev/full"), "x", "--json")
    with pytest.raises(UserError, match="Is a directory; fix that or name another file"):
        files.write_output(tmp_path, "x", "--json")


class Memory:
    """A file in an object store: it is written whole, and there or not."""

    def __init__(self, name: str = "gs://bucket/metrics.jsonl"):
        self.full, self.name = name, name.rsplit("/", 1)[1]
        self.content: bytes | None = None
        self.writes = 0

    def __fspath__(self) -> str:
        return self.full

    def read_bytes(self) -> bytes:
        if self.content is None:
            raise FileNotFoundError(self.full)
        return self.content

    def write_bytes(self, content: bytes) -> None:
        self.content, self.writes = content, self.writes + 1


def test_a_growing_remote_file_is_uploaded_whole_now_and_then_and_at_the_end(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [0.0]
    monkeypatch.setattr(files.time, "monotonic", lambda: clock[0])
    remote = Memory()
    remote.content = b"1\n"  # of the run before
    growing = files.Appending(remote)
    growing.write("2\n")
    growing.flush()
    assert remote.content == b"1\n"
    clock[0] = files.UPLOAD + 1
    growing.flush()
    growing.flush()
    assert (remote.content, remote.writes) == (b"1\n2\n", 1)
    growing.write(b"3\n")
    growing.close()
    assert (remote.content, remote.writes) == (b"1\n2\n3\n", 2)


def test_a_growing_local_file_is_appended_to(tmp_path: Path) -> None:
    for text in ("1\n", "2\n"):
        growing = files.Appending(tmp_path / "folder" / "file")
        growing.write(text)
        growing.flush()
        assert (tmp_path / "folder" / "file").read_text().endswith(text)
        growing.close()
    assert list(files.lines(tmp_path / "folder" / "file")) == ["1\n", "2\n"]


def test_folders_are_copied_whole(tmp_path: Path) -> None:
    (tmp_path / "a" / "inner").mkdir(parents=True)
    (tmp_path / "a" / "inner" / "file").write_bytes(bytes(range(256)))
    files.copy(tmp_path / "a", tmp_path / "b")
    assert (tmp_path / "b" / "inner" / "file").read_bytes() == bytes(range(256))


def test_a_file_is_replaced_whole_or_not_at_all(tmp_path):
    file = tmp_path / "file.json"
    files.write_atomically(file, {"a": "ä"})
    assert json.loads(file.read_text(encoding="utf-8")) == {"a": "ä"}
    files.write_atomically(file, "text as it is")
    with pytest.raises(TypeError):
        files.write_atomically(file, {"a": object()})
    with pytest.raises(OSError):
        files.write_atomically(tmp_path / "nowhere" / "file.json", "")
    assert file.read_text() == "text as it is" and list(tmp_path.iterdir()) == [file]


def test_what_a_killed_process_left_of_a_file_goes_when_the_file_is_written_again(tmp_path):
    file = tmp_path / "file.json"
    killed = "import os, signal, sys; from pathlib import Path; from jax_it import files; "
    killed += "Path.replace = lambda *names: os.kill(os.getpid(), signal.SIGKILL); "
    killed += "files.write_atomically(Path(sys.argv[1]), 'half')"
    assert subprocess.run([sys.executable, "-c", killed, file], check=False).returncode == -signal.SIGKILL
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as running:
        its = tmp_path / f".file.json.{platform.node()}.{running.pid}.part"
        its.write_text("half")
        assert len(list(tmp_path.iterdir())) == 2
        files.write_atomically(file, "whole")
        assert set(tmp_path.iterdir()) == {file, its}  # a process that runs may still write its own
        running.communicate(b"\n")
    files.write_atomically(file, "again")
    assert list(tmp_path.iterdir()) == [file] and file.read_text() == "again"


def test_what_killed_processes_left_of_a_folder_goes_with_the_next_and_that_of_a_running_one_stays(tmp_path):
    killed = "import os, signal, sys; from pathlib import Path; from jax_it import files\n"
    killed += "with files.new_folder(Path(sys.argv[1]), '.out-') as folder:\n"
    killed += " (folder / 'half').write_text(''); os.kill(os.getpid(), signal.SIGKILL)"
    assert subprocess.run([sys.executable, "-c", killed, tmp_path], check=False).returncode == -signal.SIGKILL
    (left,) = tmp_path.iterdir()
    others = [tmp_path / name for name in (".out-elsewhere.1.x", f".outer-{platform.node()}.0.x", ".out-x")]
    for other in others:
        other.mkdir()
    with files.new_folder(tmp_path, ".out-") as first, files.new_folder(tmp_path, ".out-") as second:
        assert first != second and left.name.startswith(f".out-{platform.node()}.")
        assert set(tmp_path.iterdir()) == {first, second, *others}
        first.rename(tmp_path / "out")
    assert set(tmp_path.iterdir()) == {tmp_path / "out", *others}
    with files.new_folder(tmp_path, "." + 127 * "é" + "-") as longest:
        assert longest.is_dir()


def test_readers_never_see_half_a_file(tmp_path):
    file = tmp_path / "file.json"
    contents = [{"key": str(i) * 50_000} for i in range(2)]
    files.write_atomically(file, contents[0])
    writer = threading.Thread(target=lambda: [files.write_atomically(file, contents[i % 2]) for i in range(50)])
    writer.start()
    while writer.is_alive():
        assert json.loads(file.read_text()) in contents
    writer.join()


def test_a_lock_is_taken_on_the_file_that_has_the_name_and_removed_at_the_end(tmp_path, monkeypatch):
    file, flock = files.locate(tmp_path / "x.lock"), fcntl.flock

    def after_its_holder_has_removed_it(stream, how):
        monkeypatch.setattr(fcntl, "flock", flock)
        os.unlink(file)
        flock(stream, how)

    monkeypatch.setattr(fcntl, "flock", after_its_holder_has_removed_it)
    with files.locked(file, "is here", "go away"):
        assert file.read_text() == f"process {os.getpid()} on {platform.node()}"
        with pytest.raises(UserError, match=rf"^process {os.getpid()} on .* is here$"):
            files.locked(file, "is here", "go away").__enter__()
    assert not list(tmp_path.iterdir())
