"""Files of a local folder, or of one in an object store: gs:// and s3:// by etils.epath, as Orbax reads them.

An object store has no append, no lock, and no folder that could be renamed; a file in it is written whole,
and there or not.
"""

import errno
import fcntl
import glob
import hashlib
import json
import math
import os
import platform
import shutil
import stat
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from importlib.util import find_spec
from pathlib import Path
from typing import Any, TextIO

from jax_it.errors import UserError

BACKENDS = {"gs": ("gcsfs", "gcs"), "s3": ("s3fs", "s3")}  # scheme: package, and our extra that installs it
FULL = {os.strerror(number) for number in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)}
UPLOAD = 30  # seconds between what others see of a growing file in an object store


def locate(path: str | Path) -> Any:
    """A folder or file: a pathlib.Path, or an epath.Path where the name begins with gs:// or s3://.

    Raises UserError for an unknown scheme, and for one whose library is not installed.
    """
    text = os.fspath(path)
    scheme, separator, rest = text.partition("://")
    if not separator:
        return Path(text)
    if scheme not in BACKENDS:
        raise UserError(f"{text}: unknown scheme {scheme}://; give a local folder, gs:// or s3://")
    package, extra = BACKENDS[scheme]
    if not find_spec(package):
        raise UserError(f"{text} needs {package}: pip install 'jax-it[{extra}]'")
    if not rest.strip("/"):
        raise UserError(f"{text} names no bucket; give {scheme}://BUCKET/FOLDER")
    from etils import epath

    return epath.Path(text)


def matches(pattern: Any) -> list[Any]:
    """The files that a path with wildcards names, in order. Raises UserError where an object store knows none such."""
    if not is_remote(pattern):
        return sorted(file for name in glob.glob(str(pattern), recursive=True) if (file := Path(name)).is_file())
    scheme, _, rest = os.fspath(pattern).partition("://")
    bucket, _, inside = rest.partition("/")
    if "**" in inside:
        raise UserError(f"{pattern}: ** is for local folders; name each folder, with *")
    return sorted(file for file in locate(f"{scheme}://{bucket}").glob(inside) if file.is_file())


def is_remote(path: Any) -> bool:
    return "://" in os.fspath(path)


def absolute(path: Any) -> Any:
    return path if is_remote(path) else path.absolute()


def write_atomically(file: Any, content: Any) -> None:
    """Writes JSON (or text, as it is): whole or not at all."""
    text = content if isinstance(content, str) else to_json(content, indent=2) + "\n"
    encoded = text.encode("utf-8", errors="backslashreplace")  # half a surrogate pair, as JSON has it
    if is_remote(file):
        file.write_bytes(encoded)  # which puts the object there when all of it has come
        return
    here = f".{file.name}.{platform.node()}"
    part = file.with_name(f"{here}.{os.getpid()}.part")  # two processes may write the same file
    try:
        for other in file.parent.glob(f"{glob.escape(here)}.*.part"):
            if not _runs(int(other.name.split(".")[-2])):  # it was killed while it wrote
                other.unlink(missing_ok=True)
        part.write_bytes(encoded)
        part.replace(file)
    except OSError:
        part.unlink(missing_ok=True)
        raise


def to_json(value: Any, indent: int | None = None, default: Callable[[Any], Any] | None = None) -> str:
    """JSON text, as of `json.dumps`, in which numbers that are not finite are null: JSON has none for them."""
    return json.dumps(_with_nulls(value), indent=indent, ensure_ascii=False, allow_nan=False, default=default)


def _with_nulls(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {key: _with_nulls(item) for key, item in value.items()}
    return [_with_nulls(item) for item in value] if isinstance(value, (list, tuple)) else value


def read_text(file: Any) -> str:
    """The text of a file. Raises OSError, also where it is not a regular file (reading a FIFO never ends), and
    ValueError where it is not UTF-8.
    """
    check_regular(file)
    return file.read_text(encoding="utf-8")


def read_json(file: Any) -> Any:
    """The JSON value in a file. Raises OSError as `read_text` does, and ValueError where it is not JSON."""
    try:
        return json.loads(read_text(file))
    except RecursionError:
        raise ValueError("it is nested too deeply") from None


def check_regular(file: Any) -> None:
    """Raises OSError where this is not a regular file."""
    if is_remote(file):
        return
    mode = os.stat(file).st_mode
    if stat.S_ISDIR(mode):
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(file))
    if not stat.S_ISREG(mode):
        raise OSError(errno.EINVAL, "Not a regular file", str(file))


