"""XLA's flags of the tests' processes, which it takes once, at JAX's import."""

import os

DEVICES = "--xla_force_host_platform_device_count"
# Compiling takes most of the tests' time. XLA's older code generator needs a third of the newer one's, and each core
# has a worker already.
QUICK = {"--xla_cpu_use_fusion_emitters": "false", "--xla_cpu_parallel_codegen_split_count": "1"}


def flags(devices: int) -> str:
    """A process's XLA_FLAGS, with so many fake devices on the CPU. Those that are given from outside stay."""
    given = [flag for flag in os.environ.get("XLA_FLAGS", "").split() if not flag.startswith(DEVICES)]
    named = {flag.partition("=")[0] for flag in given}
    return " ".join([f"{DEVICES}={devices}", *given, *(f"{f}={v}" for f, v in QUICK.items() if f not in named)])
