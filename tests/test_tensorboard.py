"""What is written is what TensorBoard's format says, by a reader of its own."""

import math
import struct

from jax_it import tensorboard


def records(content):
    """The events of a file of TFRecords, whose checksums are not looked at."""
    while content:
        (length,) = struct.unpack("<Q", content[:8])
        yield content[12 : 12 + length]
        content = content[16 + length :]


def fields(message):
    """(number, value) of each field of a protocol buffer."""
    while message:
        key, message = varint(message)
        number, kind = key >> 3, key & 7
        if kind == 0:
            value, message = varint(message)
        elif kind == 2:
            size, message = varint(message)
            value, message = message[:size], message[size:]
        else:
            size = {1: 8, 5: 4}[kind]
            value, message = struct.unpack("<d" if kind == 1 else "<f", message[:size])[0], message[size:]
        yield number, value


def varint(message):
    value = 0
    for i, byte in enumerate(message):
        value |= (byte & 127) << 7 * i
        if byte < 128:
            return value, message[i + 1 :]
    raise ValueError


def test_the_file_of_a_step_has_its_scalars():
    version, event = records(tensorboard.point(300, {"eval/all/loss": 1.5, "eval/sums/rougeL": 33.25}))
    assert dict(fields(version))[3] == b"brain.Event:2"
    event = dict(fields(event))
    assert event[2] == 300
    values = [dict(fields(value)) for number, value in fields(event[5]) if number == 1]
    assert [(value[1], value[2]) for value in values] == [(b"eval/all/loss", 1.5), (b"eval/sums/rougeL", 33.25)]


def test_a_number_too_large_for_32_bits_is_shown_as_infinite():
    values = {"perplexity": 1e39, "least": -1e39, "most": 3.4e38, "infinite": math.inf, "none": math.nan}
    _, event = records(tensorboard.point(1, values))
    found = [dict(fields(value))[2] for number, value in fields(dict(fields(event))[5]) if number == 1]
    assert found[0] == math.inf == found[3] and found[1] == -math.inf
    assert 3.3e38 < found[2] < math.inf and math.isnan(found[4])
