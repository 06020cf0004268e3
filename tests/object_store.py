"""A stand-in for Google Cloud Storage on this machine: as much of its JSON interface as gcsfs and TensorStore use.

Objects are kept in memory, with generations, and with the conditions that TensorStore writes under.
"""

import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit


class Store:
    def __init__(self) -> None:
        self.objects: dict[str, tuple[bytes, int]] = {}  # "bucket/name" -> content, generation
        self.lock = threading.Lock()
        self.generation = 1000
        self.uploads: dict[str, tuple[str, bytearray]] = {}  # resumable ones

    def put(self, key: str, content: bytes, condition: str | None = None) -> dict[str, Any] | None:
        """The object's description; None where its generation is not the one that was asked for."""
        with self.lock:
            if condition is not None and int(condition) != self.objects.get(key, (b"", 0))[1]:
                return None
            self.generation += 1
            self.objects[key] = (content, self.generation)
        return self.describe(key)

    def describe(self, key: str) -> dict[str, Any]:
        content, generation = self.objects[key]
        bucket, name = key.split("/", 1)
        time = "2026-01-01T00:00:00.000Z"
        return {
            "kind": "storage#object", "id": f"{key}/{generation}", "name": name, "bucket": bucket,
            "generation": str(generation), "metageneration": "1", "size": str(len(content)),
            "timeCreated": time, "updated": time, "contentType": "application/octet-stream", "etag": str(generation),
        }  # fmt: skip

    def list(self, bucket: str, query: dict[str, str]) -> dict[str, Any]:
        prefix, delimiter = query.get("prefix", ""), query.get("delimiter", "")
        names = sorted(key.split("/", 1)[1] for key in list(self.objects) if key.startswith(f"{bucket}/"))
        items, prefixes = [], set()
        for name in names:
            after = query.get("startOffset", "") <= name and not name >= query.get("endOffset", chr(0x10FFFF))
            if not name.startswith(prefix) or not after:
                continue
            rest = name[len(prefix) :]
            if delimiter and delimiter in rest:
                prefixes.add(prefix + rest.split(delimiter, 1)[0] + delimiter)
            else:
                items.append(self.describe(f"{bucket}/{name}"))
        return {"kind": "storage#objects", "items": items, "prefixes": sorted(prefixes)}


