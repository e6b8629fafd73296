"""A measurement in a process of its own, and memory as the kernel counts it."""

import json
import subprocess
import sys
from collections.abc import Callable
from typing import Any


def alone(measure: Callable[..., dict[str, Any]], **job: Any) -> dict[str, Any]:
    """What `measure` finds in a process of its own. Its module, run as a program with a function's name and JSON of its
    arguments, prints what that gives as JSON."""
    command = [sys.executable, "-m", measure.__module__, measure.__name__, json.dumps(job)]
    return json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout)


def memory(field: str) -> int:
    """Bytes: VmRSS, in memory now, or VmHWM, the most there ever was (Linux; getrusage's would be inherited)."""
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) * 1024 for line in status if line.startswith(field))
