"""`python launch/run_folder.py CONFIG [key=value ...]`: make the run's folder ready for a batch job, print where it is.

Requests and answers that an earlier job left there go: this job would take them for its own. A request made while the
ranks start stays, which is why they do not remove it themselves.
"""

import sys
from pathlib import Path

from cclmpc_dist.config import load
from cclmpc_dist.errors import InputError


def prepare(config: str, overrides: list[str]) -> Path:
    """The run folder, there and without flag files. Raises InputError where configuration or folder cannot be used."""
    folder = load(config, overrides).folder
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for name in ("preempt", "preempted"):
            (folder / name).unlink(missing_ok=True)
    except OSError as error:
        raise InputError(f"{folder}: cannot write there ({error.strerror}): choose another name or runs") from None
    return folder


if __name__ == "__main__":
    try:
        print(prepare(sys.argv[1], sys.argv[2:]))
    except InputError as error:
        sys.stderr.writelines(f"cclmpc: {line}\n" for line in str(error).splitlines())
        sys.exit(2)
