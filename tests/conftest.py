"""Read by pytest before any test module, and so before JAX, which takes these once, at its import."""

import os
import signal

from tests import xla

# Ignored by what runs under `nohup` or in the background of a script, and inherited by the commands that tests start.
for number, handler in ((signal.SIGHUP, signal.SIG_DFL), (signal.SIGINT, signal.default_int_handler)):
    if signal.getsignal(number) is signal.SIG_IGN:
        signal.signal(number, handler)

# Eight fake devices on the CPU, for every test: tests of sharding need no process of their own, and
# a test that wants one device takes jax.devices()[:1].
os.environ["XLA_FLAGS"] = xla.flags(devices=8)
os.environ.setdefault("JAX_PLATFORMS", "cpu")  # the tolerances are those of true float32
os.environ.setdefault("HF_HUB_OFFLINE", "1")  # no test needs the network
# Half of compiling goes to making fast code, which tiny models do not need.
os.environ.setdefault("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")
