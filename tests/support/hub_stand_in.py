"""A stand-in for the Hugging Face hub on the loopback interface: tests use the real clients without a network.

    with HubStandIn(tmp_path / "hf_home") as hub:
        hub.add_model("Qwen/Qwen2-0.5B", donor_folder)
        hub.add_dataset("Salesforce/wikitext", wikitext_folder)
        subprocess.run([...], env=os.environ | hub.env())
        assert hub.opened("Qwen/Qwen2-0.5B") == ["config.json", "model.safetensors"]

It speaks the part of the hub's protocol that ``huggingface_hub``, ``transformers`` and ``datasets`` use to read: file
metadata and contents with ranges, repository info, folder listings, path infos. Missing files get the
hub's 404 with its ``X-Error-Code``, which clients treat as "this optional file does not exist". Repositories can have branches.

It also accepts the requests of ``create_repo`` and ``upload_folder`` with a token of ``hub.tokens``: small files in the
commit itself, weights as large files by the LFS batch protocol (Xet is switched off by ``env()``). A commit is atomic; the
files that it names must have been uploaded before.

A route is one line of ``Handler.ROUTES`` and one method of the same name.

``HF_ENDPOINT`` is read when ``huggingface_hub`` and ``datasets`` are imported, and copied by many of their modules: the
environment of ``env()`` must be set before that import. ``conftest.py`` does so for the tests' own process.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import tempfile
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, ClassVar
from urllib.parse import parse_qs, unquote, urlsplit

import yaml

CHUNK = 1 << 20
LICENSES = {"apache-2.0", "mit", "other"}


@dataclass(frozen=True)
class Request:
    """One request as it came in, and how it was answered. ``repo`` and ``file`` are empty where a path names none."""

    method: str
    path: str
    repo: str
    file: str
    status: int


@dataclass(frozen=True)
class Repo:
    """A folder served under a name; ``kind`` is ``models`` or ``datasets``. A private one exists only for holders of a token.

    ``branches`` are further revisions, each a folder of its own; the repository itself is its branch ``main``.
    """

    kind: str
    name: str
    folder: Path
    private: bool = False
    branches: dict[str, Repo] = field(default_factory=dict)

    def at(self, revision: str) -> Repo | None:
        """The repository at a branch or commit; None where it has no such revision."""
        named = {"main": self, **self.branches}
        return next((repo for name, repo in named.items() if revision in (name, repo.commit())), None)

    def files(self) -> dict[str, Path]:
        """Every file by its path in the repository, sorted; read anew each time, so a folder may still grow."""
        found = {p.relative_to(self.folder).as_posix(): p for p in self.folder.rglob("*") if p.is_file()}
        return dict(sorted(found.items()))

    def commit(self) -> str:
        """Forty hex digits that change whenever a file does."""
        state = [(name, etag(path)) for name, path in self.files().items()]
        return hashlib.sha1(json.dumps([self.kind, self.name, state]).encode()).hexdigest()


@cache
def _sha256(path: Path, size: int, mtime_ns: int) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def etag(path: Path) -> str:
    stat = path.stat()
    return _sha256(path, stat.st_size, stat.st_mtime_ns)


class HubStandIn:
    """The server and what it serves. ``home`` becomes the clients' ``HF_HOME``: their caches and nothing else.

    While ``down`` is set, connections are closed without an answer, as by a broken network.
    ``tokens`` says whose each token is: its holder may write under that name. ``refused`` are the names of routes that answer with 500.
    """

    def __init__(self, home: Path):
        self.home = Path(home)
        self.repos: dict[tuple[str, str], Repo] = {}
        self.requests: list[Request] = []
        self.down = False
        self.tokens: dict[str, str] = {}
        self.refused: set[str] = set()
        self.large: dict[str, bytes] = {}  # sha256 -> contents of large files that were sent
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), type("BoundHandler", (Handler,), {"hub": self}))
        self._server.daemon_threads = True
        self._thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
        self._thread.start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._server.server_address[1]}"

    def add_model(self, name: str, folder: Path, private: bool = False, **branches: Path) -> None:
        """Serve a folder, and folders as further branches of the same repository."""
        found = {branch: Repo("models", name, Path(each), private) for branch, each in branches.items()}
        self.repos["models", name] = Repo("models", name, Path(folder), private, found)

    def add_dataset(self, name: str, folder: Path) -> None:
        self.repos["datasets", name] = Repo("datasets", name, Path(folder))

    def env(self, home: Path | None = None) -> dict[str, str]:
        """What a process needs in its environment to take this for the hub; another ``home`` starts with empty caches."""
        home = Path(home or self.home)
        return {
            "HF_ENDPOINT": self.url,
            "HF_HOME": str(home),
            "HF_HUB_CACHE": str(home / "hub"),
            "HF_DATASETS_CACHE": str(home / "datasets"),
            "HF_MODULES_CACHE": str(home / "modules"),
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "HF_HUB_DISABLE_IMPLICIT_TOKEN": "1",
            "HF_HUB_OFFLINE": "0",
            "TRANSFORMERS_OFFLINE": "0",
            "HF_DATASETS_OFFLINE": "0",
            # requests to the loopback interface must not go through a proxy
            "NO_PROXY": "127.0.0.1,localhost",
            "no_proxy": "127.0.0.1,localhost",
        }

    def opened(self, name: str) -> list[str]:
        """The files of a repository whose contents were sent, in order, each once; metadata (HEAD) does not count."""
        sent = (HTTPStatus.OK, HTTPStatus.PARTIAL_CONTENT)
        files = [r.file for r in list(self.requests) if r.repo == name and r.method == "GET" and r.status in sent]
        return list(dict.fromkeys(file for file in files if file))

    def clear(self) -> None:
        """Forget the requests so far."""
        self.requests.clear()

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

    def __enter__(self) -> HubStandIn:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()


class Handler(BaseHTTPRequestHandler):
    """One connection. A method named in ``ROUTES`` gets the named groups of its pattern, unquoted."""

    hub: ClassVar[HubStandIn]
    protocol_version = "HTTP/1.1"

    NAME = r"(?P<name>[^/]+(?:/[^/]+)?)"
    API = rf"/api/(?P<kind>models|datasets)/{NAME}"
    ROUTES: ClassVar[list[tuple[str, str, str]]] = [
        ("GET|HEAD", rf"/(?P<kind>datasets/)?{NAME}/resolve/(?P<revision>[^/]+)/(?P<file>.+)", "send_file"),
        ("GET", rf"{API}/tree/(?P<revision>[^/]+)(?:/(?P<folder>.*))?", "send_tree"),
        ("POST", rf"{API}/paths-info/(?P<revision>[^/]+)", "send_paths_info"),
        ("GET", rf"{API}/refs", "send_refs"),
        ("GET", rf"{API}/revision/(?P<revision>[^/]+)", "send_info"),
        ("GET", API, "send_info"),
        ("GET", "/api/whoami-v2", "send_user"),
        ("POST", "/api/repos/create", "create"),
        ("POST", "/api/validate-yaml", "validate_card"),
        ("POST", rf"{API}/preupload/(?P<revision>[^/]+)", "send_upload_modes"),
        ("POST", rf"/(?P<kind>datasets/)?{NAME}\.git/info/lfs/objects/batch", "send_upload_places"),
        ("PUT", "/large/(?P<digest>[0-9a-f]{64})", "take_large"),
        ("POST", rf"{API}/commit/(?P<revision>[^/]+)", "commit"),
    ]

    def do_GET(self) -> None:
        self.dispatch()

    do_HEAD = do_POST = do_PUT = do_GET

    def dispatch(self) -> None:
        self.repo_name = self.file_name = ""
        if self.hub.down:
            self.close_connection = True
            return None
        path = urlsplit(self.path).path
        self.body = self.read_body()
        for methods, pattern, name in self.ROUTES:
            match = re.fullmatch(pattern, path)
            if match and self.command in methods.split("|"):
                if name in self.hub.refused:
                    return self.send_refusal(HTTPStatus.INTERNAL_SERVER_ERROR, "out of order")
                answer: Callable[..., None] = getattr(self, name)
                return answer(**{key: unquote(value) if value else "" for key, value in match.groupdict().items()})
        return self.send_absent("NotFound", f"no route for {self.command} {path}")

    def read_body(self) -> bytes:
        """Of a length that is given beforehand, or in chunks, as a client sends what it reads from a file."""
        if self.headers.get("Transfer-Encoding") != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length") or 0))
        pieces = []
        while size := int(self.rfile.readline(), 16):
            pieces.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(pieces)

    def find(self, kind: str, name: str, revision: str = "main") -> Repo | None:
        """The repository, or None after the matching 404 is sent."""
        self.repo_name = name
        repo = self.hub.repos.get((kind or "models", name))
        if repo is None or (repo.private and self.token not in self.hub.tokens):
            self.send_absent("RepoNotFound", "Repository not found")
            return None
        found = repo.at(revision)
        if found is None:
            self.send_absent("RevisionNotFound", f"Invalid rev id: {revision}")
        return found

    @property
    def token(self) -> str:
        return self.headers.get("Authorization", "").removeprefix("Bearer ")

    def send_file(self, kind: str, name: str, revision: str, file: str) -> None:
        repo = self.find(kind.strip("/"), name, revision)
        self.file_name = file
        if repo is None:
            return
        path = repo.files().get(file)
        headers = {"X-Repo-Commit": repo.commit(), "Accept-Ranges": "bytes"}
        if path is None:
            return self.send_absent("EntryNotFound", "Entry not found", headers)
        size, headers["ETag"] = path.stat().st_size, f'"{etag(path)}"'
        span = parse_range(self.headers.get("Range"), size)
        if span is None:
            return self.send_head(HTTPStatus.REQUESTED_RANGE_NOT_SATISFIABLE, headers | {"Content-Range": f"bytes */{size}"}, 0)
        first, last = span
        partial = "Range" in self.headers
        if partial:
            headers["Content-Range"] = f"bytes {first}-{last}/{size}"
        self.send_head(HTTPStatus.PARTIAL_CONTENT if partial else HTTPStatus.OK, headers, last - first + 1)
        if self.command == "GET":
            self.send_span(path, first, last - first + 1)

    def send_info(self, kind: str, name: str, revision: str = "main") -> None:
        repo = self.find(kind, name, revision)
        if repo is None:
            return
        siblings = [{"rfilename": file} for file in repo.files()]
        self.send_json({"_id": repo.commit()[:24], "id": name, "sha": repo.commit(), "private": repo.private, "gated": False,
                        "disabled": False, "tags": [], "downloads": 0, "likes": 0, "siblings": siblings})  # fmt: skip

    def send_refs(self, kind: str, name: str) -> None:
        repo = self.find(kind, name)
        if repo is not None:
            named = {"main": repo, **repo.branches}
            refs = [{"name": name, "ref": f"refs/heads/{name}", "targetCommit": each.commit()} for name, each in named.items()]
            self.send_json({"branches": refs, "tags": [], "converts": []})

    def send_tree(self, kind: str, name: str, revision: str, folder: str) -> None:
        repo = self.find(kind, name, revision)
        if repo is None:
            return
        entries = [e for e in list_entries(repo) if not folder or e["path"].startswith(folder.rstrip("/") + "/")]
        if folder and not entries:
            return self.send_absent("EntryNotFound", f"{folder} does not exist on {revision}")
        if parse_qs(urlsplit(self.path).query).get("recursive", ["false"])[0].lower() not in ("true", "1"):
            depth = folder.rstrip("/").count("/") + 1 if folder else 0
            entries = [e for e in entries if e["path"].count("/") == depth]
        self.send_json(entries)

    def send_paths_info(self, kind: str, name: str, revision: str) -> None:
        repo = self.find(kind, name, revision)
        if repo is None:
            return
        sent = self.body.decode()
        wanted = json.loads(sent)["paths"] if sent.startswith("{") else parse_qs(sent).get("paths", [])
        self.send_json([entry for entry in list_entries(repo) if entry["path"] in wanted])

    # Writing

    def writer(self, name: str) -> str | None:
        """Who asks, where the token may write the repository ``name``, or any where that is empty; None after a refusal is sent."""
        user = self.hub.tokens.get(self.token)
        if user is None:
            self.send_refusal(HTTPStatus.UNAUTHORIZED, "Invalid username or password.")
        elif name and not name.startswith(user + "/"):
            self.send_refusal(HTTPStatus.FORBIDDEN, f"{user} may not write {name}")
            return None
        return user

    def send_user(self) -> None:
        user = self.writer("")
        if user is not None:
            self.send_json({"type": "user", "name": user, "orgs": []})

    def create(self) -> None:
        asked = json.loads(self.body)
        user = self.writer(f"{asked['organization']}/" if asked["organization"] else "")
        if user is None:
            return
        name = f"{user}/{asked['name']}"
        answer = {"url": f"{self.hub.url}/{name}", "name": name}
        if ("models", name) in self.hub.repos:
            return self.send_json(answer | {"error": "You already created this model repo"}, HTTPStatus.CONFLICT)
        self.hub.home.mkdir(parents=True, exist_ok=True)
        folder = Path(tempfile.mkdtemp(prefix="pushed-", dir=self.hub.home))
        self.hub.repos["models", name] = Repo("models", name, folder, private=asked.get("visibility") == "private")
        self.send_json(answer)

    def validate_card(self) -> None:
        content = json.loads(self.body)["content"]
        fields = yaml.safe_load(content.split("---\n")[1]) if content.startswith("---\n") else {}
        wrong = [name for name in ("license",) if fields.get(name, "other") not in LICENSES]
        errors = [{"message": f'"{name}" must be one of {sorted(LICENSES)}'} for name in wrong]
        self.send_json({"errors": errors, "warnings": []}, HTTPStatus.BAD_REQUEST if errors else HTTPStatus.OK)

    def send_upload_modes(self, kind: str, name: str, revision: str) -> None:
        if self.find(kind, name, revision) is None or self.writer(name) is None:
            return
        modes = {file["path"]: "lfs" if file["path"].endswith(".safetensors") else "regular" for file in json.loads(self.body)["files"]}
        self.send_json({"files": [{"path": path, "uploadMode": mode, "shouldIgnore": False} for path, mode in modes.items()]})

    def send_upload_places(self, kind: str, name: str) -> None:
        if self.find(kind.strip("/"), name) is None or self.writer(name) is None:
            return
        objects = json.loads(self.body)["objects"]
        for wanted in objects:
            if wanted["oid"] not in self.hub.large:
                wanted["actions"] = {"upload": {"href": f"{self.hub.url}/large/{wanted['oid']}"}}
        self.send_json({"transfer": "basic", "objects": objects})

    def take_large(self, digest: str) -> None:
        if hashlib.sha256(self.body).hexdigest() != digest:
            return self.send_refusal(HTTPStatus.BAD_REQUEST, "the contents are not those that were announced")
        self.hub.large[digest] = self.body
        self.send_json({})

    def commit(self, kind: str, name: str, revision: str) -> None:
        repo = self.find(kind, name, revision)
        if repo is None or self.writer(name) is None:
            return
        lines = [json.loads(line) for line in self.body.splitlines()]
        contents = {each["value"]["path"]: base64.b64decode(each["value"]["content"]) for each in lines if each["key"] == "file"}
        for each in lines:
            if each["key"] == "lfsFile":
                contents[each["value"]["path"]] = self.hub.large[each["value"]["oid"]]
            elif each["key"] == "deletedFile":
                (repo.folder / each["value"]["path"]).unlink()
        for path, content in contents.items():
            (repo.folder / path).parent.mkdir(parents=True, exist_ok=True)
            (repo.folder / path).write_bytes(content)
        self.send_json({"commitUrl": f"{self.hub.url}/{name}/commit/{repo.commit()}", "commitOid": repo.commit()})

    def send_refusal(self, status: HTTPStatus, message: str) -> None:
        self.send_json({"error": message}, status, {"X-Error-Message": message})

    def send_absent(self, code: str, message: str, headers: dict[str, str] | None = None) -> None:
        errors = {"X-Error-Code": code, "X-Error-Message": message}
        self.send_json({"error": message}, HTTPStatus.NOT_FOUND, (headers or {}) | errors)

    def send_json(self, value: Any, status: HTTPStatus = HTTPStatus.OK, headers: dict[str, str] | None = None) -> None:
        content = json.dumps(value).encode()
        self.send_head(status, {"Content-Type": "application/json; charset=utf-8"} | (headers or {}), len(content))
        if self.command != "HEAD":
            self.wfile.write(content)

    def send_head(self, status: HTTPStatus, headers: dict[str, str], length: int) -> None:
        # recorded before the response is sent, so that a client finds its request in the list
        self.hub.requests.append(Request(self.command, urlsplit(self.path).path, self.repo_name, self.file_name, int(status)))
        self.send_response(status)
        for key, value in headers.items():
            self.send_header(key, value)
        self.send_header("Content-Length", str(length))
        self.end_headers()

    def send_span(self, path: Path, first: int, length: int) -> None:
        with path.open("rb") as file:
            file.seek(first)
            while length > 0 and (piece := file.read(min(CHUNK, length))):
                self.wfile.write(piece)
                length -= len(piece)

    def log_message(self, format: str, *args: Any) -> None:
        """Silent: the requests are in ``hub.requests``."""


def list_entries(repo: Repo) -> list[dict[str, Any]]:
    """Folders and files as the hub's tree lists them, sorted by path."""
    files = repo.files()
    folders = {parent.as_posix() for name in files for parent in Path(name).parents} - {"."}
    entries: list[dict[str, Any]] = [{"type": "directory", "path": folder, "oid": repo.commit(), "size": 0} for folder in folders]
    entries += [{"type": "file", "path": name, "oid": etag(path)[:40], "size": path.stat().st_size} for name, path in files.items()]
    return sorted(entries, key=lambda entry: entry["path"])


def parse_range(header: str | None, size: int) -> tuple[int, int] | None:
    """First and last byte (inclusive) that a ``Range`` header asks for; None when the file holds none of them."""
    if header is None:
        return 0, size - 1
    match = re.fullmatch(r"bytes=(\d*)-(\d*)", header.strip())
    if not match or not any(match.groups()):
        return None
    first, last = match.groups()
    if not first:
        return (max(0, size - int(last)), size - 1) if size and int(last) else None
    span = int(first), min(int(last), size - 1) if last else size - 1
    return span if span[0] <= span[1] else None
