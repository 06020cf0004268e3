"""Read by pytest before any test module, and so before JAX, which takes these once, at its import."""

import os

# Eight fake devices on the CPU, for every test: tests of sharding need no process of their own, and
# a test that wants one device takes jax.devices()[:1].
DEVICES = "--xla_force_host_platform_device_count"
if DEVICES not in os.environ.get("XLA_FLAGS", ""):
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {DEVICES}=8".strip()
os.environ.setdefault("JAX_PLATFORMS", "cpu")  # the tolerances are those of true float32
os.environ.setdefault("HF_HUB_OFFLINE", "1")  # no test needs the network
# Compiling takes most of the tests' time: half of it goes to making fast code, which tiny models do not need.
os.environ.setdefault("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")
