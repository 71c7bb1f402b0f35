"""A small server that speaks the part of the Hugging Face hub's HTTP API that a download uses, on a port of its own."""

import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@contextmanager
def hub(folder: Path, cards: dict[str, dict]) -> Iterator[tuple[str, list[str]]]:
    """Serve FOLDER/OWNER/REPOSITORY/FILE; yield the address and the list of requests ("GET /path").

    `cards`: by repository, the header of its README, such as {"license": "mit"}.
    """
    requests: list[str] = []

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def answer(self, status: int, body: bytes, **headers: str) -> None:
            self.send_response(status)
            for key, value in headers.items():
                self.send_header(key.replace("_", "-"), value)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(body)

        def do_GET(self) -> None:
            requests.append(f"{self.command} {self.path}")
            words = self.path.split("?")[0].strip("/").split("/")
            if words[:2] == ["api", "models"]:
                return self.model_info("/".join(words[2:4]))
            owner, repository, resolve, _, *inner = words
            path = folder / owner / repository / "/".join(inner)
            if resolve != "resolve" or f"{owner}/{repository}" not in cards:
                return self.answer(404, b"", X_Error_Code="RepoNotFound")
            if not path.is_file():
                return self.answer(404, b"", X_Error_Code="EntryNotFound", X_Repo_Commit=COMMIT)
            body = path.read_bytes()
            self.answer(200, body, ETag=f'"{hashlib.sha256(body).hexdigest()}"', X_Repo_Commit=COMMIT)

        do_HEAD = do_GET

        def model_info(self, repository: str) -> None:
            if repository not in cards:
                return self.answer(404, b"", X_Error_Code="RepoNotFound")
            files = [{"rfilename": str(p.name)} for p in sorted((folder / repository).iterdir())]
            known = {"id": repository, "modelId": repository, "sha": COMMIT, "private": False, "tags": [],
                     "siblings": files, "cardData": cards[repository]}  # fmt: skip
            self.answer(200, json.dumps(known).encode(), Content_Type="application/json")

        def log_message(self, *_: object) -> None:
            """Write no log."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}", requests
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
