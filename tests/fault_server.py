"""A web server of one folder with faults: python tests/fault_server.py FOLDER PORT [UPSTREAM].

FOLDER/faults.json gives for a file's name the faults of its next GETs, one a request: "500", "503", "404", "cut" (the
body ends halfway), "slow" (half a second before it), "hung" (no answer while the server lives), "wrong" (its last byte
is another), "whole" (no Range), "moved" (to the same file of another host). An unlisted name is served. Each such
request is a line of FOLDER/requests: name, first byte, fault or ok, with +key where the request brought an
Authorization.

With UPSTREAM, the HOST:PORT of an S3 server, all is asked of that one, and only the faults are made here; what is
written goes there directly.
"""

import http.client
import json
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import urlsplit

FAULTS, REQUESTS = "faults.json", "requests"
lock = threading.Lock()


class Handler(BaseHTTPRequestHandler):
    folder: Path
    upstream = ""

    def log_message(self, *_: object) -> None:
        pass

    def do_HEAD(self) -> None:
        self._serve("")

    def do_GET(self) -> None:
        name = Path(urlsplit(self.path).path).name
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
        return int(self.headers.get("Range", "bytes=0-").removeprefix("bytes=").partition("-")[0])

    def _pass_on(self, fault: str) -> None:
        if fault.isdigit():
            self.send_error(int(fault))
            return
        connection = http.client.HTTPConnection(self.upstream)
        connection.request(self.command, self.path, headers=dict(self.headers))  # its Host too, which is signed
        answer = connection.getresponse()
        data = bytearray(answer.read())
        if fault == "slow":
            time.sleep(0.5)
        if fault == "wrong":
            data[-1] ^= 1
        self.send_response_only(answer.status)
        for name, value in answer.getheaders():
            if name.lower() not in ("connection", "transfer-encoding"):
                self.send_header(name, value)
        self.end_headers()
        self.wfile.write(data[: len(data) // 2] if fault == "cut" else data)

    def _serve(self, fault: str) -> None:
        if fault == "hung":
            threading.Event().wait()
        if self.upstream:
            self._pass_on(fault)
            return
        file = self.folder / Path(self.path).name
        if fault.isdigit() or not file.is_file():
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
    Handler.folder, Handler.upstream = Path(sys.argv[1]), "".join(sys.argv[3:])
    with ThreadingHTTPServer(("127.0.0.1", int(sys.argv[2])), Handler) as server:
        print(server.server_address[1], flush=True)
        server.serve_forever()
