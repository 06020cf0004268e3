"""Files in local folders and in object stores (gs://, s3://).

A path that may lie in an object store is an `epath.Path`, as in Orbax; a `pathlib.Path` is always local. An object
store cannot append to a file, lock it or link to it, and it shows a file only when all of it has been written. `local`
tells the two kinds of path apart.
"""

import errno
import fcntl
import glob
import hashlib
import io
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
from typing import IO, Any, BinaryIO

from etils import epath

from jax_it.errors import UserError, shorten

BACKENDS = {"gs": ("gcsfs", "gcs"), "s3": ("s3fs", "s3")}  # scheme: package, and our extra that installs it
FULL = tuple(map(os.strerror, (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)))  # the disk is full
NAME = 255  # bytes in a file name at most
_SURROGATE = re.compile("[\ud800-\udfff]")  # half of a pair: JSON can escape it, UTF-8 cannot encode it
UPLOAD = 30  # seconds between uploads of a growing file to an object store


def locate(path: str | os.PathLike[str], option: str = "") -> epath.Path:
    """Return the path of a folder or file, local or in an object store (gs://, s3://).

    `~` and `~USER` are home folders. `option` is what names the path, for messages. Raises UserError for a name that
    no file can have, for an unknown scheme, and for one whose library is not installed.
    """
    text = os.fspath(path)
    if not text:
        raise UserError(f"{option or 'a path'} is empty; name a folder or a file")
    shown = f"{option} {shorten(text, 200)}".strip()
    scheme = _scheme(text)
    if not scheme:
        return _epath(_local(text, shown))
    rest = text.partition(":")[2]
    if scheme not in BACKENDS:
        raise UserError(f"{shown}: unknown scheme {scheme}://; give a local folder, gs:// or s3://")
    if not rest.startswith("//"):
        raise UserError(f"{shown}: write {scheme}://{rest.lstrip('/')} for the object store")
    package, extra = BACKENDS[scheme]
    if not find_spec(package):
        raise UserError(f"{shown} needs {package}: pip install 'jax-it[{extra}]'")
    if not rest.strip("/"):
        raise UserError(f"{shown} has no bucket; give {scheme}://BUCKET/FOLDER")
    from fsspec.config import conf  # slow to import, and needed for object stores alone

    # By default a process never sees files that others add to a folder after it listed it.
    conf.setdefault(scheme, {})["use_listings_cache"] = False
    return epath.Path(text)


def locate_local(path: str | os.PathLike[str], option: str) -> Path:
    """Return the path of a local folder or file. Raises UserError for one in an object store."""
    text = os.fspath(path)
    if scheme := _scheme(text):
        shown = f"{option} {shorten(text, 200)}".strip()
        raise UserError(f"{shown}: {scheme}:// is not supported here; give a local path")
    return Path(locate(text, option))


def local(path: os.PathLike[str]) -> Path | None:
    """Return a local path, for operations that need the operating system; None for one in an object store."""
    text = os.fspath(path)
    return None if "://" in text else Path(text)  # a path has no // inside


def absolute(path: epath.Path) -> epath.Path:
    """Return the absolute path; epath's own method takes gs://BUCKET for the name of a local folder."""
    found = local(path)
    return path if found is None else _epath(found.absolute())


def _epath(path: Path) -> epath.Path:
    """Return a local path as an epath.Path, which takes /gs/x for gs://x but leaves //gs/x, the same folder, alone."""
    found = epath.Path(path)
    return found if local(found) else epath.Path(f"/{path}")


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
            f"{shown}: {user} is not a known home folder; write ./{shorten(text, 200)} for a file of that name"
        )
    try:
        text.encode()
    except UnicodeEncodeError:  # the libraries that read and write files accept only UTF-8
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


