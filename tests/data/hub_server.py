"""A server that answers as the Hugging Face Hub does, for the folders of a folder."""

import hashlib
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs

COMMIT = "0123456789abcdef0123456789abcdef01234567"


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_GET(self):
        self.server.requests.append(f"{self.command} {self.path}")
        path = self.path.partition("?")[0]
        place = re.match(r"(?:/api/(?:datasets|models)|/datasets|)/org/(\w+)", path)
        self.folder = self.server.root / place[1] if place else None
        rest = path[place.end() :] if place else ""
        if not place or not self.folder.is_dir():
            return self._missing("RepoNotFound")
        if match := re.fullmatch(r"/resolve/([^/]+)/(.*)", rest):
            return self._file(match[1], self.folder / match[2])
        if match := re.match(r"/tree/[^/]+/?(.*)", rest):
            return self._tree(self.folder / match[1])
        return self._json({"id": f"org/{place[1]}", "sha": COMMIT, "siblings": [], "tags": [], "private": False})

    do_HEAD = do_GET

    def do_POST(self):  # paths-info
        self.folder = self.server.root / self.path.split("/")[4]
        body = self.rfile.read(int(self.headers["Content-Length"])).decode()
        asked = json.loads(body)["paths"] if body.startswith("{") else parse_qs(body)["paths"]
        self._json([self._entry(self.folder / name) for name in asked if (self.folder / name).exists()])

    def _entry(self, path):
        name = path.relative_to(self.folder).as_posix()
        if path.is_dir():
            return {"type": "directory", "oid": "0" * 40, "size": 0, "path": name}
        return {"type": "file", "oid": _hash(path), "size": path.stat().st_size, "path": name}

    def _tree(self, folder):
        if not folder.is_dir():
            return self._missing("EntryNotFound")
        found = (
            folder.rglob("*") if "recursive=True" in self.path or "recursive=true" in self.path else folder.iterdir()
        )
        return self._json([self._entry(path) for path in sorted(found)])

    def _file(self, revision, path):
        if revision not in ("main", COMMIT):
            return self._missing("RevisionNotFound")
        if not path.is_file():
            return self._missing("EntryNotFound")
        return self._answer(200, path.read_bytes(), {"ETag": f'"{_hash(path)}"'})

    def _json(self, value):
        self._answer(200, json.dumps(value).encode(), {"Content-Type": "application/json"})

    def _missing(self, code):
        self._answer(404, b"{}", {"X-Error-Code": code, "X-Error-Message": f"{code}: {self.path}"})

    def _answer(self, status, body, headers):
        first = 0
        if (wanted := re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))) and status == 200:
            first, last = int(wanted[1]), int(wanted[2] or len(body) - 1)
            headers["Content-Range"] = f"bytes {first}-{min(last, len(body) - 1)}/{len(body)}"
            body, status = body[first : last + 1], 206
        self.send_response(status)
        for name, value in {**headers, "Content-Length": str(len(body)), "X-Repo-Commit": COMMIT}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def log_message(self, *arguments):
        pass


def _hash(path: Path) -> str:
    return hashlib.sha1(path.read_bytes()).hexdigest()


@contextmanager
def serve(root: Path, port: int = 0) -> Iterator[ThreadingHTTPServer]:
    """Every folder of `root` is a dataset, and a model, of the organisation `org`; `.requests` lists what was asked."""
    ThreadingHTTPServer.allow_reuse_address = True
    server = ThreadingHTTPServer(("127.0.0.1", port), _Handler)
    server.root, server.requests = root, []
    threading.Thread(target=server.serve_forever, args=[0.05], daemon=True).start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()
