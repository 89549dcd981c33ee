"""An S3 server of one process that can fail on purpose: enough of the protocol for listing, reading and writing."""

from __future__ import annotations

import contextlib
import re
import threading
import urllib.parse
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from xml.sax.saxutils import escape, unescape

import pytest


class ObjectStore:
    """`objects`: key → bytes of the bucket `bucket`. `fail`: status of each of the next responses; "forever" repeats the
    last one."""

    def __init__(self) -> None:
        self.objects: dict[str, bytes] = {}
        self.fail: list[int] = []
        self.forever = False
        self.fail_after_bytes: int | None = None
        """Reads that begin behind so many bytes of an object get 503."""
        self.requests: list[str] = []
        self.before_write: Callable[[str], None] = lambda key: None
        """Called with the key before an object is stored."""
        parts: dict[str, dict[int, bytes]] = {}
        store = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"
            # Head and body are two packets, and a client that waits for the second acknowledges the first after 40 ms.
            disable_nagle_algorithm = True

            def do_GET(self) -> None:
                store.requests.append(f"{self.command} {self.path}")
                if store.fail:
                    return self._respond(store.fail[0] if store.forever else store.fail.pop(0), b"")
                url = urllib.parse.urlsplit(self.path)
                key = urllib.parse.unquote(url.path).removeprefix("/bucket").removeprefix("/")
                if not key:
                    return self._respond(200, _listing(store.objects, dict(urllib.parse.parse_qsl(url.query))))
                if key not in store.objects:
                    return self._respond(404, b"<Error><Code>NoSuchKey</Code></Error>")
                data = store.objects[key]
                first, last = 0, len(data) - 1
                if wanted := self.headers.get("range"):
                    begin, _, end = wanted.removeprefix("bytes=").partition("-")
                    first, last = int(begin), min(int(end or last), last)
                if store.fail_after_bytes is not None and self.command == "GET" and first >= store.fail_after_bytes:
                    return self._respond(503, b"")
                return self._respond(
                    206 if wanted else 200,
                    data[first : last + 1],
                    {"Content-Range": f"bytes {first}-{last}/{len(data)}"},
                )

            do_HEAD = do_GET

            def do_PUT(self) -> None:
                key, query, body = self._received()
                if "uploadId" in query:
                    parts[query["uploadId"]][int(query["partNumber"])] = body
                elif key:
                    store.before_write(key)
                    store.objects[key] = body
                self._respond(200, b"")

            def do_POST(self) -> None:
                key, query, body = self._received()
                if "delete" in query:
                    for name in re.findall(r"<Key>(.*?)</Key>", body.decode()):
                        store.objects.pop(unescape(name), None)
                    return self._respond(200, b"<DeleteResult></DeleteResult>")
                if "uploads" in query:
                    upload = f"u{len(parts)}"
                    parts[upload] = {}
                    return self._respond(200, f"<Result><UploadId>{upload}</UploadId></Result>".encode())
                store.before_write(key)
                store.objects[key] = b"".join(data for _, data in sorted(parts[query["uploadId"]].items()))
                return self._respond(200, b"<CompleteMultipartUploadResult></CompleteMultipartUploadResult>")

            def do_DELETE(self) -> None:
                store.objects.pop(self._received()[0], None)
                self._respond(204, b"")

            def _received(self) -> tuple[str, dict[str, str], bytes]:
                """Key, query and body."""
                store.requests.append(f"{self.command} {self.path}")
                url = urllib.parse.urlsplit(self.path)
                key = urllib.parse.unquote(url.path).removeprefix("/bucket").removeprefix("/")
                body = self.rfile.read(int(self.headers.get("content-length", 0)))
                if self.headers.get("transfer-encoding", "") == "chunked":
                    while size := int(self.rfile.readline(), 16):
                        body += self.rfile.read(size)
                        self.rfile.readline()
                    self.rfile.readline()
                if "aws-chunked" in self.headers.get("content-encoding", ""):
                    body = _without_chunks(body)
                return key, dict(urllib.parse.parse_qsl(url.query, keep_blank_values=True)), body

            def _respond(self, status: int, body: bytes, headers: dict[str, str] | None = None) -> None:
                self.send_response(status)
                more = {
                    "Last-Modified": "Mon, 01 Jan 2024 00:00:00 GMT",
                    "ETag": '"1"',
                    "Content-Length": str(len(body)),
                    **(headers or {}),
                }
                for name, value in more.items():
                    self.send_header(name, value)
                self.end_headers()
                if self.command != "HEAD":
                    self.wfile.write(body)

            def log_message(self, *arguments: Any) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}"


def _without_chunks(body: bytes) -> bytes:
    """The content of a body in the encoding `aws-chunked`: size in hexadecimal, content, and at the end checksums."""
    content = b""
    while True:
        size, _, body = body.partition(b"\r\n")
        length = int(size.partition(b";")[0], 16)
        if not length:
            return content
        content, body = content + body[:length], body[length + 2 :]


def _listing(objects: dict[str, bytes], query: dict[str, str]) -> bytes:
    prefix, delimiter = query.get("prefix", ""), query.get("delimiter")
    keys = [key for key in sorted(objects) if key.startswith(prefix)]
    names = [key for key in keys if not delimiter or delimiter not in key[len(prefix) :]]
    folders = sorted({prefix + key[len(prefix) :].partition("/")[0] + "/" for key in keys if key not in names})
    items = "".join(
        f"<Contents><Key>{escape(key)}</Key><Size>{len(objects[key])}</Size><LastModified>2024-01-01T00:00:00.000Z</LastModified></Contents>"
        for key in names
    ) + "".join(f"<CommonPrefixes><Prefix>{escape(name)}</Prefix></CommonPrefixes>" for name in folders)
    count = f"<KeyCount>{len(names) + len(folders)}</KeyCount><IsTruncated>false</IsTruncated>"
    return f"<?xml version='1.0'?><ListBucketResult><Name>bucket</Name>{count}{items}</ListBucketResult>".encode()


@contextlib.contextmanager
def running_store(monkeypatch: pytest.MonkeyPatch) -> Iterator[ObjectStore]:
    """A store that s3:// URIs of this process mean."""
    store = ObjectStore()
    thread = threading.Thread(target=store.server.serve_forever, kwargs={"poll_interval": 0.01})  # of its end
    thread.start()
    values = {"ACCESS_KEY_ID": "x", "SECRET_ACCESS_KEY": "y", "REGION": "us-east-1", "ENDPOINT_URL": store.url}
    for name, value in values.items():
        monkeypatch.setenv(f"AWS_{name}", value)
    try:
        yield store
    finally:
        store.server.shutdown()
        store.server.server_close()
        thread.join()
