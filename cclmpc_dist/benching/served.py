"""A folder behind an nginx on this machine's loopback."""

import os
import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from cclmpc_dist.errors import InputError

CONFIGURATION = """
daemon off;
{user}
pid {folder}/nginx.pid;
error_log {folder}/error.log;
worker_processes 1;
events {{ worker_connections 64; }}
http {{
    access_log {folder}/access.log;
    client_body_temp_path {folder}/body; proxy_temp_path {folder}/proxy; fastcgi_temp_path {folder}/fastcgi;
    uwsgi_temp_path {folder}/uwsgi; scgi_temp_path {folder}/scgi;
    sendfile on;
    server {{ listen 127.0.0.1:{port}; root {root}; }}
}}
"""
PATIENCE = 60.0  # seconds until it listens


@contextmanager
def nginx(root: Path, folder: Path) -> Iterator[str]:
    """The URL of `root` on an nginx whose own files lie in `folder`. Raises InputError where it does not start."""
    port = free_port()
    user = "user root;" if os.getuid() == 0 else ""
    told, folder = folder / "nginx.conf", folder.resolve()
    told.write_text(CONFIGURATION.format(folder=folder, root=root.resolve(), port=port, user=user))
    with subprocess.Popen(["nginx", "-c", told.resolve(), "-p", folder, "-e", folder / "error.log"]) as server:
        try:
            if not listens(port, server):
                raise InputError(f"nginx does not listen on port {port}: {folder / 'error.log'} says why")
            yield f"http://127.0.0.1:{port}"
        finally:
            server.terminate()


def free_port() -> int:
    """A port of this machine on which nothing listens."""
    with socket.create_server(("", 0)) as probe:
        return int(probe.getsockname()[1])


def listens(port: int, server: subprocess.Popen[bytes]) -> bool:
    """Wait until a server of this machine listens. False where it ends before, or PATIENCE does."""
    deadline = time.monotonic() + PATIENCE
    while time.monotonic() < deadline and server.poll() is None:
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)) == 0:
                return True
        time.sleep(0.05)
    return False
