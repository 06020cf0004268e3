"""Scalars as TensorBoard reads them: protocol buffers in a file of TFRecords.

The messages are those of tensorboard/compat/proto/event.proto and summary.proto. Written by hand because tensorboardX
imports PyTorch wherever it is installed (2.6.5, whichever of its modules is imported), loses errors in a thread and
opens files by itself, not through `files`; the package tensorboard brings a web server and gRPC.
"""

import io
import math
import struct
import time
from collections.abc import Mapping
from typing import Any


class Events:
    """Write events to a new file. Its methods raise OSError where the disk is full."""

    def __init__(self, file: Any):
        self._file = file
        self._write(_text(3, b"brain.Event:2"))

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        summary = (
            _text(1, _text(1, tag.encode()) + struct.pack("<Bf", 0x15, _float32(value)))
            for tag, value in values.items()
        )
        self._write(b"\x10" + _varint(step) + _text(5, b"".join(summary)))

    def restart(self, step: int) -> None:
        """Hide what an earlier process wrote for this step and later ones."""
        self._write(b"\x10" + _varint(step) + _text(7, b"\x08\x01"))

    def flush(self) -> None:
        self._file.flush()

    def close(self) -> None:
        self._file.close()

    def _write(self, event: bytes) -> None:
        event = struct.pack("<Bd", 0x09, time.time()) + event
        length = struct.pack("<Q", len(event))
        self._file.write(length + _checksum(length) + event + _checksum(event))


def point(step: int, values: Mapping[str, float]) -> bytes:
    """Return a whole file of events with the scalars of one step."""
    file = io.BytesIO()
    Events(file).scalars(step, values)
    return file.getvalue()


def _float32(value: float) -> float:
    """Return a number that fits into 32 bits: infinity if it is too large for them."""
    try:
        struct.pack("<f", value)
    except OverflowError:
        return math.copysign(math.inf, value)
    return value


def _text(field: int, content: bytes) -> bytes:
    """Encode a field with a length: a text, or a message within the message."""
    return bytes([field << 3 | 2]) + _varint(len(content)) + content


def _varint(number: int) -> bytes:
    parts = []
    while number > 127:
        parts.append(number & 127 | 128)
        number >>= 7
    return bytes([*parts, number])


def _checksum(content: bytes) -> bytes:
    """Return the masked CRC-32C of a TFRecord."""
    crc = 0xFFFFFFFF
    for byte in content:
        crc = _CRC32C[(crc ^ byte) & 0xFF] ^ (crc >> 8)
    crc ^= 0xFFFFFFFF
    return struct.pack("<I", ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF)


def _crc32c_of(byte: int) -> int:
    for _ in range(8):
        byte = byte >> 1 ^ (0x82F63B78 if byte & 1 else 0)
    return byte


_CRC32C = [_crc32c_of(byte) for byte in range(256)]
