import subprocess
import sys

import pytest

# Ten blocks of 64 MiB, one after the other, each page written; counts the pages that were cleared.
FAULTS = """
import resource, numpy as np
from imrcnn_d2.engine.train_step import keep_freed_memory
def cleared():
    np.ones(2**23)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(10):
        np.ones(2**23)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
given_back = cleared()
assert keep_freed_memory()
print(given_back, cleared())
"""


@pytest.mark.skipif(sys.platform != "linux", reason="glibc's allocator")
def test_freed_memory_is_used_again():
    run = [sys.executable, "-W", "ignore", "-c", FAULTS]
    given_back, kept = map(int, subprocess.check_output(run, text=True).split())
    assert given_back >= 10 * 2**26 / 2**21  # each page once, huge ones or not
    assert kept < given_back / 10