def digests(folder: Any) -> dict[str, str]:
    """A hash of each file in a folder, by name. Raises OSError."""
    found = {}
    for file in sorted(folder.iterdir()):
        if file.is_file() and not file.name.startswith("."):
            found[file.name] = hashlib.blake2b(file.read_bytes(), digest_size=16).hexdigest()
    return found


def remedy(reason: str) -> str:
    """What to do about an error of the operating system when writing."""
    return "free space" if reason in FULL else "mend that"


def _runs(process: int) -> bool:
    """Whether this machine has such a process."""
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:  # another user's
        pass
    return True


def remove(folder: Any) -> None:
    """Removes a folder and all in it, or a file, as far as that can be done."""
    if not is_remote(folder):
        if folder.is_symlink() or not folder.is_dir():
            with suppress(OSError):
                folder.unlink()
            return
        shutil.rmtree(folder, ignore_errors=True)
        return
    with suppress(Exception):  # each library has its own errors
        folder.rmtree(missing_ok=True)


def move(folder: Any, to: Any) -> None:
    """Renames a folder within its file system; `to` must not be there."""
    if not is_remote(folder):
        folder.rename(to)
        return
    copy(folder, to)
    folder.rmtree()


def copy(folder: Any, to: Any) -> None:
    """Copies a folder's files, into or out of an object store too."""
    to.mkdir(parents=True, exist_ok=True)
    for item in folder.iterdir():
        if item.is_dir():
            copy(item, to / item.name)
            continue
        with item.open("rb") as source, (to / item.name).open("wb") as target:
            shutil.copyfileobj(source, target, 1 << 22)


@contextmanager
def read_locally(folder: Any) -> Iterator[Path]:
    """The folder, or a local copy of one in an object store, for libraries that read local files."""
    if not is_remote(folder):
        yield folder
        return
    with tempfile.TemporaryDirectory(prefix="jax_it-") as name:
        if folder.is_dir():
            copy(folder, Path(name))
        yield Path(name)


@contextmanager
def written_locally(folder: Any) -> Iterator[Path]:
    """A folder to write to: this one, or a local one whose files are copied into the object store at the end."""
    if not is_remote(folder):
        folder.mkdir(parents=True, exist_ok=True)
        yield folder
        return
    with tempfile.TemporaryDirectory(prefix="jax_it-") as name:
        yield Path(name)
        copy(Path(name), folder)


class Appending:
    """A file that grows. In an object store it is kept locally, and uploaded whole at `flush` and `close`.

    `flush` does so at most every 30 s. Raises OSError, as files do.
    """

    def __init__(self, file: Any):
        self._file, self._changed, self._uploaded = file, False, time.monotonic()
        self._place: Any = None
        local = file
        if is_remote(file):
            self._place = tempfile.TemporaryDirectory(prefix="jax_it-")
            local = Path(self._place.name) / file.name
            with suppress(FileNotFoundError):
                local.write_bytes(file.read_bytes())
        else:
            file.parent.mkdir(parents=True, exist_ok=True)
        self._stream = local.open("ab")
        self._local: Path = local

    def write(self, content: str | bytes) -> None:
        self._stream.write(content.encode() if isinstance(content, str) else content)
        self._changed = True

    def flush(self) -> None:
        self._stream.flush()
        if self._place and self._changed and time.monotonic() > self._uploaded + UPLOAD:
            self._upload()

    def close(self) -> None:
        self._stream.close()
        if self._place:
            if self._changed:
                self._upload()
            self._place.cleanup()
            self._place = None

    def _upload(self) -> None:
        self._file.write_bytes(self._local.read_bytes())
        self._changed, self._uploaded = False, time.monotonic()


def lock(stream: TextIO, refusal: str) -> None:
    """Locks an open file for this process and writes into it who that is.

    Raises UserError where another one holds it: who that is, and the refusal.
    """
    try:
        fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        stream.truncate(0)
        stream.write(f"process {os.getpid()} on {platform.node()}")
        stream.flush()
    except BlockingIOError:
        stream.seek(0)
        owner = stream.read() or "another process"
        raise UserError(f"{owner} {refusal}") from None
    except OSError:  # a file system without locks, or a full one, which the next file will tell
        pass


def lines(file: Any) -> Iterator[str]:
    """The lines of a text file, with their ends; what is no UTF-8 is replaced."""
    with file.open("rb") as stream:
        for line in stream:
            yield line.decode("utf-8", errors="replace")
