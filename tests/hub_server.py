"""A server on this machine that answers as the Hugging Face Hub does, and can be made to fail."""

from __future__ import annotations

import contextlib
import hashlib
import json
import re
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

COMMIT = "0123456789abcdef0123456789abcdef01234567"


class Hub:
    """Models by their names, each a directory.

    Attributes:
        models: the directories.
        requests: what was asked for: method and path.
        refusals: of paths with this in them: the status, the Hub's own code for it, and words.
        broken: the one file that is sent by half, and then not at all.
        cut: how often it was asked for.
        silent: while it is set, requests are taken and not answered.
        url: where it is.
    """

    def __init__(self, models: dict[str, Path]) -> None:
        self.models = models
        self.requests: list[tuple[str, str]] = []
        self.refusals: dict[str, tuple[int, str | None, str]] = {}
        self.broken: str | None = None
        self.cut = 0
        self.silent = threading.Event()
        self._server = _Server(("127.0.0.1", 0), _handler(self))
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}"

    @contextmanager
    def served(self) -> Iterator[Hub]:
        thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        try:
            yield self
        finally:
            self.close()
            thread.join()

    def close(self) -> None:
        """It is gone: nobody listens at its port any more, nor to those that are connected."""
        self._server.shutdown()
        self._server.server_close()
        for connection in self._server.connections:
            with contextlib.suppress(OSError):  # it is closed already
                connection.shutdown(socket.SHUT_RDWR)

    def downloaded(self) -> list[str]:
        """The files that were sent, or begun to be."""
        return [path.rsplit("/", 1)[-1] for method, path in self.requests
                if method == "GET" and "/resolve/" in path]  # fmt: skip


class _Server(ThreadingHTTPServer):
    daemon_threads = True

    def __init__(self, *options: Any) -> None:
        super().__init__(*options)
        self.connections: list[socket.socket] = []

    def process_request(self, request: Any, client_address: Any) -> None:
        self.connections.append(request)
        super().process_request(request, client_address)

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that has gone is none of the server's errors."""


def _handler(hub: Hub) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_HEAD(self) -> None:
            self._answer()

        def do_GET(self) -> None:
            self._answer()

        def log_message(self, *_: Any) -> None:
            pass

        def _answer(self) -> None:
            while hub.silent.is_set():
                time.sleep(0.01)
            path = unquote(urlsplit(self.path).path)
            hub.requests.append((self.command, path))
            refusal = next((r for part, r in hub.refusals.items() if part in path), None)
            if refusal is not None:
                self._refuse(*refusal)
                return
            found = re.fullmatch(r"/api/models/(.+?)(/revision/main|/tree/\w+)?", path)
            if found is not None:
                self._describe(found[1], is_tree="/tree/" in (found[2] or ""))
                return
            found = re.fullmatch(rf"/(.+?)/resolve/(?:main|{COMMIT})/(.+)", path)
            if found is None or found[1] not in hub.models:
                self._refuse(404, "RepoNotFound", "Repository not found")
            else:
                self._send_file(hub.models[found[1]], found[2])

        def _describe(self, name: str, *, is_tree: bool) -> None:
            if name not in hub.models:  # as the Hub says it of what is private as well
                self._refuse(404, "RepoNotFound", "Repository not found")
                return
            files = [path for path in sorted(hub.models[name].rglob("*")) if path.is_file()]
            if is_tree:
                answer: Any = [_entry(hub.models[name], path) for path in files]
            else:
                siblings = [{"rfilename": str(f.relative_to(hub.models[name]))} for f in files]
                answer = {"_id": "1", "id": name, "modelId": name, "sha": COMMIT, "private": False,
                          "tags": [], "siblings": siblings}  # fmt: skip
            self._send(200, json.dumps(answer).encode(), {"Content-Type": "application/json"})

        def _send_file(self, folder: Path, name: str) -> None:
            path = folder / name
            if not path.is_file():
                self._refuse(404, "EntryNotFound", "Entry not found")
                return
            content = path.read_bytes()
            headers = {
                "X-Repo-Commit": COMMIT,
                "Accept-Ranges": "bytes",
                "ETag": f'"{_etag(path)}"',
            }
            if name == hub.broken and self.command == "GET":
                hub.cut += 1
                if hub.cut > 1:
                    self._refuse(503, None, "Service unavailable")
                    return
                self.send_response(200)
                for key, value in {**headers, "Content-Length": str(len(content))}.items():
                    self.send_header(key, value)
                self.end_headers()
                self.wfile.write(content[: len(content) // 2])
                self.close_connection = True
                return
            self._send(200, content, headers)

        def _refuse(self, status: int, code: str | None, message: str) -> None:
            headers = {"X-Error-Message": message, **({"X-Error-Code": code} if code else {})}
            self._send(status, json.dumps({"error": message}).encode(), headers)

        def _send(self, status: int, content: bytes, headers: dict[str, str]) -> None:
            self.send_response(status)
            for key, value in {**headers, "Content-Length": str(len(content))}.items():
                self.send_header(key, value)
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(content)

    return Handler


def _entry(folder: Path, path: Path) -> dict[str, Any]:
    size, name = path.stat().st_size, str(path.relative_to(folder))
    entry = {"type": "file", "path": name, "size": size, "oid": _digest("sha1", path)}
    if path.suffix == ".safetensors":
        entry["lfs"] = {"oid": _etag(path), "size": size, "pointerSize": 134}
    return entry


def _etag(path: Path) -> str:
    return _digest("sha256" if path.suffix == ".safetensors" else "sha1", path)


def _digest(kind: str, path: Path) -> str:
    return hashlib.new(kind, path.read_bytes()).hexdigest()
