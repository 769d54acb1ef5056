"""Freed memory is kept for the next tensor, and given back when asked."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from clones import ROOT

HOLES = """
import json, resource, torch
from pathlib import Path
from stages.allocator import give_back_holes, keep_freed_memory

def resident():
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize() / 1e6

keep_freed_memory()
told = {"start": resident()}
tensors = [torch.ones(1_000_000 if k % 2 else 1_000) for k in range(200)]  # 400 MB, each behind a small one
told["full"] = resident()
small = tensors[::2]
del tensors
told["freed"] = resident()
give_back_holes()
told["given back"] = resident()
assert all(float(one.sum()) == 1_000 for one in small)
print(json.dumps(told))
"""


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="the system tells no memory in /proc")
def test_freed_memory_is_kept_until_it_is_given_back():
    """The holes lie between things in use, so that cutting off the heap's end would not do."""
    done = subprocess.run([sys.executable, "-c", HOLES], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    told = {name: megabytes - json.loads(done.stdout)["start"] for name, megabytes in json.loads(done.stdout).items()}
    assert told["full"] > 390 and told["freed"] > 390 and told["given back"] < 40
