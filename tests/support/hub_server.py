"""A model hub on loopback, as far as downloads use one."""

import hashlib
import json
import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

FIRST, SECOND = "1" * 40, "2" * 40
CONFIG = json.dumps({"model_type": "gpt2", "architectures": ["GPT2LMHeadModel"]}).encode()
INDEX = json.dumps(
    {
        "weight_map": {
            "a": "model-00001-of-00002.safetensors",
            "b": "model-00002-of-00002.safetensors",
        }
    }
).encode()
SMALL = {"config.json": CONFIG, "model.safetensors": b"weights", "tokenizer.json": b"{}"}


class Hub:
    """The part of a model hub that downloads use, on loopback, and a log of what was asked."""

    def __init__(self) -> None:
        self.repos: dict[str, dict[str, dict[str, bytes]]] = {}  # repo -> commit -> files
        self.refs: dict[str, dict[str, str]] = {}
        self.gated: set[str] = set()
        self.token = "hf_right"
        self.log: list[tuple[str, str]] = []
        self.status: int | None = None  # answer everything with this
        self.plain_404 = False  # as servers do that are no hub
        self.down = False
        hub = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"
            disable_nagle_algorithm = True

            def do_HEAD(self) -> None:
                hub.answer(self, body=False)

            def do_GET(self) -> None:
                hub.answer(self, body=True)

            def log_message(self, *args: Any) -> None: ...

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        threading.Thread(target=self.server.serve_forever, args=(0.02,), daemon=True).start()

    def close(self) -> None:
        self.down = True
        self.server.shutdown()
        self.server.server_close()

    def add(
        self, repo: str, files: dict[str, bytes], commit: str = FIRST, ref: str = "main"
    ) -> None:
        self.repos.setdefault(repo, {})[commit] = files
        self.refs.setdefault(repo, {})[ref] = commit

    def asked(self, method: str) -> list[str]:
        return [path.rpartition("/")[2] for verb, path in self.log if verb == method]

    def answer(self, request: BaseHTTPRequestHandler, body: bool) -> None:
        if self.down:  # connections kept alive die too
            request.close_connection = True
            return
        self.log.append((request.command, request.path))
        status, headers, content = self.look_up(request)
        request.send_response(status)
        for key, value in headers.items():
            request.send_header(key, value)
        request.send_header("Content-Length", str(len(content)))
        request.end_headers()
        if body:
            request.wfile.write(content)

    def look_up(self, request: BaseHTTPRequestHandler) -> tuple[int, dict[str, str], bytes]:
        if self.status is not None:
            return self.status, {}, b""
        match = re.fullmatch(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", request.path)
        listed = re.match(r"/api/models/([^/]+/[^/]+)/tree/([^/?]+)()", request.path)
        if (asked := match or listed) is None:
            return 404, {}, b""
        repo, revision, name = asked.groups()
        token = request.headers.get("Authorization")
        if token not in (None, f"Bearer {self.token}"):
            return 401, {"X-Error-Message": "Invalid credentials in Authorization header"}, b""
        if repo not in self.repos:
            return 401 if token is None else 404, {"X-Error-Code": "RepoNotFound"}, b""
        if repo in self.gated and token is None:
            return 401, {"X-Error-Code": "GatedRepo"}, b""
        commit = self.refs[repo].get(revision, revision)
        if commit not in self.repos[repo]:
            return 404, {"X-Error-Code": "RevisionNotFound"}, b""
        files = self.repos[repo][commit]
        if listed:
            entries = [{"type": "file", "path": name, "size": 1, "oid": "0"} for name in files]
            return 200, {"Content-Type": "application/json"}, json.dumps(entries).encode()
        if name not in files:
            code = {} if self.plain_404 else {"X-Error-Code": "EntryNotFound"}
            return 404, {**code, "X-Repo-Commit": commit}, b""
        etag = hashlib.sha256(files[name]).hexdigest()
        return 200, {"X-Repo-Commit": commit, "ETag": f'"{etag}"'}, files[name]


def holds(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.iterdir())
