"""A Hugging Face hub in this process: one repository, read from a directory."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from urllib.parse import unquote, urlsplit


@dataclass
class FakeHub:
    """What it serves and was asked.

    Attributes:
        repository: "organization/name".
        revisions: directories of the repository's files, by branch, tag or commit.
        token: what requests must bring, or None.
        asked: paths of requests.
        url: where it listens.
    """

    repository: str
    revisions: dict[str, Path]
    token: str | None = None
    asked: list[str] = field(default_factory=list)
    url: str = ""

    def commit(self, revision: str) -> str:
        return hashlib.sha1(revision.encode()).hexdigest()

    def directory(self, revision: str) -> Path | None:
        known = {**self.revisions, **{self.commit(r): d for r, d in self.revisions.items()}}
        return known.get(revision)


@contextmanager
def fake_hub(hub: FakeHub) -> Iterator[FakeHub]:
    """Serve until the block is left."""

    class Handler(BaseHTTPRequestHandler):
        def do_HEAD(self) -> None:
            self.answer(with_body=False)

        def do_GET(self) -> None:
            self.answer(with_body=True)

        def answer(self, with_body: bool) -> None:
            path = unquote(urlsplit(self.path).path)
            hub.asked.append(path)
            if hub.token and self.headers["Authorization"] != f"Bearer {hub.token}":
                return self.send(401, b"", with_body, {"X-Error-Code": "RepoNotFound"})
            api = f"/api/models/{hub.repository}/revision/"
            tree = f"/api/models/{hub.repository}/tree/"
            files = f"/{hub.repository}/resolve/"
            if path.startswith(tree):
                directory = hub.directory(path.removeprefix(tree))
                assert directory is not None
                entries = [
                    {"type": "file", "path": one.name, "size": one.stat().st_size, "oid": "0" * 40}
                    for one in sorted(directory.iterdir())
                ]
                return self.send(200, json.dumps(entries).encode(), with_body, {})
            if path.startswith(api):
                revision = path.removeprefix(api)
                directory = hub.directory(revision)
                if directory is None:
                    headers = {"X-Error-Code": "RevisionNotFound"}
                    return self.send(404, b"", with_body, headers)
                names = [{"rfilename": one.name} for one in sorted(directory.iterdir())]
                commit = hub.commit(revision)
                about = {"id": hub.repository, "sha": commit, "siblings": names}
                return self.send(200, json.dumps(about).encode(), with_body, {})
            if path.startswith(files):
                revision, name = path.removeprefix(files).split("/", 1)
                directory = hub.directory(revision)
                assert directory is not None
                content = (directory / name).read_bytes()
                headers = {
                    "ETag": f'"{hashlib.sha256(content).hexdigest()}"',
                    "X-Repo-Commit": revision,
                }
                return self.send(200, content, with_body, headers)
            return self.send(404, b"", with_body, {"X-Error-Code": "RepoNotFound"})

        def send(self, status: int, body: bytes, with_body: bool, headers: dict[str, str]) -> None:
            self.send_response(status)
            for name, value in {**headers, "Content-Length": str(len(body))}.items():
                self.send_header(name, value)
            self.end_headers()
            if with_body:
                self.wfile.write(body)

        def log_message(self, format: str, *args: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    Thread(target=server.serve_forever, daemon=True).start()
    hub.url = f"http://127.0.0.1:{server.server_port}"
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
