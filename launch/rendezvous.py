"""`python launch/rendezvous.py HEAD JOB_ID`, on the first node: print the HEAD:PORT at which the job's agents meet.

The port follows from the job's number, so that jobs that share a node do not meet; a taken one gives way to the next.
"""

import socket
import sys

from cclmpc_dist.errors import InputError

FIRST, PORTS = 20_000, 10_000  # below the range that Linux hands out by itself (32768 on)
TRIES = 32


def endpoint(head: str, job: int) -> str:
    """HEAD:PORT. Raises InputError where the name has no address, or every port tried is taken."""
    try:
        socket.getaddrinfo(head, None)
    except OSError:
        raise InputError(f"{head}: the first node's name has no address here: set HEAD to one that every node reaches"
                         ) from None  # fmt: skip
    for attempt in range(TRIES):
        port = FIRST + (job + attempt) % PORTS
        if _free(port):
            return f"{head}:{port}"
    raise InputError(f"{head}: the {TRIES} ports from {FIRST + job % PORTS} on are taken: end what holds them, or "
                     "exclude this node")  # fmt: skip


def _free(port: int) -> bool:
    """Whether a server could listen on that port of this machine."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("", port))
            probe.listen()
        except OSError:
            return False
    return True


if __name__ == "__main__":
    try:
        print(endpoint(sys.argv[1], int(sys.argv[2])))
    except InputError as error:
        print(f"cclmpc: {error}", file=sys.stderr)
        sys.exit(2)
