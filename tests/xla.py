"""XLA's flags for the tests' processes; JAX reads them once, when it is imported."""

import importlib.metadata
import os

DEVICES = "--xla_force_host_platform_device_count"
# Compiling takes most of the tests' time, and each core has a worker already.
QUICK = {"--xla_cpu_parallel_codegen_split_count": "1"}
# XLA's older CPU code generator compiles in a third of the newer one's time. JAX 0.12 no longer has it.
OLD_CODE_GENERATOR = "--xla_cpu_use_fusion_emitters"
HAS_OLD_CODE_GENERATOR = tuple(map(int, importlib.metadata.version("jaxlib").split(".")[:2])) < (0, 11)


def flags(devices: int) -> str:
    """Returns XLA_FLAGS for a process with this many fake CPU devices. Flags given from outside stay.

    `JAX_IT_TEST_CODE_GENERATOR=default` keeps the code generator that users have.
    """
    quick = dict(QUICK)
    if HAS_OLD_CODE_GENERATOR and os.environ.get("JAX_IT_TEST_CODE_GENERATOR") != "default":
        quick[OLD_CODE_GENERATOR] = "false"
    given = [flag for flag in os.environ.get("XLA_FLAGS", "").split() if not flag.startswith(DEVICES)]
    named = {flag.partition("=")[0] for flag in given}
    return " ".join([f"{DEVICES}={devices}", *given, *(f"{f}={v}" for f, v in quick.items() if f not in named)])
