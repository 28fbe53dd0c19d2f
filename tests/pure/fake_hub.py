"""A hub of models in this process: enough of the API of huggingface.co, over real HTTP."""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit

__all__ = ["FakeHub", "Repo", "running_hub"]


@dataclass
class Repo:
    """A model's files at its one commit. ``token`` that may read it (empty: all). ``sizes``: reported file sizes."""

    files: dict[str, bytes]
    commit: str = "c0ffee" + "0" * 34
    revisions: tuple[str, ...] = ("main",)
    token: str = ""
    gated: bool = False
    sizes: dict[str, int] = field(default_factory=dict)


class FakeHub:
    """``repos`` by name. ``asked``: method and path of every request. ``status``: of every response, if not 0."""

    def __init__(self) -> None:
        self.repos: dict[str, Repo] = {}
        self.asked: list[str] = []
        self.status = 0
        self.page = b""
        """The body of every response instead, if set."""
        self.cut_after = -1
        """Bytes of a file after which the connection is closed; -1: never."""
        self.url = ""

    def fetched(self) -> set[str]:
        """The files whose content was requested."""
        return {path.rpartition("/")[2] for path in self.asked if path.startswith("GET") and "/resolve/" in path}


@contextmanager
def running_hub() -> Iterator[FakeHub]:
    """The hub, answering at ``hub.url`` until the end of the block."""
    hub = FakeHub()
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": hub}))
    hub.url = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


class _Handler(BaseHTTPRequestHandler):
    hub: FakeHub

    def do_GET(self) -> None:
        self.answer()

    def do_HEAD(self) -> None:
        self.answer()

    def log_message(self, format: str, *args: object) -> None:
        pass

    def answer(self) -> None:
        path = unquote(urlsplit(self.path).path)
        self.hub.asked.append(f"{self.command} {path}")
        if self.hub.status:
            return self.refuse(self.hub.status, "")
        if self.hub.page:
            return self.send(self.hub.page, "text/html")
        parts = path.removeprefix("/api/models").strip("/").split("/")
        name, rest = "/".join(parts[:2]), parts[2:]
        repo = self.hub.repos.get(name)
        given = (self.headers.get("Authorization") or "").removeprefix("Bearer ")
        if repo is None or (repo.token and not repo.gated and given != repo.token):
            return self.refuse(404 if repo is None and given else 401, "RepoNotFound")
        if rest and rest[1] not in (*repo.revisions, repo.commit):
            return self.refuse(404, "RevisionNotFound")
        if path.startswith("/api/models/"):
            # The list of files of a gated model is public.
            return self.send_json(self.info(name, repo) if not rest or rest[0] == "revision" else self.tree(repo))
        if repo.token and given != repo.token:
            return self.refuse(403 if given else 401, "GatedRepo")
        file = "/".join(rest[2:])
        if file not in repo.files:
            return self.refuse(404, "EntryNotFound")
        return self.send_file(repo, file)

    def info(self, name: str, repo: Repo) -> object:
        siblings = [
            {"rfilename": file, "size": repo.sizes.get(file, len(data)), "blobId": _oid(data)}
            for file, data in repo.files.items()
        ]
        return {"_id": "1", "id": name, "modelId": name, "sha": repo.commit, "siblings": siblings, "private": False}

    def tree(self, repo: Repo) -> object:
        return [
            {"type": "file", "path": file, "size": repo.sizes.get(file, len(data)), "oid": _oid(data)}
            for file, data in repo.files.items()
        ]

    def send_json(self, value: object) -> None:
        self.send(json.dumps(value).encode(), "application/json")

    def send(self, data: bytes, kind: str) -> None:
        self.send_response(200)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def send_file(self, repo: Repo, file: str) -> None:
        data = repo.files[file]
        start = int((self.headers.get("Range") or "bytes=0-").removeprefix("bytes=").split("-")[0])
        self.send_response(206 if start else 200)
        self.send_header("X-Repo-Commit", repo.commit)
        self.send_header("ETag", f'"{_oid(data)}"')
        self.send_header("Content-Length", str(len(data) - start))
        if start:
            self.send_header("Content-Range", f"bytes {start}-{len(data) - 1}/{len(data)}")
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(data[start:] if self.hub.cut_after < 0 else data[start : start + self.hub.cut_after])
            self.close_connection = self.hub.cut_after >= 0

    def refuse(self, status: int, code: str) -> None:
        self.send_response(status)
        if code:
            self.send_header("X-Error-Code", code)
            self.send_header("X-Error-Message", f"{code} it is")
        self.send_header("Content-Length", "0")
        self.end_headers()


def _oid(data: bytes) -> str:
    return hashlib.sha1(data).hexdigest()