@contextmanager
def serving() -> Iterator[tuple[Store, dict[str, str]]]:
    """The store, and the environment in which the libraries find it."""
    store = Store()

    class Handler(_Handler):
        pass

    Handler.store = store
    server = ThreadingHTTPServer(("localhost", 0), Handler)
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, daemon=True).start()
    url = f"http://localhost:{server.server_address[1]}"
    try:
        yield store, {"STORAGE_EMULATOR_HOST": url, "TENSORSTORE_GCS_HTTP_URL": url, "NO_GCE_CHECK": "true"}
    finally:
        server.shutdown()
        server.server_close()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    store: Store

    def log_message(self, format: str, *arguments: Any) -> None:
        pass

    def do_GET(self) -> None:
        self._answer(*self._get())

    def do_POST(self) -> None:
        self._answer(*self._post())

    def do_PUT(self) -> None:
        self._answer(*self._post())

    def do_DELETE(self) -> None:
        self._answer(*self._delete(self._path(), self._query()))

    def _get(self) -> tuple[Any, ...]:
        path, query = self._path(), self._query()
        if found := re.fullmatch(r"/(?:download/)?storage/v1/b/([^/]+)/o/(.+)", path):
            key = f"{found[1]}/{unquote(found[2])}"
            if key not in self.store.objects:
                return 404, {"error": {"code": 404, "message": "Not Found"}}
            if query.get("alt") != "media":
                return 200, self.store.describe(key)
            content, generation = self.store.objects[key]
            headers = {"x-goog-generation": str(generation)}
            if query.get("ifGenerationNotMatch") == str(generation):
                return 304, b"", headers
            if span := re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", "")):
                first, last = int(span[1]), min(int(span[2] or len(content) - 1), len(content) - 1)
                if first >= len(content):
                    return 416, b"", headers
                headers["Content-Range"] = f"bytes {first}-{last}/{len(content)}"
                return 206, content[first : last + 1], headers
            return 200, content, headers
        if found := re.fullmatch(r"/storage/v1/b/([^/]+)/o", path):
            return 200, self.store.list(found[1], query)
        if found := re.fullmatch(r"/storage/v1/b/([^/]+)", path):
            return 200, {"kind": "storage#bucket", "name": found[1], "id": found[1], "location": "US"}
        return 404, {"error": {"code": 404, "message": path}}

    def _post(self) -> tuple[Any, ...]:
        path, query, body = self._path(), self._query(), self._body()
        if path == "/batch/storage/v1":
            return self._batch(body)
        if found := re.fullmatch(r"/storage/v1/b/([^/]+)/o/([^/]+)/moveTo/o/([^/]+)", path):
            source, target = (f"{found[1]}/{unquote(name)}" for name in found.groups()[1:])
            if source not in self.store.objects:
                return 404, {"error": {"code": 404, "message": "Not Found"}}
            return 200, self.store.put(target, self.store.objects.pop(source)[0])
        found = re.fullmatch(r"/upload/storage/v1/b/([^/]+)/o", path)
        if not found:
            return 404, {"error": {"code": 404, "message": path}}
        kind = query.get("uploadType")
        if "upload_id" in query:  # a part of a resumable upload, or the last one
            key, content = self.store.uploads[query["upload_id"]]
            content += body
            if self.headers["Content-Range"].endswith("/*"):
                return 308, b"", {"Range": f"bytes=0-{len(content) - 1}"}
            return 200, self.store.put(key, bytes(content))
        if kind == "resumable":
            id = str(len(self.store.uploads))
            name = query.get("name") or json.loads(body)["name"]
            self.store.uploads[id] = (f"{found[1]}/{name}", bytearray())
            place = f"http://{self.headers['Host']}{path}?uploadType=resumable&upload_id={id}"
            return 200, b"", {"Location": place}
        if kind == "multipart":
            boundary = re.search(r'boundary="?([^";]+)', self.headers["Content-Type"])
            assert boundary
            _, about, content, _ = body.split(b"--" + boundary[1].strip("'").encode())
            name = json.loads(about.split(b"\n\n" if b"\r\n\r\n" not in about else b"\r\n\r\n", 1)[1])["name"]
            separator = b"\r\n\r\n" if b"\r\n\r\n" in content[:200] else b"\n\n"
            body = content.split(separator, 1)[1]
            body = body[: -2 if body.endswith(b"\r\n") else -1]
        else:
            name = query["name"]
        done = self.store.put(f"{found[1]}/{name}", body, query.get("ifGenerationMatch"))
        return (200, done) if done else (412, {"error": {"code": 412, "message": "Precondition Failed"}})

    def _batch(self, body: bytes) -> tuple[Any, ...]:
        """Many deletions in one request, as gcsfs makes them."""
        boundary = re.search(r'boundary="?([^";]+)', self.headers["Content-Type"])
        assert boundary
        parts = []
        for number, request in enumerate(re.findall(rb"DELETE (\S+) HTTP", body)):
            url = urlsplit(request.decode())
            code, _ = self._delete(url.path, {})
            parts.append(
                f"--answer\r\nContent-Type: application/http\r\nContent-ID: <response-{number + 1}>\r\n\r\n"
                f"HTTP/1.1 {code} {'No Content' if code == 204 else 'Not Found'}\r\nContent-Length: 0\r\n\r\n\r\n"
            )
        text = "".join(parts) + "--answer--"
        return 200, text.encode(), {"Content-Type": "multipart/mixed; boundary=answer"}

    def _delete(self, path: str, query: dict[str, str]) -> tuple[Any, ...]:
        found = re.fullmatch(r"/storage/v1/b/([^/]+)/o/(.+)", path)
        key = f"{found[1]}/{unquote(found[2])}" if found else ""
        with self.store.lock:
            if key not in self.store.objects:
                return 404, {"error": {"code": 404, "message": "Not Found"}}
            condition = query.get("ifGenerationMatch")
            if condition is not None and int(condition) != self.store.objects[key][1]:
                return 412, {"error": {"code": 412, "message": "Precondition Failed"}}
            del self.store.objects[key]
        return 204, b""

    def _path(self) -> str:
        return re.sub("^//", "/", urlsplit(self.path).path)

    def _query(self) -> dict[str, str]:
        return {name: values[0] for name, values in parse_qs(urlsplit(self.path).query).items()}

    def _body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") == "chunked":
            body = b""
            while size := int(self.rfile.readline().split(b";")[0], 16):
                body += self.rfile.read(size)
                self.rfile.readline()
            self.rfile.readline()
            return body
        return self.rfile.read(int(self.headers.get("Content-Length") or 0))

    def _answer(self, code: int, content: Any = b"", headers: dict[str, str] | None = None) -> None:
        body = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(code)
        for name, value in {"Content-Type": "application/json", **(headers or {})}.items():
            self.send_header(name, value)
        if code not in (204, 304):
            self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if code not in (204, 304):
            with suppress(ConnectionError):  # who had asked has read enough
                self.wfile.write(body)
