"""A small Hub on loopback: its API over HTTP, as the real client speaks it, with commits as git keeps them, and faults on request."""

import base64
import hashlib
import json
import os
import re
import tempfile
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, unquote, urlsplit

import yaml
from hub_repository import Repository


USER = "owner"
TOKENS = {"hf_write": "write", "hf_read": "read"}
LARGE = (".safetensors", ".bin", ".pt", ".png")  # into large file storage


@dataclass
class Fault:
    """What happens to the next requests of a kind: a status, "cut" after a part of the body, or "slow"."""

    method: str
    path: str  # a regular expression
    what: int | str
    times: int = 1


class Hub(ThreadingHTTPServer):
    daemon_threads = True

    def __init__(self, port: int = 0):
        super().__init__(("127.0.0.1", port), _Handler)
        self.url = f"http://127.0.0.1:{self.server_port}"
        self.lock = threading.RLock()
        self.clear()

    def clear(self) -> None:
        self.repositories: dict[str, Repository] = {}
        self.storage: dict[str, bytes] = {}
        self.faults: list[Fault] = []
        self.received: list[bytes] = []
        self.requests: list[str] = []

    def start(self) -> "Hub":
        threading.Thread(target=self.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()
        return self

    def handle_error(self, request, client_address) -> None:
        """A client that hangs up is no error of the server's."""

    def take_fault(self, method: str, path: str) -> Fault | None:
        with self.lock:
            for fault in self.faults:
                if fault.times > 0 and fault.method == method and re.search(fault.path, path):
                    fault.times -= 1
                    return fault
        return None


class _Handler(BaseHTTPRequestHandler):
    server: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, *args) -> None:
        """Nothing on stderr."""

    def do_GET(self):
        self._handle("GET")

    def do_HEAD(self):
        self._handle("HEAD")

    def do_POST(self):
        self._handle("POST")

    def do_PUT(self):
        self._handle("PUT")

    def do_DELETE(self):
        self._handle("DELETE")

    def _handle(self, method: str) -> None:
        url = urlsplit(self.path)
        path, query = unquote(url.path), parse_qs(url.query)
        self.server.requests.append(f"{method} {path}")
        fault = self.server.take_fault(method, path)
        if fault is not None and fault.what == "cut":
            self.rfile.read(min(1000, int(self.headers.get("Content-Length") or 0)))
            self.close_connection = True
            self.connection.close()
            return
        if fault is not None and fault.what == "slow":
            time.sleep(3)
        body = self._body()
        self.server.received.append(body)
        if fault is not None and isinstance(fault.what, int):
            return self._answer(fault.what, {"error": f"fault {fault.what}"})
        with self.server.lock:
            for pattern, call in _ROUTES:
                asked = f"{method} {path}" if " " in pattern else path
                if (match := re.fullmatch(pattern, asked)) is not None:
                    return call(self, *match.groups(), query=query, body=body)
        return self._answer(404, {"error": "Not Found"})

    def _body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") == "chunked":
            parts = []
            while size := int(self.rfile.readline().split(b";")[0], 16):
                parts.append(self.rfile.read(size))
                self.rfile.readline()
            self.rfile.readline()
            return b"".join(parts)
        return self.rfile.read(int(self.headers.get("Content-Length") or 0))

    def _answer(self, status: int, content=None, headers: dict[str, str] | None = None) -> None:
        data = content if isinstance(content, bytes) else b"" if content is None else json.dumps(content).encode()
        self.send_response(status)
        for name, value in {"Content-Length": str(len(data)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def _role(self) -> str | None:
        return TOKENS.get(self.headers.get("Authorization", "").removeprefix("Bearer "))

    def _repository(self, name: str) -> Repository | None:
        """The repository, or None with 401 or 404 said, as the Hub says it for what does not exist or may not be seen."""
        found = self.server.repositories.get(name)
        if found is None or (found.private and self._role() is None):
            status = 401 if self._role() is None else 404
            self._answer(status, {"error": "Repository not found"}, {"X-Error-Code": "RepoNotFound"})
            return None
        return found

    def _may_write(self) -> bool:
        if self._role() != "write":
            self._answer(401 if self._role() is None else 403, {"error": "You may not write here"})
        return self._role() == "write"

    # ---- Account and repositories ----

    def whoami(self, *, query, body):
        if self._role() is None:
            return self._answer(401, {"error": "Invalid credentials"})
        token = {"displayName": "test", "role": self._role()}
        return self._answer(
            200, {"type": "user", "name": USER, "orgs": [], "auth": {"type": "access_token", "accessToken": token}}
        )

    def create(self, *, query, body):
        if not self._may_write():
            return None
        asked = json.loads(body)
        name = f"{asked.get('organization') or USER}/{asked['name']}"
        url = {"url": f"{self.server.url}/{name}"}
        if name in self.server.repositories:
            return self._answer(409, {**url, "error": "You already created this model repo"})
        made = Repository(private=bool(asked.get("private")) or asked.get("visibility") == "private")
        self.server.repositories[name] = made
        made.add("main", "initial commit", {".gitattributes": b"*.safetensors filter=lfs\n"}, None)
        return self._answer(200, url)

    def validate(self, *, query, body):
        content = json.loads(body)["content"]
        try:
            data = yaml.safe_load(content.split("---")[1]) if content.startswith("---") else {}
        except yaml.YAMLError as error:
            return self._answer(400, {"errors": [{"message": str(error)}], "warnings": []})
        bad = [name for name in data if not isinstance(name, str)]
        return self._answer(400 if bad else 200, {"errors": [], "warnings": []})

    # ---- Uploads ----

    def preupload(self, name, revision, *, query, body):
        if self._repository(name) is None or not self._may_write():
            return None
        files = [
            {
                "path": one["path"],
                "uploadMode": "lfs" if one["path"].endswith(LARGE) else "regular",
                "shouldIgnore": False,
            }
            for one in json.loads(body)["files"]
        ]
        return self._answer(200, {"files": files})

    def batch(self, name, *, query, body):
        if self._repository(name) is None or not self._may_write():
            return None
        objects = []
        for one in json.loads(body)["objects"]:
            href = f"{self.server.url}/storage/{one['oid']}"
            actions = {} if one["oid"] in self.server.storage else {"actions": {"upload": {"href": href}}}
            objects.append({**one, **actions})
        content = {"transfer": "basic", "objects": objects}
        return self._answer(200, content, {"Content-Type": "application/vnd.git-lfs+json"})

    def store(self, oid, *, query, body):
        if hashlib.sha256(body).hexdigest() != oid:
            return self._answer(400, {"error": "not the content that was announced"})
        self.server.storage[oid] = body
        return self._answer(200)

    def commit(self, name, revision, *, query, body):
        if (repository := self._repository(name)) is None or not self._may_write():
            return None
        operations = [json.loads(line) for line in body.decode().splitlines()]
        parent = repository.resolve(revision)
        if parent is None:
            return self._answer(404, {"error": "Invalid rev id"}, {"X-Error-Code": "RevisionNotFound"})
        title, files = operations[0]["value"]["summary"], dict(repository.commits[parent].files)
        for operation in operations[1:]:
            value = operation["value"]
            if operation["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
                self.server.received.append(files[value["path"]])
            elif operation["key"] == "lfsFile":
                files[value["path"]] = self.server.storage[value["oid"]]
            elif operation["key"] == "deletedFile":
                del files[value["path"]]
        oid = repository.add(revision, title, files, parent)
        return self._answer(200, {"commitUrl": f"{self.server.url}/{name}/commit/{oid}", "commitOid": oid})

    # ---- What is there ----

    def info(self, name, revision="main", *, query, body):
        if (repository := self._repository(name)) is None:
            return None
        if (oid := repository.resolve(revision)) is None:
            return self._answer(404, {"error": "Invalid rev id"}, {"X-Error-Code": "RevisionNotFound"})
        siblings = [{"rfilename": path} for path in repository.commits[oid].files]
        return self._answer(
            200,
            {"id": name, "modelId": name, "sha": oid, "private": repository.private, "tags": [], "siblings": siblings},
        )

    def tree(self, name, revision, folder="", *, query, body):
        if (repository := self._repository(name)) is None:
            return None
        if (oid := repository.resolve(revision)) is None:
            return self._answer(404, {"error": "Invalid rev id"}, {"X-Error-Code": "RevisionNotFound"})
        files = [_describe(path, data) for path, data in repository.commits[oid].files.items()]
        return self._answer(200, [file for file in files if file["path"].startswith(folder.removeprefix("/"))])

    def paths(self, name, revision, *, query, body):
        if (repository := self._repository(name)) is None:
            return None
        asked = parse_qs(body.decode())["paths"]
        files = repository.commits[repository.resolve(revision)].files
        return self._answer(200, [_describe(path, files[path]) for path in asked if path in files])

    def log(self, name, revision, *, query, body):
        if (repository := self._repository(name)) is None:
            return None
        day = "2026-01-01T00:00:00.000Z"
        found = [
            {
                "id": oid,
                "title": repository.commits[oid].title,
                "message": "",
                "authors": [{"user": USER}],
                "date": day,
            }
            for oid in repository.history(revision)
        ]
        return self._answer(200, found)

    def refs(self, name, *, query, body):
        if (repository := self._repository(name)) is None:
            return None
        kinds = {"branches": ("refs/heads/", repository.branches), "tags": ("refs/tags/", repository.tags)}
        found = {
            kind: [{"name": one, "ref": prefix + one, "targetCommit": oid} for one, oid in refs.items()]
            for kind, (prefix, refs) in kinds.items()
        }
        requests = [{"name": one, "ref": one, "targetCommit": oid} for one, oid in repository.pull_requests.items()]
        return self._answer(200, {**found, "converts": [], "pullRequests": requests})

    def resolve(self, name, revision, path, *, query, body):
        if (repository := self._repository(name)) is None:
            return None
        if (oid := repository.resolve(revision)) is None:
            return self._answer(404, {"error": "Invalid rev id"}, {"X-Error-Code": "RevisionNotFound"})
        data = repository.commits[oid].files.get(path)
        if data is None:
            return self._answer(
                404, {"error": "Entry not found"}, {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": oid}
            )
        headers = {"ETag": f'"{hashlib.sha256(data).hexdigest()}"', "X-Repo-Commit": oid, "Accept-Ranges": "bytes"}
        return self._answer(200, data, headers)

    # ---- History ----

    def squash(self, name, branch, *, query, body):
        if (repository := self._repository(name)) is None or not self._may_write():
            return None
        files = repository.commits[repository.branches[branch]].files
        repository.add(branch, json.loads(body)["message"], files, None)
        return self._answer(200, {})

    def branch(self, name, branch, *, query, body):
        if (repository := self._repository(name)) is None or not self._may_write():
            return None
        if branch in repository.branches:
            return self._answer(409, {"error": "Reference already exists"})
        repository.branches[branch] = repository.branches["main"]
        return self._answer(200, {})

    def delete_tag(self, name, tag, *, query, body):
        return self._delete(name, "tags", tag)

    def delete_branch(self, name, branch, *, query, body):
        return self._delete(name, "branches", branch)

    def _delete(self, name: str, kind: str, ref: str) -> None:
        if (repository := self._repository(name)) is not None and self._may_write():
            del getattr(repository, kind)[ref]
            self._answer(200, {})


def _describe(path: str, data: bytes) -> dict:
    pointer = f"version https://git-lfs.github.com/spec/v1\noid sha256:{hashlib.sha256(data).hexdigest()}\nsize {len(data)}\n"
    stored = pointer.encode() if path.endswith(LARGE) else data
    described = {"type": "file", "path": path, "size": len(data)}
    described["oid"] = hashlib.sha1(b"blob %d\0" % len(stored) + stored).hexdigest()
    if path.endswith(LARGE):
        described["lfs"] = {"oid": hashlib.sha256(data).hexdigest(), "size": len(data), "pointerSize": len(stored)}
    return described


_NAME = r"([\w.-]+/[\w.-]+)"
_MODEL = f"/api/models/{_NAME}"
_ROUTES: list[tuple[str, Callable]] = [
    ("/api/whoami-v2", _Handler.whoami),
    ("/api/repos/create", _Handler.create),
    ("/api/validate-yaml", _Handler.validate),
    (f"{_MODEL}/preupload/(.+)", _Handler.preupload),
    (rf"/{_NAME}\.git/info/lfs/objects/batch", _Handler.batch),
    ("/storage/([0-9a-f]{64})", _Handler.store),
    (f"{_MODEL}/commit/(.+)", _Handler.commit),
    (f"{_MODEL}/revision/(.+)", _Handler.info),
    (_MODEL, _Handler.info),
    (f"{_MODEL}/tree/(refs/[^/]+/[^/]+|[^/]+)(/.+)?", lambda self, n, r, f, **k: self.tree(n, r, f or "", **k)),
    (f"{_MODEL}/paths-info/(.+)", _Handler.paths),
    (f"{_MODEL}/commits/(.+)", _Handler.log),
    (f"{_MODEL}/refs", _Handler.refs),
    (f"/(?:api/resolve-cache/models/)?{_NAME}/resolve/(refs/[^/]+/[^/]+|[^/]+)/(.+)", _Handler.resolve),
    (f"{_MODEL}/super-squash/(.+)", _Handler.squash),
    (f"POST {_MODEL}/branch/(.+)", _Handler.branch),
    (f"DELETE {_MODEL}/branch/(.+)", _Handler.delete_branch),
    (f"DELETE {_MODEL}/tag/(.+)", _Handler.delete_tag),
]

# the client reads these when it is imported; only tests with the fixture `hub` start the server and go online
HUB = Hub()
os.environ |= {"HF_HUB_OFFLINE": "1", "HF_ENDPOINT": HUB.url, "HF_HUB_DISABLE_XET": "1"}
os.environ["HF_HUB_CACHE"] = tempfile.mkdtemp(prefix="hub-cache-")
