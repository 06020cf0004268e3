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
import re
import shutil
import stat
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from importlib.util import find_spec
from pathlib import Path
from typing import Any, BinaryIO, TextIO

from jax_it.errors import UserError, shorten

BACKENDS = {"gs": ("gcsfs", "gcs"), "s3": ("s3fs", "s3")}  # scheme: package, and our extra that installs it
FULL = tuple(map(os.strerror, (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)))  # of a disk without space
NAME = 255  # bytes of a file's name
_SURROGATE = re.compile("[\ud800-\udfff]")  # half of a pair: JSON can escape one, and UTF-8 has none
UPLOAD = 30  # seconds between what others see of a growing file in an object store


def locate(path: str | Path, option: str = "") -> Any:
    """A folder or file: a pathlib.Path, or an epath.Path where the name begins with gs:// or s3://.

    `~` and `~USER` are home folders. `option` is what names the path, for messages. Raises UserError for a name that
    can be no file's, for an unknown scheme, and for one whose library is not installed.
    """
    text = os.fspath(path)
    if not text:
        raise UserError(f"{option or 'a path'} is empty; name a folder or a file")
    shown = f"{option} {shorten(text, 200)}".strip()
    scheme = _scheme(text)
    if not scheme:
        return _local(text, shown)
    rest = text.partition(":")[2]
    if scheme not in BACKENDS:
        raise UserError(f"{shown}: unknown scheme {scheme}://; give a local folder, gs:// or s3://")
    if not rest.startswith("//"):
        raise UserError(f"{shown}: write {scheme}://{rest.lstrip('/')} for the object store")
    package, extra = BACKENDS[scheme]
    if not find_spec(package):
        raise UserError(f"{shown} needs {package}: pip install 'jax-it[{extra}]'")
    if not rest.strip("/"):
        raise UserError(f"{shown} names no bucket; give {scheme}://BUCKET/FOLDER")
    from etils import epath

    return epath.Path(text)


def locate_local(path: str | Path, option: str) -> Path:
    """The same where only a local folder or file will do. Raises UserError for one in an object store."""
    if scheme := _scheme(os.fspath(path)):
        shown = f"{option} {shorten(os.fspath(path), 200)}".strip()
        raise UserError(f"{shown}: {scheme}:// is not supported here; give a local path")
    local: Path = locate(path, option)
    return local


def _scheme(text: str) -> str:
    """ "gs" of gs://BUCKET, and of gs:/BUCKET, which is what pathlib makes of it."""
    scheme, separator, rest = text.partition(":")
    found = separator and re.fullmatch(r"[A-Za-z][A-Za-z0-9+.-]*", scheme)
    return scheme if found and (rest.startswith("//") or (scheme in BACKENDS and rest.startswith("/"))) else ""


def _local(text: str, shown: str) -> Path:
    home = os.path.expanduser(text)
    if home.startswith("~"):
        user = text.partition("/")[0]
        raise UserError(
            f"{shown}: {user} is nobody's home folder; write ./{shorten(text, 200)} for a file of that name"
        )
    try:
        text.encode()
    except UnicodeEncodeError:  # the libraries that read and write files take no other names
        raise UserError(f"{shown}: this name is not UTF-8; give another path") from None
    if max(len(os.fsencode(part)) for part in (*Path(home).parts, ".")) > NAME:
        raise UserError(f"{shown}: {os.strerror(errno.ENAMETOOLONG)}; give another path")
    try:
        os.stat(home)
    except OSError as error:
        if error.errno in (errno.ENAMETOOLONG, errno.ELOOP):
            raise UserError(f"{shown}: {error.strerror}; give another path") from None
    except ValueError:
        raise UserError(f"{shown}: no file can have a name with a null byte; give another path") from None
    return Path(home)


def matches(pattern: Any) -> list[Any]:
    """What a path with wildcards names but for folders, in order. Raises UserError where a store knows none such."""
    if not is_remote(pattern):
        return sorted(file for name in glob.glob(str(pattern), recursive=True) if not (file := Path(name)).is_dir())
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
    """Writes JSON (or text, as it is): whole or not at all.

    What a symbolic link points to is replaced, not the link. A device or a pipe is written to as it is.
    """
    text = content if isinstance(content, str) else to_json(content, indent=2) + "\n"
    encoded = text.encode("utf-8", errors="backslashreplace")  # half a surrogate pair, as JSON has it
    if is_remote(file):
        file.write_bytes(encoded)  # which puts the object there when all of it has come
        return
    if is_stream(file):
        with _open_stream(file) as stream:
            stream.write(encoded)
        return
    file = Path(os.path.realpath(file))
    part = file.with_name(f"{_own_names(file.parent, f'.{file.name}.')}part")  # two may write the same file
    try:
        part.write_bytes(encoded)
        if file.exists():
            shutil.copymode(file, part)
        part.replace(file)
    except OSError:
        part.unlink(missing_ok=True)
        raise


@contextmanager
def new_folder(parent: Path, prefix: str) -> Iterator[Path]:
    """A new folder with a name of its own, to be filled and renamed: at the end it is removed if it is still there.

    Those that killed processes have left are removed as well.
    """
    folder = Path(tempfile.mkdtemp(prefix=_own_names(parent, prefix), dir=parent))
    try:
        yield folder
    finally:
        remove(folder)


