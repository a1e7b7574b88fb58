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
        write_fault: HTTP status that every write answers with; None for none.
        requests: "METHOD path" of everything asked.
    """

    repositories: dict[str, Repository] = field(default_factory=dict)
    objects: dict[str, bytes] = field(default_factory=dict)
    fault: str | None = None
    write_fault: int | None = None
    requests: list[str] = field(default_factory=list)
    url: str = ""


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: Hub

    def log_message(self, *_: Any) -> None:
        pass

    def do_HEAD(self) -> None:
        self.route()

    def do_GET(self) -> None:
        self.route()

    def do_POST(self) -> None:
        self.route()

    def do_PUT(self) -> None:
        self.route()

    def route(self) -> None:
        self.path = unquote(urlsplit(self.path).path)
        self.hub.requests.append(f"{self.command} {self.path}")
        self.body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        if self.headers.get("Transfer-Encoding") == "chunked" and not self.body:
            self.body = self.read_chunks()
        if self.command in ("POST", "PUT"):
            if self.hub.write_fault:
                return self.json({"error": "fault"}, self.hub.write_fault)
            if self.headers.get("Authorization") != f"Bearer {TOKEN}" and not self.path.startswith("/lfs/"):
                return self.json({"error": "Invalid username or password."}, 401)
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

    def repo_info(self, repo: str, revision: str = "main") -> None:
        if repo not in self.hub.repositories:
            return self.missing("RepoNotFound")
        commit = self.hub.repositories[repo].at(revision)
        if commit is None:
            return self.missing("RevisionNotFound")
        siblings = [{"rfilename": name} for name in sorted(commit.files)]
        self.json({"id": repo, "modelId": repo, "sha": commit.oid, "siblings": siblings, "tags": [], "private": False})

    def refs(self, repo: str) -> None:
        if repo not in self.hub.repositories:
            return self.missing("RepoNotFound")
        repository = self.hub.repositories[repo]
        main = {"name": "main", "ref": "refs/heads/main", "targetCommit": repository.commits[-1].oid}
        tags = [{"name": k, "ref": f"refs/tags/{k}", "targetCommit": v} for k, v in repository.tags.items()]
        self.json({"branches": [main], "tags": tags, "converts": []})

    def paths_info(self, repo: str, revision: str) -> None:
        commit = self.hub.repositories[repo].at(revision)
        assert commit is not None
        infos = []
        for path in parse_qs(self.body.decode()).get("paths", []):
            if path in commit.files:
                data = commit.files[path]
                info = {"type": "file", "path": path, "size": len(data), "oid": git_oid(data)}
                if is_lfs(path):
                    info["lfs"] = {"oid": sha256(data), "size": len(data), "pointerSize": 130}
                infos.append(info)
        self.json(infos)

    def download(self, repo: str, revision: str, path: str) -> None:
        """Serves a file, or the fault that is switched on."""
        fault = self.hub.fault
        if fault == "no repository" or repo not in self.hub.repositories:
            return self.missing("RepoNotFound")
        if fault in ("401", "403"):
            return self.json({"error": "gated"}, int(fault), X_Error_Code="GatedRepo", X_Error_Message="gated")
        if fault in ("500", "503"):
            return self.json({"error": "fault"}, int(fault))
        if fault == "silent":
            time.sleep(8)
            return self.close()
        commit = self.hub.repositories[repo].at(revision)
        if commit is None or fault == "no revision":
            return self.missing("RevisionNotFound")
        if path not in commit.files or fault == "no file":
            return self.json({"error": "EntryNotFound"}, 404, X_Error_Code="EntryNotFound", X_Repo_Commit=commit.oid)
        data = commit.files[path]
        if fault == "altered":
            data = data[:-9] + bytes([data[-9] ^ 1]) + data[-8:]
        elif fault == "shorter":
            data = data[:-100]
        elif fault == "longer":
            data = data + b"\0" * 8
        headers = {"X-Repo-Commit": commit.oid, "ETag": f'"{sha256(data)}"', "Accept-Ranges": "bytes"}
        if fault == "etag":
            headers["ETag"] = '"../../../outside"'
        if fault == "commit":
            headers["X-Repo-Commit"] = "../../outside"
        if fault == "redirect":
            headers |= {"Location": f"{self.hub.url}/elsewhere/{path}", "X-Linked-ETag": headers["ETag"]}
            headers["X-Linked-Size"] = str(len(data))
            return self.respond(b"", 302, headers)
        start = int(match[1]) if (match := re.match(r"bytes=(\d+)-", self.headers.get("Range", ""))) else 0
        if self.command == "GET" and fault in ("cut", "slow"):
            self.send_response(200)
            for name, value in {"Content-Length": str(len(data)), **headers}.items():
                self.send_header(name, value)
            self.end_headers()
            if fault == "cut":
                self.wfile.write(data[start : start + 1000])
                return self.close()
            for place in range(0, len(data), 1 + len(data) // 20):
                self.wfile.write(data[place : place + 1 + len(data) // 20])
                self.wfile.flush()
                time.sleep(0.05)
            return None
        if start:
            headers["Content-Range"] = f"bytes {start}-{len(data) - 1}/{len(data)}"
        self.respond(data[start:], 206 if start else 200, headers)

    def elsewhere(self, path: str) -> None:
        self.respond(b"something else entirely" * 100, 200, {"ETag": '"elsewhere"'})

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
        for row in json.loads(self.body)["files"]:
            path = row["path"]
            oid = None
            if path in files:
                oid = sha256(files[path]) if is_lfs(path) else git_oid(files[path])
            mode = "lfs" if is_lfs(path) else "regular"
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
        if name in repository.tags:
            return self.json({"error": "exists"}, 409)
        commit = repository.at(revision)
        assert commit is not None
        repository.tags[name] = commit.oid
        return self.json({})


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
