"""Devices that are not there: a TPU slice that libtpu describes, or fake ones on the CPU."""

import contextlib
import importlib.util
import math
import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import jax
from jax.experimental import topologies

from jax_it.chips import Chip, chip_of
from jax_it.errors import UserError, shorten

MOST = 4096  # fake devices, each of which takes memory
EXAMPLES = "v5e:8x8, v5p:4x4x4, v6e:16x16 or cpu:8"

# libtpu looks for a TPU, its host's name and its metadata server unless it is told that it is alone; several
# processes may compile at a time, since none opens a device.
_ALONE = {
    "TPU_SKIP_MDS_QUERY": "1", "TPU_ACCELERATOR_TYPE": "v5litepod-8", "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_WORKER_ID": "0", "ALLOW_MULTIPLE_LIBTPU_LOAD": "1", "TPU_STDERR_LOG_LEVEL": "3", "TPU_MIN_LOG_LEVEL": "3",
    "TF_CPP_MIN_LOG_LEVEL": "3",
}  # fmt: skip


@dataclass(frozen=True)
class Topology:
    """Devices to compile for, one a chip."""

    name: str
    devices: tuple[Any, ...]
    chip: Chip | None  # None: nothing is known of them

    @property
    def is_tpu(self) -> bool:
        return bool(self.devices[0].platform == "tpu")

    @cached_property
    def slices(self) -> int:
        return len({slice_of(device) for device in self.devices})

    @cached_property
    def shape(self) -> tuple[int, ...]:
        """Chips of a slice along each dimension of its torus."""
        coords = [place_of(device) for device in self.devices]
        return tuple(max(at) + 1 for at in zip(*coords, strict=True))

    def is_ring(self, dimension: int) -> bool:
        """Whether the last chip along a dimension is a neighbour of the first, by a link of its own."""
        size, rings_of = self.shape[dimension], self.chip.rings_of if self.chip else 0
        return bool(rings_of) and size % rings_of == 0


def slice_of(device: Any) -> int:
    return getattr(device, "slice_index", 0) or 0


def place_of(device: Any) -> tuple[int, ...]:
    """Where in its slice a chip is."""
    return tuple(getattr(device, "coords", (device.id,)))


def find(name: str, slices: int = 1) -> Topology:
    """The devices of "v5e:8x8" (of so many such slices), or "cpu:8". Raises UserError for what there is not."""
    kind, _, size = name.partition(":")
    if kind == "cpu":
        return _cpu(name, size, slices)
    if not re.fullmatch(r"v\d+[a-z]*:\d+(x\d+){1,2}", name):
        raise UserError(f"--topology {shorten(name)} is not one; write for example {EXAMPLES}")
    _configure("jax_platforms", "cpu")  # keeps off an accelerator that is there
    dims = [int(d) for d in size.split("x")]
    options: dict[str, Any] = {"num_slices": slices}
    if any(d % 2 for d in dims) and math.prod(dims) <= 4:  # a part of a host
        options["chips_per_host_bounds"] = (*dims, *[1] * (3 - len(dims)))
    if kind == "v4":
        options["chip_config_name"] = "megacore"  # its two cores as one device, as in training
    if not has_libtpu():
        raise UserError(
            f"--topology {name} needs libtpu, which is not installed: pip install 'jax-it[tpu]', or plan for cpu:8"
        )
    try:
        with _alone():
            devices: Sequence[Any] = topologies.get_topology_desc(name, "tpu", **options).devices
    except Exception as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise UserError(
            f"--topology {name} is none that libtpu knows ({reason}); write for example {EXAMPLES}"
        ) from None
    return Topology(name, tuple(devices), chip_of(devices[0].device_kind))


@contextlib.contextmanager
def _alone() -> Iterator[None]:
    """The environment that libtpu reads as it is loaded; others who look for a TPU in it must not find one."""
    before = {name: os.environ.get(name) for name in _ALONE}
    os.environ.update(_ALONE)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


def has_libtpu() -> bool:
    return importlib.util.find_spec("libtpu") is not None


def _configure(option: str, value: Any) -> None:
    """Sets an option of JAX; without effect once it has looked for devices."""
    with contextlib.suppress(RuntimeError):
        jax.config.update(option, value)


def _cpu(name: str, size: str, slices: int) -> Topology:
    if not re.fullmatch("[1-9][0-9]{0,5}", size) or int(size) * slices > MOST:
        raise UserError(
            f"--topology {shorten(name)} with --slices {slices} is none of 1 to {MOST} fake devices; write for example "
            f"{EXAMPLES}"
        )
    number = int(size) * slices
    _configure("jax_platforms", "cpu")
    if "xla_force_host_platform_device_count" not in os.environ.get("XLA_FLAGS", ""):
        _configure("jax_num_cpu_devices", number)
    devices = jax.devices("cpu")
    if len(devices) < number:
        raise UserError(f"--topology {name}: this process has {len(devices)} CPU device(s), and {number} are asked for")
    return Topology(name, tuple(devices[:number]), None)