def _own_names(folder: Path, prefix: str) -> str:
    """How the names of this process's temporary files begin; what has one of a process that was killed is removed."""
    # So much of the name that the longest one still fits into 255 bytes.
    here = f"{os.fsdecode(os.fsencode(prefix)[:120])}{platform.node()[:64]}."
    for other in folder.glob(f"{glob.escape(here)}*"):
        process = other.name.removeprefix(here).partition(".")[0]
        if process.isdecimal() and not _runs(int(process)):
            remove(other)
    return f"{here}{os.getpid()}."


def is_stream(file: Any) -> bool:
    """Whether it is there and neither a regular file nor a folder: a device or a pipe, such as /dev/stdout."""
    if is_remote(file):
        return False
    if _descriptor(file) is not None:
        return True
    try:
        mode = os.stat(file).st_mode
    except OSError:
        return False
    return not (stat.S_ISREG(mode) or stat.S_ISDIR(mode))


def _descriptor(file: Any) -> int | None:
    """The number of the open file that /dev/stdout and its like stand for, which may be a regular one."""
    names = {"/dev/stdout": "1", "/dev/stderr": "2"}
    text = names.get(os.fspath(file)) or (re.match(r"/(?:dev|proc/self)/fd/(\d+)$", os.fspath(file)) or ["", ""])[1]
    return int(text) if text and len(text) < 10 else None


def _open_stream(file: Any) -> BinaryIO:
    """Raises OSError for a pipe that nobody reads, which would be waited for."""
    descriptor = _descriptor(file)
    if descriptor is None:
        opened = os.open(file, os.O_WRONLY | os.O_NONBLOCK | os.O_NOCTTY)
        os.set_blocking(opened, True)
    else:
        sys.stdout.flush()  # what was printed before comes before
        opened = os.dup(descriptor)
    return os.fdopen(opened, "wb")


def locate_output(path: str | Path, option: str) -> Any:
    """The file that an option names to be written, before the work whose result it gets.

    Raises UserError where it could not be written.
    """
    file = locate(path, option)
    if is_remote(file) or is_stream(file):
        return file
    folder = Path(os.path.realpath(file)).parent
    if file.is_dir() or not folder.is_dir():
        raise UserError(f"{option}: cannot write {file}: it must be a file in a folder that exists")
    if reason := unwritable(folder):
        raise UserError(f"{option}: cannot write {file}: {reason}; {remedy(reason)} or name another file")
    return file


def unwritable(folder: Any) -> str:
    """Why a local folder cannot be written to, or made, "" if it can; it is not made."""
    if is_remote(folder):
        return ""
    there = Path(os.path.realpath(folder))
    while not os.path.lexists(there):
        there = there.parent
    try:
        tempfile.TemporaryFile(dir=there).close()
    except OSError as error:
        return error.strerror or str(error)
    return ""


def write_output(file: Any, content: Any, option: str) -> None:
    """Writes what `locate_output` has returned, and says so where it takes the place of another file.

    Raises UserError where that fails.
    """
    replaced = not is_stream(file) and file.is_file()
    try:
        write_atomically(file, content)
    except OSError as error:
        reason = error.strerror or str(error)
        raise UserError(f"{option}: cannot write {file}: {reason}; {remedy(reason)} or name another file") from error
    if replaced:
        print(f"{option}: {file} was there and has been replaced", file=sys.stderr)


def remedy(reason: object) -> str:
    """What to do about a file that could not be written, for what the operating system said of it."""
    return "free space" if str(reason) in FULL else "fix that"


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


def _runs(process: int) -> bool:
    """Whether this machine has such a process."""
    try:
        os.kill(process, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:  # another user's
        pass
    return True


def read_json_object(file: Path) -> dict[str, Any]:
    """Reads a JSON object. Raises FileNotFoundError, and UserError for anything else that is wrong with the file.

    A key that occurs twice is an error, where Python would take the last one, and so are NaN and Infinity.
    """
    try:
        values = json.loads(read_text(file), object_pairs_hook=_unique, parse_constant=_refuse_constant)
    except FileNotFoundError:
        raise
    except OSError as error:
        raise UserError(f"{file} cannot be read: {error.strerror or error}") from None
    except (ValueError, RecursionError) as error:
        reason = "it is nested too deeply" if isinstance(error, RecursionError) else error
        raise UserError(f"{file} is not valid JSON: {reason}") from None
    if not isinstance(values, dict):
        raise UserError(f"{file} holds no JSON object")
    try:
        json.dumps(values, ensure_ascii=False).encode()
    except UnicodeEncodeError as error:
        half = error.object[error.start]
        raise UserError(f"{file} holds {half!r}, half of a surrogate pair, which is not Unicode text") from None
    return values


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) < len(pairs):
        keys = [key for key, _ in pairs]
        raise ValueError(f"the key {next(key for key in keys if keys.count(key) > 1)[:100]!r} occurs twice; remove one")
    for key, value in pairs:
        if any(isinstance(text, str) and _SURROGATE.search(text) for text in (key, value)):
            raise ValueError(f"{key[:100]!a} has half of a surrogate pair, which is not text")
    return values


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is not a JSON number")


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