def matches(pattern: epath.Path) -> list[epath.Path]:
    """Return the files that a path with wildcards names, in order. Raises UserError for ** in an object store."""
    path = local(pattern)
    if path is not None:
        found = [_epath(Path(name)) for name in glob.glob(str(path), recursive=True)]
    elif "**" in str(pattern):
        raise UserError(f"{pattern}: ** is for local folders; name each folder, with *")
    else:
        found = list(pattern.parent.glob(pattern.name))
    return sorted(file for file in found if not file.is_dir())


def write_atomically(file: Path | epath.Path, content: Any) -> None:
    """Write JSON, or a string as it is: whole or not at all.

    What a symbolic link points to is replaced, not the link. A device or a pipe is written to as it is.
    """
    text = content if isinstance(content, str) else to_json(content, indent=2) + "\n"
    with open_atomically(file) as stream:
        stream.write(text.encode("utf-8", errors="backslashreplace"))  # half a surrogate pair is escaped as in JSON


@contextmanager
def open_atomically(file: Path | epath.Path) -> Iterator[BinaryIO]:
    """Yield a stream whose content replaces a file when the block ends without an error, and is discarded otherwise.

    What a symbolic link points to is replaced, not the link. A device or a pipe is written to as it is. Raises OSError.
    """
    if local(file) is None:
        with tempfile.TemporaryFile() as spool:
            yield spool
            spool.seek(0)
            with open_binary(file, "wb") as target:  # the object appears only when it is complete
                shutil.copyfileobj(spool, target, 1 << 22)
        return
    if is_stream(file):
        with _open_stream(file) as stream:
            yield stream
        return
    file = Path(os.path.realpath(file))
    part = file.with_name(f"{_own_names(file.parent, f'.{file.name}.')}part")  # two may write the same file
    try:
        with part.open("wb") as stream:
            yield stream
        if file.exists():
            shutil.copymode(file, part)
        part.replace(file)
    finally:
        part.unlink(missing_ok=True)


@contextmanager
def new_folder(parent: Path, prefix: str) -> Iterator[Path]:
    """Make a new folder with a unique name, to be filled and renamed; remove it at the end if it is still there.

    Also removes those left by killed processes.
    """
    folder = Path(tempfile.mkdtemp(prefix=_own_names(parent, prefix), dir=parent))
    try:
        yield folder
    finally:
        remove(folder)


def _own_names(folder: Path, prefix: str) -> str:
    """Return how names of this process's temporary files begin; remove those of processes that were killed."""
    # Cut so that the whole name fits into 255 bytes.
    here = f"{os.fsdecode(os.fsencode(prefix)[:120])}{platform.node()[:64]}."
    for other in folder.glob(f"{glob.escape(here)}*"):
        process = other.name.removeprefix(here).partition(".")[0]
        if process.isdecimal() and not _runs(int(process)):
            remove(other)
    return f"{here}{os.getpid()}."


def is_stream(file: os.PathLike[str]) -> bool:
    """Return whether this exists and is neither a regular file nor a folder: a device or a pipe, as /dev/stdout is."""
    if local(file) is None:
        return False
    if _descriptor(file) is not None:
        return True
    try:
        mode = os.stat(file).st_mode
    except OSError:
        return False
    return not (stat.S_ISREG(mode) or stat.S_ISDIR(mode))


def _descriptor(file: os.PathLike[str]) -> int | None:
    """Return the file descriptor that /dev/stdout and the like stand for, which may be that of a regular file."""
    names = {"/dev/stdout": "1", "/dev/stderr": "2"}
    text = names.get(os.fspath(file)) or (re.match(r"/(?:dev|proc/self)/fd/(\d+)$", os.fspath(file)) or ["", ""])[1]
    return int(text) if text and len(text) < 10 else None


def _open_stream(file: os.PathLike[str]) -> BinaryIO:
    """Open a device or pipe. Raises OSError for a pipe without a reader, which would block."""
    descriptor = _descriptor(file)
    if descriptor is None:
        opened = os.open(file, os.O_WRONLY | os.O_NONBLOCK | os.O_NOCTTY)
        os.set_blocking(opened, True)
    else:
        sys.stdout.flush()  # earlier output comes first
        opened = os.dup(descriptor)
    return os.fdopen(opened, "wb")


