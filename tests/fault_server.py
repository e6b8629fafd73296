"""A web server of one folder with faults: python tests/fault_server.py FOLDER PORT.

FOLDER/faults.json gives for a file's name the faults of its next GETs, one a request: "500", "404", "cut" (the body
ends halfway), "slow" (half a second before it), "wrong" (its last byte is another), "whole" (no Range), "moved" (to
the same file of another host). An unlisted name is served. Each such request is a line of FOLDER/requests: name,
first byte, fault or ok, with +key where the request brought an Authorization.
"""

import json
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

FAULTS, REQUESTS = "faults.json", "requests"
lock = threading.Lock()


class Handler(BaseHTTPRequestHandler):
    folder: Path

    def log_message(self, *_: object) -> None:
        pass

    def do_HEAD(self) -> None:
        self._serve("")

    def do_GET(self) -> None:
        name = Path(self.path).name
        with lock:
            file = self.folder / FAULTS
            faults = json.loads(file.read_text()) if file.exists() else {}
            fault = faults[name].pop(0) if faults.get(name) else ""
            if fault:
                file.write_text(json.dumps(faults))
            with (self.folder / REQUESTS).open("a") as log:
                known = "+key" if self.headers.get("Authorization") else ""
                log.write(f"{name} {self._start()} {fault or 'ok'}{known}\n")
        self._serve(fault)

    def _start(self) -> int:
        return int(self.headers.get("Range", "bytes=0-").removeprefix("bytes=").rstrip("-"))

    def _serve(self, fault: str) -> None:
        file = self.folder / Path(self.path).name
        if fault in ("404", "500") or not file.is_file():
            self.send_error(int(fault or 404))
            return
        if fault == "moved":
            self.send_response(302)
            self.send_header("Location", f"http://localhost:{self.server.server_address[1]}/{file.name}")
            self.end_headers()
            return
        data, start = bytearray(file.read_bytes()), 0 if fault == "whole" else self._start()
        if fault == "slow":
            time.sleep(0.5)
        if fault == "wrong":
            data[-1] ^= 1
        body = data[start:]
        self.send_response(206 if start else 200)
        self.send_header("Content-Length", str(len(body)))
        if start:
            self.send_header("Content-Range", f"bytes {start}-{len(data) - 1}/{len(data)}")
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body[: len(body) // 2] if fault == "cut" else body)


if __name__ == "__main__":
    Handler.folder = Path(sys.argv[1])
    with ThreadingHTTPServer(("127.0.0.1", int(sys.argv[2])), Handler) as server:
        print(server.server_address[1], flush=True)
        server.serve_forever()
