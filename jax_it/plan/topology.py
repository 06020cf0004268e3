"""Devices to compile for that are not attached: a TPU slice as libtpu describes it, or fake devices on the CPU."""

import contextlib
import importlib.util
import math
import os
import re
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import jax
from jax.experimental import topologies

from jax_it.chips import Chip, chip_of
from jax_it.errors import UserError, first_line, shorten

MAX_CPU_DEVICES = 4096  # each takes memory
EXAMPLES = "v5e:8x8, v5p:4x4x4, v6e:16x16 or cpu:8"

# Without these libtpu looks for a TPU, its host's name and its metadata server. Several processes may compile at a
# time, since none opens a device.
_LIBTPU_ENV = {
    "TPU_SKIP_MDS_QUERY": "1", "TPU_ACCELERATOR_TYPE": "v5litepod-8", "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_WORKER_ID": "0", "ALLOW_MULTIPLE_LIBTPU_LOAD": "1", "TPU_STDERR_LOG_LEVEL": "3", "TPU_MIN_LOG_LEVEL": "3",
    "TF_CPP_MIN_LOG_LEVEL": "3",
}  # fmt: skip


@dataclass(frozen=True)
class Topology:
    """Devices to compile for, one per chip."""

    name: str
    devices: tuple[Any, ...]
    chip: Chip  # all its rates are 0 if they are not known

    @property
    def is_tpu(self) -> bool:
        return bool(self.devices[0].platform == "tpu")

    @cached_property
    def slices(self) -> int:
        return len({slice_of(device) for device in self.devices})

    @cached_property
    def shape(self) -> tuple[int, ...]:
        """Chips of a slice along each dimension of its torus."""
        return tuple(max(at) + 1 for at in zip(*map(coordinates, self.devices), strict=True))

    def is_ring(self, dimension: int) -> bool:
        """Tell whether a link joins the last and the first chip along a dimension."""
        return bool(self.chip.rings_of) and self.shape[dimension] % self.chip.rings_of == 0


def slice_of(device: Any) -> int:
    return getattr(device, "slice_index", 0) or 0


def coordinates(device: Any) -> tuple[int, ...]:
    """Return a chip's position in its slice."""
    return tuple(getattr(device, "coords", (device.id,)))


def find(name: str, slices: int = 1) -> Topology:
    """Return the devices of, for example, "v5e:8x8" (as many slices of it) or "cpu:8".

    Raises UserError if there is no such topology, or no libtpu to describe it.
    """
    with contextlib.suppress(RuntimeError):  # JAX has looked for devices already
        jax.config.update("jax_platforms", "cpu")  # leaves attached accelerators alone
    kind, _, size = name.partition(":")
    devices = _cpu_devices(name, size, slices) if kind == "cpu" else _tpu_devices(name, kind, size, slices)
    device_kind = devices[0].device_kind
    return Topology(name, tuple(devices), chip_of(device_kind) or Chip(device_kind, 0.0))


def _cpu_devices(name: str, size: str, slices: int) -> list[Any]:
    if not re.fullmatch("[1-9][0-9]{0,5}", size) or int(size) * slices > MAX_CPU_DEVICES:
        raise UserError(
            f"--topology {shorten(name)} with --slices {slices} is not 1 to {MAX_CPU_DEVICES} fake devices; write for "
            f"example {EXAMPLES}"
        )
    number = int(size) * slices
    if "xla_force_host_platform_device_count" not in os.environ.get("XLA_FLAGS", ""):
        with contextlib.suppress(RuntimeError):
            jax.config.update("jax_num_cpu_devices", number)
    devices = jax.devices("cpu")
    if len(devices) < number:
        raise UserError(f"--topology {name}: this process has {len(devices)} CPU device(s), and {number} are needed")
    return devices[:number]


def _tpu_devices(name: str, kind: str, size: str, slices: int) -> list[Any]:
    if not re.fullmatch(r"v\d+[a-z]*:\d+(x\d+){1,2}", name):
        raise UserError(f"--topology {shorten(name)} is not one; write for example {EXAMPLES}")
    if not has_libtpu():
        raise UserError(
            f"--topology {name} needs libtpu, which is not installed: pip install 'jax-it[tpu]', or plan for cpu:8"
        )
    dims = [int(d) for d in size.split("x")]
    options: dict[str, Any] = {"num_slices": slices}
    if any(d % 2 for d in dims) and math.prod(dims) <= 4:  # a part of a host
        options["chips_per_host_bounds"] = (*dims, *[1] * (3 - len(dims)))
    if kind == "v4":
        options["chip_config_name"] = "megacore"  # its two cores as one device, as in training
    before = {variable: os.environ[variable] for variable in _LIBTPU_ENV if variable in os.environ}
    os.environ.update(_LIBTPU_ENV)  # read when libtpu is loaded; others who look for a TPU must not find one in it
    try:
        return topologies.get_topology_desc(name, "tpu", **options).devices
    except Exception as error:
        raise UserError(
            f"--topology {name} is not one that libtpu knows ({first_line(error)}); write for example {EXAMPLES}"
        ) from None
    finally:
        for variable in _LIBTPU_ENV:
            del os.environ[variable]
        os.environ.update(before)


def has_libtpu() -> bool:
    return importlib.util.find_spec("libtpu") is not None