def locate_output(path: str | os.PathLike[str], option: str) -> epath.Path:
    """Return the output file that an option names, before the work whose result it gets.

    Raises UserError if it cannot be written.
    """
    file = locate(path, option)
    if local(file) is None or is_stream(file):
        return file
    folder = Path(os.path.realpath(file)).parent
    if file.is_dir() or not folder.is_dir():
        raise UserError(f"{option}: cannot write {file}: it must be a file in a folder that exists")
    if reason := unwritable(folder):
        raise UserError(f"{option}: cannot write {file}: {reason}; {remedy(reason)} or name another file")
    return file


def unwritable(folder: Path | epath.Path) -> str:
    """Return why a local folder cannot be written to or created, "" if it can; nothing is created."""
    if local(folder) is None:
        return ""
    there = Path(os.path.realpath(folder))
    while not os.path.lexists(there):
        there = there.parent
    try:
        tempfile.TemporaryFile(dir=there).close()
    except OSError as error:
        return error.strerror or str(error)
    return ""


def write_output(file: Path | epath.Path, content: Any, option: str) -> None:
    """Write a file that `locate_output` returned, and print a line if it replaces another.

    Raises UserError if that fails.
    """
    replaced = not is_stream(file) and file.is_file()
    try:
        write_atomically(file, content)
    except OSError as error:
        reason = error.strerror or str(error)
        raise UserError(f"{option}: cannot write {file}: {reason}; {remedy(reason)} or name another file") from error
    if replaced:
        print(f"{option}: {file} existed and has been replaced", file=sys.stderr)


def remedy(reason: object) -> str:
    """Return how to fix a file that could not be written, given the operating system's reason."""
    return "free space" if str(reason) in FULL else "fix that"


def to_json(value: Any, indent: int | None = None, default: Callable[[Any], Any] | None = None) -> str:
    """Return JSON as `json.dumps` does, with null for numbers that are not finite, which JSON cannot represent."""
    return json.dumps(_with_nulls(value), indent=indent, ensure_ascii=False, allow_nan=False, default=default)


