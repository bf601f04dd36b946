"""What is kept of freed memory, each in a process of its own, since the setting stays."""

import os
import platform
import subprocess
import sys

import pytest

# Takes and gives back 64 MiB, ten times; prints whether malloc keeps memory, how many pages the last time cost, and
# how many MiB less are resident once all is given back.
SCRIPT = """
import ctypes, resource
from dsvl2_jax.runtime.malloc import give_freed_memory_back, keep_freed_memory

kept = keep_freed_memory()
libc = ctypes.CDLL(None)
libc.malloc.restype, libc.malloc.argtypes = ctypes.c_void_p, [ctypes.c_size_t]
libc.free.argtypes = [ctypes.c_void_p]

def pages():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    array = libc.malloc(64 << 20)
    ctypes.memset(array, 1, 64 << 20)
    libc.free(array)
    give_freed_memory_back()
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

def resident():
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * resource.getpagesize() >> 20

last, before = [pages() for _ in range(10)][-1], resident()
give_freed_memory_back(always=True)
print(kept, last, before - resident())
"""


def run(**environment: str) -> tuple[str, int, int]:
    variables = {name: value for name, value in os.environ.items() if not name.startswith(("GLIBC_", "MALLOC_"))}
    command = [sys.executable, "-c", SCRIPT]
    out = subprocess.run(
        command, env=variables | {"JAX_PLATFORMS": "cpu"} | environment, stdout=subprocess.PIPE, check=True
    )
    kept, pages, returned = out.stdout.decode().split()
    return kept, int(pages), int(returned)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="another C library has no such settings")
def test_freed_memory_is_given_out_again():
    kept, pages, returned = run()
    assert kept == "True" and pages < 100
    assert returned >= 60


def test_what_the_user_chose_stays():
    kept, pages, _ = run(MALLOC_MMAP_THRESHOLD_="1000000")
    assert kept == "False" and pages > 1000
