"""The tests of `devices.py`, in a process of their own: a pretend device stays as long as its process, where torch's engine must
not have run before it came, and where modules for several devices would be tried on it."""

import os
import subprocess
import sys
from pathlib import Path

TESTS = Path(__file__).with_name("devices.py")


def test_everything_on_a_device_that_is_not_the_cpu():
    alone = {key: value for key, value in os.environ.items() if not key.startswith("PYTEST_")}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:nbval", "-p", "no:xdist", "-o", "addopts=", str(TESTS)]
    done = subprocess.run(command, env=alone, cwd=TESTS.parents[2], capture_output=True, text=True)
    assert done.returncode == 0 and " passed" in done.stdout, done.stdout[-8000:] + done.stderr[-2000:]
