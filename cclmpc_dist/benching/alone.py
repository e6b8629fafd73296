"""A measurement in a process of its own, and memory as the kernel counts it."""

import json
import subprocess
import sys
from collections.abc import Callable, Sequence
from typing import Any


def alone(measure: Callable[..., dict[str, Any]], **job: Any) -> dict[str, Any]:
    """What `measure` finds in a process of its own. Its module, or script, run as a program must `answer`."""
    module = sys.modules[measure.__module__]
    program = ["-m", module.__name__] if module.__package__ else [str(module.__file__)]
    command = [sys.executable, *program, measure.__name__, json.dumps(job)]
    code, said = run(command, stdout=subprocess.PIPE, text=True)
    if code:
        raise subprocess.CalledProcessError(code, command)
    return json.loads(said)


def run(command: Sequence[str], **options: Any) -> tuple[int, Any]:
    """Exit code and standard output of a program, which does not outlive this one's wait: it gets SIGTERM, on which
    torchrun ends its ranks, and is awaited. options: subprocess.Popen's."""
    with subprocess.Popen(command, **options) as child:
        try:
            said, _ = child.communicate()
        except BaseException:
            child.terminate()
            child.wait()
            raise
    return child.returncode, said


def answer(*measures: Callable[..., dict[str, Any]]) -> bool:
    """In a program that `alone` started: call the one of `measures` that it names and print what that finds, as JSON.
    False in any other program."""
    known = {measure.__name__: measure for measure in measures}
    if len(sys.argv) != 3 or sys.argv[1] not in known:
        return False
    print(json.dumps(known[sys.argv[1]](**json.loads(sys.argv[2]))))
    return True


def memory(field: str) -> int:
    """Bytes: VmRSS, in memory now, or VmHWM, the most there ever was (Linux; getrusage's would be inherited)."""
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) * 1024 for line in status if line.startswith(field))
