"""Published figures of accelerators: of one chip, as its maker states them.

TPUs: the "System architecture" pages of Cloud TPU's documentation. A link's rate is the stated interconnect
bandwidth of a chip over its number of links, one way; that of the data-center network is a pod's over its chips.
"""

from dataclasses import dataclass

GIB = 1 << 30


@dataclass(frozen=True)
class Chip:
    name: str
    flops: float  # FLOP/s, dense bfloat16 matmul
    memory: int = 0  # bytes
    memory_rate: float = 0.0  # bytes/s
    link_rate: float = 0.0  # bytes/s of one link to a neighbor, one way
    links: int = 0  # to neighbors within a slice: two for each dimension of the torus
    rings_of: int = 0  # a dimension of the slice is a ring if it is a multiple of this many chips, else a line
    network_rate: float = 0.0  # bytes/s to other slices, one way


# By the beginning of jax's name for the device; the longest that fits.
CHIPS = {
    "TPU v4": Chip("v4", 275e12, 32 * GIB, 1228e9, 50e9, 6, 4, 6.25e9),
    "TPU v5 lite": Chip("v5e", 197e12, 16 * GIB, 819e9, 50e9, 4, 16, 3.125e9),
    "TPU v5": Chip("v5p", 459e12, 95 * GIB, 2765e9, 100e9, 6, 4, 6.25e9),
    "TPU v6 lite": Chip("v6e", 918e12, 32 * GIB, 1640e9, 100e9, 4, 16, 12.5e9),
    "NVIDIA A100": Chip("A100", 312e12),
    "NVIDIA H100 80GB HBM3": Chip("H100 SXM", 989e12),
    "NVIDIA H100 PCIe": Chip("H100 PCIe", 756e12),
    "NVIDIA H100 NVL": Chip("H100 NVL", 835e12),
    "NVIDIA H200": Chip("H200 SXM", 989e12),
    "NVIDIA H200 NVL": Chip("H200 NVL", 835e12),
}
CHIPS |= {"TPU v5e": CHIPS["TPU v5 lite"], "TPU v5p": CHIPS["TPU v5"], "TPU v6e": CHIPS["TPU v6 lite"]}


def chip_of(kind: str) -> Chip | None:
    """Return the figures of a device of this kind (`jax.Device.device_kind`); None where they are not known.

    They are not known of a part of a GPU ("NVIDIA A100-SXM4-40GB MIG 1g.5gb").
    """
    names = [name for name in CHIPS if kind.startswith(name) and " MIG " not in kind]
    return CHIPS[max(names, key=len)] if names else None
