"""Files of local folders and of object stores: whole or not at all, and growing ones as far as they can."""

import json
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
    assert not files.is_remote(files.locate("runs/a"))


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
    with pytest.raises(UserError, match="names no bucket"):
        files.locate("gs://")


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


def test_folders_are_copied_and_moved_whole(tmp_path: Path) -> None:
    (tmp_path / "a" / "inner").mkdir(parents=True)
    (tmp_path / "a" / "inner" / "file").write_bytes(bytes(range(256)))
    files.copy(tmp_path / "a", tmp_path / "b")
    files.move(tmp_path / "b", tmp_path / "c")
    assert (tmp_path / "c" / "inner" / "file").read_bytes() == bytes(range(256))
    assert not (tmp_path / "b").exists()


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


def test_readers_never_see_half_a_file(tmp_path):
    file = tmp_path / "file.json"
    contents = [{"key": str(i) * 50_000} for i in range(2)]
    files.write_atomically(file, contents[0])
    writer = threading.Thread(target=lambda: [files.write_atomically(file, contents[i % 2]) for i in range(50)])
    writer.start()
    while writer.is_alive():
        assert json.loads(file.read_text()) in contents
    writer.join()
