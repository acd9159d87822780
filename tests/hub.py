"""A stand-in for the Hugging Face hub on loopback: enough of its protocol for the real clients to list, download, and
upload.

    python tests/hub.py FOLDER [PORT]     then HF_ENDPOINT=http://127.0.0.1:PORT

serves FOLDER/models/OWNER/NAME/... and FOLDER/datasets/OWNER/NAME/... as repositories with one commit each.
"""

import base64
import hashlib
import json
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, unquote, urlsplit

COMMIT = "0123456789abcdef0123456789abcdef01234567"


class Hub(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *args):
        self.server.requests.append(f"{self.command} {self.path}")

    def answer(self, status, body=b"", **headers):
        body = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.send_response(status)
        headers.setdefault("Content_Length", str(len(body)))
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def do_POST(self):
        """What uploading needs; paths-info is a question, and answered with the others."""
        parts = unquote(urlsplit(self.path).path).strip("/").split("/")
        if "paths-info" in parts:
            return self.do_GET()
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        if parts[-2:] == ["repos", "create"]:
            wanted = json.loads(body)
            name = "/".join(filter(None, (wanted.get("organization"), wanted["name"])))
            (self.server.folder / "models" / name).mkdir(parents=True, exist_ok=True)
            return self.answer(200, {"url": f"{self.server.endpoint}/{name}", "id": name, "name": name})
        if "preupload" in parts:
            files = [
                {"path": file["path"], "uploadMode": "regular", "shouldIgnore": False}
                for file in json.loads(body)["files"]
            ]
            return self.answer(200, {"files": files})
        if "commit" in parts:
            name = "/".join(parts[2:4])
            for line in map(json.loads, body.splitlines()):
                if line["key"] == "file":
                    path = self.server.folder / "models" / name / line["value"]["path"]
                    path.parent.mkdir(parents=True, exist_ok=True)
                    path.write_bytes(base64.b64decode(line["value"]["content"]))
            return self.answer(
                200, {"success": True, "commitOid": COMMIT, "commitUrl": f"{self.server.endpoint}/{name}/commit/1"}
            )
        self.answer(200, {"errors": [], "warnings": []})  # validate-yaml, of a model card

    def do_GET(self):
        parts = [unquote(part) for part in urlsplit(self.path).path.strip("/").split("/")]
        api = parts[0] == "api"
        if api:
            parts.pop(0)
        kind = parts.pop(0) if parts[0] in ("models", "datasets") else "models"
        repo, action, revision, path = (
            self.server.folder / kind / "/".join(parts[:2]),
            *(parts[2:4] + [None] * 2)[:2],
            None,
        )
        path = "/".join(parts[4:])
        if len(parts) < 2 or not repo.is_dir():
            return self.answer(401, X_Error_Code="RepoNotFound", X_Error_Message="Repository not found")
        if self.server.token and self.headers.get("Authorization") != f"Bearer {self.server.token}":
            return self.answer(401, X_Error_Code="GatedRepo", X_Error_Message="Access is restricted")
        if revision not in (None, "main", COMMIT, *self.server.revisions):
            return self.answer(404, X_Error_Code="RevisionNotFound", X_Error_Message=f"Invalid rev id: {revision}")
        if revision in self.server.branches:  # served from a folder beside the repository's
            repo = repo.with_name(f"{repo.name}@{revision.replace('/', '-')}")
        if api and action in (None, "revision"):
            files = [{"rfilename": str(file.relative_to(repo))} for file in sorted(repo.rglob("*")) if file.is_file()]
            info = {"id": "/".join(parts[:2]), "sha": COMMIT, "private": False, "gated": False, "siblings": files}
            return self.answer(200, info | {"downloads": 0, "likes": 0, "tags": []}, Content_Type="application/json")
        if api and action == "tree":
            if not (repo / path).is_dir():
                return self.answer(404, X_Error_Code="EntryNotFound", X_Error_Message=f"{path} does not exist")
            recursive = parse_qs(urlsplit(self.path).query).get("recursive", ["false"])[0].lower() in ("true", "1")
            entries = sorted((repo / path).rglob("*") if recursive else (repo / path).iterdir())
            return self.answer(200, [self.entry(repo, entry) for entry in entries], Content_Type="application/json")
        if api and action == "paths-info":
            body = self.rfile.read(int(self.headers.get("Content-Length", 0))).decode()
            asked = json.loads(body)["paths"] if body.startswith("{") else parse_qs(body)["paths"]
            found = [repo / name for name in ([asked] if isinstance(asked, str) else asked)]
            entries = [self.entry(repo, entry) for entry in found if entry.exists()]
            return self.answer(200, entries, Content_Type="application/json")
        if not api and action == "resolve" and (repo / path).is_file():
            return self.file((repo / path).read_bytes())
        self.answer(404, X_Error_Code="EntryNotFound", X_Error_Message=f"{path} does not exist")

    do_HEAD = do_GET

    def entry(self, repo, path):
        kind = "file" if path.is_file() else "directory"
        oid = hashlib.sha1(str(path).encode()).hexdigest()
        return {"type": kind, "path": str(path.relative_to(repo)), "size": path.stat().st_size, "oid": oid}

    def file(self, body):
        headers = {"ETag": f'"{hashlib.sha1(body).hexdigest()}"', "X_Repo_Commit": COMMIT, "Accept_Ranges": "bytes"}
        if "Range" not in self.headers:
            return self.answer(200, body, **headers)
        first, last = self.headers["Range"].removeprefix("bytes=").split("-")
        first, last = int(first), min(int(last or len(body)), len(body) - 1)
        self.answer(206, body[first : last + 1], Content_Range=f"bytes {first}-{last}/{len(body)}", **headers)


def serve(folder, port=0, token=None):
    """Start serving in a thread; the server's address is its `endpoint`, what it was asked its `requests`."""
    server = ThreadingHTTPServer(("127.0.0.1", port), Hub)
    server.folder, server.token, server.requests = Path(folder), token, []
    server.revisions, server.branches = set(), {"refs/convert/parquet"}  # besides main
    server.revisions |= server.branches
    server.endpoint = f"http://127.0.0.1:{server.server_port}"
    threading.Thread(target=server.serve_forever, daemon=True).start()
    return server


if __name__ == "__main__":
    server = serve(sys.argv[1], int(sys.argv[2]) if len(sys.argv) > 2 else 0)
    print(f"HF_ENDPOINT={server.endpoint}", flush=True)
    threading.Event().wait()
