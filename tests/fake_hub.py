"""A Hugging Face hub on localhost, just large enough for huggingface_hub to list and download one model."""

import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import urlsplit

REVISION = "0123456789abcdef0123456789abcdef01234567"
FAILURES = {  # the status and the X-Error-Code header that the hub sends
    "missing": (404, "RepoNotFound"),
    "gated": (403, "GatedRepo"),
    "broken": (500, ""),
}


@dataclass
class FakeHub:
    """Serves the files below `folder` as the model `name`, and notes what was asked for.

    `failure` is a key of FAILURES, the answer to every request; `files_only` spares the listing.
    """

    name: str
    folder: Path
    url: str = ""
    failure: str | None = None
    files_only: bool = False
    downloads: set[str] = field(default_factory=set)
    tokens: set[str | None] = field(default_factory=set)

    def answer(self, method: str, path: str) -> tuple[int, dict[str, str], bytes]:
        """Status, headers and body of one request."""
        listing, files = f"/api/models/{self.name}", f"/{self.name}/resolve/{REVISION}/"
        if self.failure and not (self.files_only and path.startswith(listing)):
            status, code = FAILURES[self.failure]
            return status, {"X-Error-Code": code, "X-Error-Message": "no"}, b""
        if path in (listing, f"{listing}/revision/main", f"{listing}/revision/{REVISION}"):
            siblings = [{"rfilename": name} for name in self.names()]
            return 200, {}, json.dumps({"id": self.name, "sha": REVISION, "siblings": siblings}).encode()
        if path == f"{listing}/tree/{REVISION}":
            entries = [
                {"type": "file", "path": name, "size": len(self.read(name)), "oid": self.etag(name)}
                for name in self.names()
            ]
            return 200, {}, json.dumps(entries).encode()
        name = path.removeprefix(files)
        if not path.startswith(files) or name not in self.names():
            return 404, {"X-Error-Code": "EntryNotFound"}, b""
        if method == "GET":
            self.downloads.add(name)
        return 200, {"ETag": f'"{self.etag(name)}"', "X-Repo-Commit": REVISION}, self.read(name)

    def names(self) -> list[str]:
        return [str(path.relative_to(self.folder)) for path in self.folder.rglob("*") if path.is_file()]

    def read(self, name: str) -> bytes:
        return (self.folder / name).read_bytes()

    def etag(self, name: str) -> str:
        return hashlib.sha1(self.read(name)).hexdigest()


@contextmanager
def serve(hub: FakeHub) -> Iterator[FakeHub]:
    """Serve `hub` at `hub.url` until the block ends."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            if hub.name in self.path:  # the client also asks for things of its own, without a token
                hub.tokens.add(self.headers.get("Authorization"))
            status, headers, body = hub.answer(self.command, urlsplit(self.path).path)
            self.send_response(status)
            for key, value in {**headers, "Content-Length": str(len(body))}.items():
                self.send_header(key, value)
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(body)

        do_HEAD = do_GET

        def log_message(self, format: str, *args: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        hub.url = f"http://127.0.0.1:{server.server_port}"
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
        thread.start()
        try:
            yield hub
        finally:
            server.shutdown()
            thread.join()
