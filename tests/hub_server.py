"""A Hugging Face Hub on 127.0.0.1, as far as huggingface_hub's client needs one, with faults to switch on.

Repositories live in memory: commits with all their files, tags, and LFS objects by sha256.
"""

import base64
import contextlib
import hashlib
import json
import re
import socket
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

TOKEN = "hf_loopback"


@dataclass
class Commit:
    oid: str
    files: dict[str, bytes]


@dataclass
class Repository:
    commits: list[Commit] = field(default_factory=list)
    tags: dict[str, str] = field(default_factory=dict)

    def commit(self, files: dict[str, bytes]) -> str:
        content = b"".join(name.encode() + hashlib.sha1(data).digest() for name, data in sorted(files.items()))
        self.commits.append(Commit(hashlib.sha1(bytes([len(self.commits)]) + content).hexdigest(), files))
        return self.commits[-1].oid

    def at(self, revision: str) -> Commit | None:
        if revision == "main":
            return self.commits[-1]
        oid = self.tags.get(revision, revision)
        return next((commit for commit in self.commits if commit.oid == oid), None)


@dataclass
class Hub:
    """The server's state.

    Attributes:
        repositories: by "namespace/name".
        objects: LFS objects by sha256.
        fault: what goes wrong with downloads, see `Handler.download`; None for nothing.
        requests: "METHOD path" of everything asked.
        token: what a client must show to write.
    """

    repositories: dict[str, Repository] = field(default_factory=dict)
    objects: dict[str, bytes] = field(default_factory=dict)
    fault: str | None = None
    requests: list[str] = field(default_factory=list)
    token: str = TOKEN
    url: str = ""


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: Hub

    def log_message(self, *_: Any) -> None:
        pass

    def do_GET(self) -> None:
        """Answers every kind of request."""
        self.path = unquote(urlsplit(self.path).path)
        self.hub.requests.append(f"{self.command} {self.path}")
        self.body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        if self.headers.get("Transfer-Encoding") == "chunked" and not self.body:
            self.body = self.read_chunks()
        writes = self.command in ("POST", "PUT") and not self.path.startswith("/lfs/")
        if writes and self.headers.get("Authorization") != f"Bearer {self.hub.token}":
            return self.json({"error": "Invalid username or password."}, 401)
        if self.hub.fault == "HTML page":
            return self.respond(b"<html>Please log in</html>", 200, {"Content-Type": "text/html"})
        routes = [
            (r"/api/repos/create", self.create_repo),
            (r"/api/validate-yaml", self.validate_yaml),
            (r"/api/models/([^/]+/[^/]+)/refs", self.refs),
            (r"/api/models/([^/]+/[^/]+)/preupload/(.+)", self.preupload),
            (r"/api/models/([^/]+/[^/]+)/commit/(.+)", self.commit),
            (r"/api/models/([^/]+/[^/]+)/tag/(.+)", self.tag),
            (r"/api/models/([^/]+/[^/]+)/paths-info/(.+)", self.paths_info),
            (r"/api/models/([^/]+/[^/]+)/revision/(.+)", self.repo_info),
            (r"/api/models/([^/]+/[^/]+)", self.repo_info),
            (r"/([^/]+/[^/]+)\.git/info/lfs/objects/batch", self.lfs_batch),
            (r"/lfs/([0-9a-f]{64})", self.lfs_put),
            (r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", self.download),
            (r"/elsewhere/(.+)", self.elsewhere),
        ]
        for pattern, function in routes:
            if match := re.fullmatch(pattern, self.path):
                return function(*match.groups())
        return self.json({"error": f"no route {self.path}"}, 404)

    do_HEAD = do_POST = do_PUT = do_GET

    def read_chunks(self) -> bytes:
        data = b""
        while size := int(self.rfile.readline(), 16):
            data += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return data

    def json(self, document: Any, status: int = 200, **headers: str) -> None:
        self.respond(json.dumps(document).encode(), status, {"Content-Type": "application/json", **headers})

    def respond(self, data: bytes, status: int, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(len(data)), **headers}.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def missing(self, code: str) -> None:
        self.json({"error": code}, 404, X_Error_Code=code, X_Error_Message=code)

    # Reading

    def find(self, repo: str, revision: str) -> Commit | None:
        """Returns a commit, or answers that there is none."""
        if repo not in self.hub.repositories or self.hub.fault == "no repository":
            return self.missing("RepoNotFound")
        commit = self.hub.repositories[repo].at(revision)
        if commit is None or self.hub.fault == "no revision":
            return self.missing("RevisionNotFound")
        return commit

    def repo_info(self, repo: str, revision: str = "main") -> None:
        if commit := self.find(repo, revision):
            self.json({"id": repo, "sha": commit.oid, "tags": [], "private": False})

    def refs(self, repo: str) -> None:
        repository = self.hub.repositories[repo]
        main = {"name": "main", "ref": "refs/heads/main", "targetCommit": repository.commits[-1].oid}
        tags = [{"name": k, "ref": f"refs/tags/{k}", "targetCommit": v} for k, v in repository.tags.items()]
        self.json({"branches": [main], "tags": tags, "converts": []})

    def paths_info(self, repo: str, revision: str) -> None:
        commit = self.hub.repositories[repo].at(revision)
        assert commit is not None
        infos = []
        for path in parse_qs(self.body.decode())["paths"]:
            data = commit.files[path]
            lfs = {"oid": sha256(data), "size": len(data), "pointerSize": 130} if is_lfs(path) else None
            infos.append({"type": "file", "path": path, "size": len(data), "oid": git_oid(data), "lfs": lfs})
        self.json(infos)

    def download(self, repo: str, revision: str, path: str) -> None:
        """Serves a file, or the fault that is switched on."""
        fault = self.hub.fault
        if fault in ("401", "403"):
            return self.json({"error": "gated"}, int(fault), X_Error_Code="GatedRepo", X_Error_Message="gated")
        if fault in ("500", "503"):
            return self.json({"error": "fault"}, int(fault))
        if fault in ("silent", "dripping headers"):
            return self.drip(b"HTTP/1.1 200 " if fault != "silent" else b"", fault)
        commit = self.find(repo, revision)
        if commit is None:
            return None
        if path not in commit.files or fault == "no file":
            return self.json({"error": "EntryNotFound"}, 404, X_Error_Code="EntryNotFound", X_Repo_Commit=commit.oid)
        data = commit.files[path]
        altered = data[:-9] + bytes([data[-9] ^ 1]) + data[-8:]
        data = {"altered": altered, "shorter": data[:-100], "longer": data + b"\0" * 8}.get(fault, data)
        headers = {"X-Repo-Commit": commit.oid, "ETag": f'"{sha256(data)}"', "Accept-Ranges": "bytes"}
        headers |= {"etag": {"ETag": '"../../../outside"'}, "commit": {"X-Repo-Commit": "../../outside"}}.get(fault, {})
        if fault == "redirect":
            headers |= {"Location": f"{self.hub.url}/elsewhere/{path}", "X-Linked-ETag": headers["ETag"]}
            headers["X-Linked-Size"] = str(len(data))
            return self.respond(b"", 302, headers)
        start = int(match[1]) if (match := re.match(r"bytes=(\d+)-", self.headers.get("Range", ""))) else 0
        if self.command == "GET" and fault in ("cut", "slow", "stalling", "dripping"):
            self.send_response(200)
            for name, value in {"Content-Length": str(len(data)), **headers}.items():
                self.send_header(name, value)
            self.end_headers()
            if fault == "slow":
                for place in range(0, len(data), 1 + len(data) // 20):
                    self.wfile.write(data[place : place + 1 + len(data) // 20])
                    time.sleep(0.05)
                return None
            self.wfile.write(data[start : start + 1000])
            return self.close() if fault == "cut" else self.drip(b"", fault)
        if start:
            headers["Content-Range"] = f"bytes {start}-{len(data) - 1}/{len(data)}"
        self.respond(data[start:], 206 if start else 200, headers)

    def elsewhere(self, path: str) -> None:
        self.respond(b"something else entirely" * 100, 200, {"ETag": '"elsewhere"'})

    def drip(self, first: bytes, fault: str) -> None:
        """Holds the connection while the fault lasts, with a byte now and then if it is a dripping one."""
        with contextlib.suppress(OSError):
            self.wfile.write(first)
            while self.hub.fault == fault:
                time.sleep(0.1)
                self.wfile.write(b"x" if "dripping" in fault else b"")
            self.close()

    def close(self) -> None:
        self.close_connection = True
        with contextlib.suppress(OSError):
            self.connection.shutdown(socket.SHUT_RDWR)

    # Writing

    def create_repo(self) -> None:
        request = json.loads(self.body)
        repo = f"{request['organization']}/{request['name']}" if request.get("organization") else request["name"]
        url = f"{self.hub.url}/{repo}"
        if repo in self.hub.repositories:
            return self.json({"error": "exists", "url": url}, 409)
        self.hub.repositories[repo] = Repository()
        self.hub.repositories[repo].commit({".gitattributes": b"*.safetensors filter=lfs\n"})
        return self.json({"url": url, "name": repo, "id": repo})

    def validate_yaml(self) -> None:
        content = json.loads(self.body)["content"]
        valid = content.startswith("---\n") and "license:" in content
        self.json({"errors": [] if valid else [{"message": "no metadata"}], "warnings": []}, 200 if valid else 400)

    def preupload(self, repo: str, revision: str) -> None:
        files = self.hub.repositories[repo].commits[-1].files
        rows = []
        for path in (row["path"] for row in json.loads(self.body)["files"]):
            mode, digest = ("lfs", sha256) if is_lfs(path) else ("regular", git_oid)
            oid = digest(files[path]) if path in files else None
            rows.append({"path": path, "uploadMode": mode, "shouldIgnore": False, "oid": oid})
        self.json({"files": rows})

    def lfs_batch(self, repo: str) -> None:
        rows = []
        for row in json.loads(self.body)["objects"]:
            actions = {"upload": {"href": f"{self.hub.url}/lfs/{row['oid']}"}}
            rows.append({**row} if row["oid"] in self.hub.objects else {**row, "actions": actions})
        self.json({"transfer": "basic", "objects": rows})

    def lfs_put(self, oid: str) -> None:
        if sha256(self.body) != oid:
            return self.json({"error": "digest"}, 400)
        self.hub.objects[oid] = self.body
        return self.json({})

    def commit(self, repo: str, revision: str) -> None:
        repository = self.hub.repositories[repo]
        files = dict(repository.commits[-1].files)
        for line in self.body.decode().splitlines():
            row = json.loads(line)
            value = row["value"]
            if row["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif row["key"] == "lfsFile":
                files[value["path"]] = self.hub.objects[value["oid"]]
        oid = repository.commit(files)
        self.json({"success": True, "commitOid": oid, "commitUrl": f"{self.hub.url}/{repo}/commit/{oid}"})

    def tag(self, repo: str, revision: str) -> None:
        repository, name = self.hub.repositories[repo], json.loads(self.body)["tag"]
        commit = repository.at(revision)
        assert commit is not None
        assert name not in repository.tags
        repository.tags[name] = commit.oid
        self.json({})


def is_lfs(path: str) -> bool:
    return path.endswith(".safetensors")


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def git_oid(data: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


@contextlib.contextmanager
def serve() -> Iterator[Hub]:
    """Runs the server in a thread until the block ends."""
    hub = Hub()
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("BoundHandler", (Handler,), {"hub": hub}))
    server.daemon_threads = True
    hub.url = f"http://127.0.0.1:{server.server_address[1]}"
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