def _with_nulls(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {key: _with_nulls(item) for key, item in value.items()}
    return [_with_nulls(item) for item in value] if isinstance(value, (list, tuple)) else value


def open_binary(file: Path | epath.Path, mode: str = "rb") -> io.BufferedIOBase:
    """Open a binary file; epath's own method is declared to open a text file."""
    stream: Any = file.open(mode)
    return stream


def read_text(file: Path | epath.Path) -> str:
    """Return the text of a file. Raises OSError, also if it is not a regular file (reading a FIFO never ends), and
    ValueError if it is not UTF-8.
    """
    check_regular(file)
    return file.read_text(encoding="utf-8")


def read_json(file: Path | epath.Path) -> Any:
    """Return the JSON value in a file. Raises OSError as `read_text` does, and ValueError where it is not JSON."""
    try:
        return json.loads(read_text(file))
    except RecursionError:
        raise ValueError("it is nested too deeply") from None


def check_regular(file: os.PathLike[str]) -> None:
    """Raise OSError where this is not a regular file: reading a pipe may never end."""
    path = local(file)
    if path is None:
        return
    mode = os.stat(path).st_mode
    if stat.S_ISDIR(mode):
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
    if not stat.S_ISREG(mode):
        raise OSError(errno.EINVAL, "Not a regular file", str(path))


def check_all_regular(folder: epath.Path, pattern: str = "**/*") -> None:
    """Raise OSError where a local folder holds something that is neither a regular file nor a folder."""
    path = local(folder)
    for file in sorted(path.glob(pattern)) if path else ():
        if not file.is_dir():
            check_regular(file)


def is_regular(file: epath.Path) -> bool:
    """Return whether this is a regular file; epath's `is_file` takes a pipe for one."""
    return file.is_file() if local(file) is None else os.path.isfile(file)


def is_there(path: epath.Path) -> bool:
    """Return whether anything has this name, even a broken link."""
    return path.exists() if local(path) is None else os.path.lexists(path)


def digests(folder: epath.Path) -> dict[str, str]:
    """Return a hash of each file in a folder, by name. Raises OSError."""
    found = {}
    for file in sorted(folder.iterdir()):
        if is_regular(file) and not file.name.startswith("."):
            found[file.name] = hashlib.blake2b(file.read_bytes(), digest_size=16).hexdigest()
    return found


def _runs(process: int) -> bool:
    """Return whether this machine has such a process."""
    try:
        os.kill(process, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:  # another user's
        pass
    return True


def read_json_object(file: Path | epath.Path) -> dict[str, Any]:
    """Read a JSON object. Raises FileNotFoundError, and UserError for anything else that is wrong with the file.

    A key that occurs twice is an error, where Python would take the last one, and so are NaN and Infinity.
    """
    try:
        values = json.loads(read_text(file), object_pairs_hook=_strict_object)
    except FileNotFoundError:
        raise
    except OSError as error:
        raise UserError(f"{file} cannot be read: {error.strerror or error}") from None
    except (ValueError, RecursionError) as error:
        reason = "it is nested too deeply" if isinstance(error, RecursionError) else error
        raise UserError(f"{file} is not valid JSON: {reason}") from None
    if not isinstance(values, dict):
        raise UserError(f"{file} is not a JSON object")
    try:
        json.dumps(values, ensure_ascii=False).encode()
    except UnicodeEncodeError as error:
        half = error.object[error.start]
        raise UserError(f"{file} holds {half!r}, half of a surrogate pair, which is not Unicode text") from None
    return values


def _strict_object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) < len(pairs):
        keys = [key for key, _ in pairs]
        raise ValueError(f"the key {next(key for key in keys if keys.count(key) > 1)[:100]!r} occurs twice; remove one")
    for key, value in pairs:
        if any(isinstance(text, str) and _SURROGATE.search(text) for text in (key, value)):
            raise ValueError(f"{key[:100]!a} has half of a surrogate pair, which is not text")
        if (name := _not_finite(value)) is not None:
            raise ValueError(f"{key[:100]!r} has the value {name}, which is not a JSON number")
    return values


def _not_finite(value: Any) -> str | None:
    """Return what Python's JSON calls a number that is not finite, or the first one in a list; None without one."""
    if isinstance(value, list):
        return next((name for item in value if (name := _not_finite(item)) is not None), None)
    return json.dumps(value) if isinstance(value, float) and not math.isfinite(value) else None


def remove(path: Path | epath.Path) -> None:
    """Remove a folder and all in it, or a file, as far as that can be done."""
    found = local(path)
    if found is None:
        with suppress(Exception):  # each library has its own errors
            epath.Path(path).rmtree()
    elif found.is_dir() and not found.is_symlink():
        shutil.rmtree(found, ignore_errors=True)
    else:
        with suppress(OSError):
            found.unlink()


def copy(folder: Path | epath.Path, to: Path | epath.Path) -> None:
    """Copy a folder's files, into or out of an object store too."""
    to.mkdir(parents=True, exist_ok=True)
    for item in folder.iterdir():
        if item.is_dir():
            copy(item, to / item.name)
            continue
        with open_binary(item) as source, open_binary(to / item.name, "wb") as target:
            shutil.copyfileobj(source, target, 1 << 22)


@contextmanager
def read_locally(folder: epath.Path) -> Iterator[Path]:
    """Yield the folder, or a local copy of one in an object store, for libraries that read local files."""
    if path := local(folder):
        yield path
        return
    with tempfile.TemporaryDirectory(prefix="jax_it-") as name:
        if folder.is_dir():
            copy(folder, Path(name))
        yield Path(name)


@contextmanager
def written_locally(folder: epath.Path) -> Iterator[Path]:
    """Yield the folder to write to, or a local one whose files are copied into the object store at the end."""
    if path := local(folder):
        path.mkdir(parents=True, exist_ok=True)
        yield path
        return
    with tempfile.TemporaryDirectory(prefix="jax_it-") as name:
        yield Path(name)
        copy(Path(name), folder)


class Appending:
    """A file that grows. In an object store it is kept locally, and uploaded whole at `flush` and `close`.

    `flush` does so at most every 30 s. Raises OSError, as files do.
    """

    def __init__(self, file: epath.Path):
        self._file, self._changed, self._uploaded = file, False, time.monotonic()
        self._temporary: tempfile.TemporaryDirectory[str] | None = None
        path = local(file)
        if path is None:
            self._temporary = tempfile.TemporaryDirectory(prefix="jax_it-")
            path = Path(self._temporary.name) / file.name
            with suppress(FileNotFoundError):
                path.write_bytes(file.read_bytes())
        else:
            path.parent.mkdir(parents=True, exist_ok=True)
        self._path, self._stream = path, path.open("ab")

    def write(self, content: str | bytes) -> None:
        self._stream.write(content.encode() if isinstance(content, str) else content)
        self._changed = True

    def flush(self) -> None:
        self._stream.flush()
        if self._temporary and self._changed and time.monotonic() > self._uploaded + UPLOAD:
            self._upload()

    def close(self) -> None:
        self._stream.close()
        if self._temporary:
            if self._changed:
                self._upload()
            self._temporary.cleanup()
            self._temporary = None

    def _upload(self) -> None:
        self._file.write_bytes(self._path.read_bytes())
        self._changed, self._uploaded = False, time.monotonic()


@contextmanager
def locked(file: epath.Path, refusal: str, advice: str) -> Iterator[None]:
    """Lock a file for this process, write the process into it, and remove it at the end; do nothing in an object store.

    The lock is the operating system's: it ends with the process, however that ends. Raises UserError where another
    process holds it (who that is, and the `refusal`), and with the `advice` where the file cannot be written.
    """
    path = local(file)
    if path is None:
        yield
        return
    with _lock(path, refusal, advice):
        try:
            yield
        finally:
            with suppress(OSError):
                path.unlink()


@contextmanager
def locked_output(file: epath.Path, option: str) -> Iterator[None]:
    """Keep other processes from writing an output file that `locate_output` returned, unless it is a device or a pipe.

    Raises UserError where another one is writing it.
    """
    if is_stream(file):
        yield
        return
    target = _epath(Path(os.path.realpath(file))) if local(file) else file  # a link and its target are one output
    lock = target.with_name(f".{target.name}.lock")
    with locked(lock, f"is writing {file}; wait for it, or give another {option}", f"give another {option}"):
        yield


def _lock(path: Path, refusal: str, advice: str) -> IO[str]:
    """Return the file, open and locked."""
    while True:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            stream = path.open("a+", encoding="utf-8")
        except OSError as error:
            raise UserError(f"cannot write to {path.parent}: {error.strerror or error}; {advice}") from error
        try:
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if not _is_open(path, stream):  # its holder removed it before it was locked here: others make a new one
                stream.close()
                continue
            stream.truncate(0)
            stream.write(f"process {os.getpid()} on {platform.node()}")
            stream.flush()
        except BlockingIOError:
            with stream:
                stream.seek(0)
                owner = stream.read() or "another process"
            raise UserError(f"{owner} {refusal}") from None
        except OSError:  # a file system without locks, or a full one, which the next write will report
            pass
        return stream


def _is_open(path: Path, stream: IO[str]) -> bool:
    """Return whether the file of this name is the open one."""
    try:
        return os.path.samestat(os.stat(path), os.fstat(stream.fileno()))
    except FileNotFoundError:
        return False


def lines(file: epath.Path) -> Iterator[str]:
    """Yield the lines of a text file, with their ends; what is not UTF-8 is replaced."""
    with open_binary(file) as stream:
        for line in stream:
            yield line.decode("utf-8", errors="replace")
