"""A model's folder: found locally or downloaded from the hub, and a hash that notices other weights in it."""

import hashlib
from pathlib import Path

from jax_it import files, hosts
from jax_it.errors import UserError, first_line

_SAMPLES = 64  # of each file, of 64 KiB


def find_folder(path: str) -> Path:
    """Return a local folder, or the local copy of a hub repository, downloaded where it is not there yet."""
    if (folder := files.locate_local(path, "model")).is_dir():
        return folder
    if path.startswith((".", "/", "~")) or path.count("/") > 1:
        raise UserError(f"model folder {path} does not exist")
    if path not in _fetched:  # by every host the first time: they wait for each other
        with hosts.first_then_others():
            _fetched[path] = _fetch(path)
    return _fetched[path]


_fetched: dict[str, Path] = {}  # the folders of hub names


def _fetch(path: str) -> Path:
    import huggingface_hub  # slow to import, and needed for names alone
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        patterns = ["*.json", "*.safetensors", "*.model", "*.txt", "*.jinja", "README.md"]
        return Path(huggingface_hub.snapshot_download(path, allow_patterns=patterns))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        reason = first_line(error)
        raise UserError(
            f"model {path!r} is not a local folder and could not be fetched from the hub: {reason}"
        ) from error


def fingerprint(folder: Path) -> str:
    """Return a hash of the names, sizes, headers and samples of a folder's weights: enough to notice other ones."""
    parts = hashlib.blake2b(digest_size=16)
    for file in sorted(folder.glob("*.safetensors")):
        if not file.is_file():
            raise UserError(f"{file} is not a regular file; restore it")
        size = file.stat().st_size
        parts.update(f"{file.name} {size}".encode())
        with file.open("rb") as stream:
            header = int.from_bytes(stream.read(8), "little")
            parts.update(stream.read(min(header, size)))
            for i in range(_SAMPLES):
                stream.seek(8 + header + (size - 8 - header) * i // _SAMPLES)
                parts.update(stream.read(1 << 16))
    return parts.hexdigest()
