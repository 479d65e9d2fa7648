"""Stores on loopback: an HTTP server that misbehaves as it is told, and an S3 server."""

from __future__ import annotations

import contextlib
import os
import threading
import urllib.request
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest


@dataclass
class WebStore:
    """Files behind ``url``.

    Attributes:
        files: by path without its first slash.
        faults: what happens to the next requests, in turn: a status such as 503, ``drop`` (the connection ends in the
            middle of the body), ``none``.
        knows_ranges: whether it sends parts of files.
        requests: how often each path was asked for, with GET.
    """

    url: str = ""
    files: dict[str, bytes] = field(default_factory=dict)
    faults: list[int | str] = field(default_factory=list)
    knows_ranges: bool = True
    requests: Counter[str] = field(default_factory=Counter)
    sent: int = 0


@contextlib.contextmanager
def web_store() -> Iterator[WebStore]:
    """Serve until the block ends."""
    store = WebStore()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_HEAD(self) -> None:
            self._answer(with_body=False)

        def do_GET(self) -> None:
            self._answer(with_body=True)

        def _answer(self, *, with_body: bool) -> None:
            path = self.path.lstrip("/").split("?")[0]
            store.requests[path] += with_body
            fault = store.faults.pop(0) if with_body and store.faults else "none"
            content = store.files.get(path)
            if isinstance(fault, int) or content is None:
                self._head(fault if isinstance(fault, int) else 404, 0)
                return
            total, status, about = len(content), 200, {}
            asked = self.headers.get("Range", "")
            if store.knows_ranges and asked.startswith("bytes="):
                first, _, last = asked.removeprefix("bytes=").partition("-")
                begin, end = int(first), min(int(last) if last else total - 1, total - 1)
                if begin >= total:
                    self._head(416, 0)
                    return
                content, status = content[begin : end + 1], 206
                about = {"Content-Range": f"bytes {begin}-{end}/{total}"}
            self._head(status, len(content), about | {"ETag": f'"{hash(store.files[path])}"'})
            if with_body:
                sent = content[: len(content) // 2] if fault == "drop" else content
                self.wfile.write(sent)
                store.sent += len(sent)
                self.close_connection = fault == "drop"

        def _head(self, status: int, length: int, about: dict[str, str] | None = None) -> None:
            self.send_response(status)
            self.send_header("Content-Length", str(length))
            if store.knows_ranges:
                self.send_header("Accept-Ranges", "bytes")
            for name, value in (about or {}).items():
                self.send_header(name, value)
            self.end_headers()

        def log_message(self, format: str, *arguments: object) -> None:
            """Nothing."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    store.url = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True)
    thread.start()
    try:
        yield store
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


@contextlib.contextmanager
def s3_store(buckets: Sequence[str]) -> Iterator[dict[str, str]]:
    """An S3 server with empty buckets; yields the environment in which ``s3://`` means it. Skips if it is missing."""
    pytest.importorskip("s3fs", reason="s3fs is not installed: pip install 'batch_tokenizer[remote]'")
    server_module = pytest.importorskip(
        "moto.server", reason="moto's server is not installed: pip install 'moto[server]'"
    )
    server = server_module.ThreadedMotoServer("127.0.0.1", 0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    environment = {
        "AWS_ENDPOINT_URL": f"http://{host}:{port}",
        "AWS_ACCESS_KEY_ID": "test",
        "AWS_SECRET_ACCESS_KEY": "test",
        "AWS_DEFAULT_REGION": "us-east-1",
    }
    before = {name: os.environ.get(name) for name in environment}
    os.environ.update(environment)
    try:
        import s3fs

        # File systems that an earlier server was made for are kept by the library, and all servers have one store.
        urllib.request.urlopen(urllib.request.Request(f"http://{host}:{port}/moto-api/reset", method="POST")).close()
        s3fs.S3FileSystem.clear_instance_cache()  # those of an earlier server in this process
        system = s3fs.S3FileSystem(skip_instance_cache=True)
        for bucket in buckets:
            system.mkdir(bucket)
        yield environment
    finally:
        for name, value in before.items():
            os.environ.pop(name)
            if value is not None:
                os.environ[name] = value
        server.stop()
