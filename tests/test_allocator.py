"""Memory that a step has used stays with the process."""

import platform
import subprocess
import sys

import pytest

PROGRAM = """
import resource, numpy
from jax_it.allocator import keep_memory
keep_memory()
faults = []
for _ in range(3):
    numpy.ones(100_000_000, numpy.uint8)
    faults.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt)
print(faults[2] - faults[1])
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="other allocators are left as they are")
def test_memory_that_was_freed_is_used_again_without_page_faults():
    done = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, check=True)
    assert int(done.stdout) < 1000, "of 24,414 pages"
