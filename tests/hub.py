"""A mock of the Hugging Face hub on loopback: enough of its protocol for the real clients to list, download and upload.

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
        if not isinstance(body, bytes):
            body, headers = json.dumps(body).encode(), {"Content_Type": "application/json"}
        self.send_response(status)
        for name, value in ({"Content_Length": len(body)} | headers).items():
            self.send_header(name.replace("_", "-"), str(value))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def body(self):
        return self.rfile.read(int(self.headers.get("Content-Length", 0)))

    def do_POST(self):
        """What uploading needs; paths-info is a question, and answered with the others."""
        parts = unquote(urlsplit(self.path).path).strip("/").split("/")
        if "paths-info" in parts:
            return self.do_GET()
        body, models = self.body(), self.server.folder / "models"
        if parts[-2:] == ["repos", "create"]:
            wanted = json.loads(body)
            name = "/".join(filter(None, (wanted.get("organization"), wanted["name"])))
            (models / name).mkdir(parents=True, exist_ok=True)
            return self.answer(200, {"url": f"{self.server.endpoint}/{name}", "id": name, "name": name})
        if "preupload" in parts:
            how = {"uploadMode": "regular", "shouldIgnore": False}
            return self.answer(200, {"files": [how | {"path": file["path"]} for file in json.loads(body)["files"]]})
        if "commit" in parts:
            name = "/".join(parts[2:4])
            for line in map(json.loads, body.splitlines()):
                if line["key"] == "file":
                    path = models / name / line["value"]["path"]
                    path.parent.mkdir(parents=True, exist_ok=True)
                    path.write_bytes(base64.b64decode(line["value"]["content"]))
            url = f"{self.server.endpoint}/{name}/commit/1"
            return self.answer(200, {"success": True, "commitOid": COMMIT, "commitUrl": url})
        self.answer(200, {"errors": [], "warnings": []})  # validate-yaml, of a model card

    def do_GET(self):
        """[api/][models|datasets/]OWNER/NAME[/ACTION/REVISION/PATH]"""
        parts = [unquote(part) for part in urlsplit(self.path).path.strip("/").split("/")]
        if api := parts[0] == "api":
            parts.pop(0)
        kind = parts.pop(0) if parts[0] in ("models", "datasets") else "models"
        action, revision, path = parts[2] if parts[2:] else None, parts[3] if parts[3:] else None, "/".join(parts[4:])
        repo = self.server.folder / kind / "/".join(parts[:2])
        if len(parts) < 2 or not repo.is_dir():
            return self.answer(401, X_Error_Code="RepoNotFound", X_Error_Message="Repository not found")
        if self.server.token and self.headers.get("Authorization") != f"Bearer {self.server.token}":
            return self.answer(401, X_Error_Code="GatedRepo", X_Error_Message="Access is restricted")
        if revision not in (None, "main", COMMIT, *self.server.revisions, *self.server.branches):
            return self.answer(404, X_Error_Code="RevisionNotFound", X_Error_Message=f"Invalid rev id: {revision}")
        if revision in self.server.branches:  # served from a folder beside the repository's
            repo = repo.with_name(f"{repo.name}@{revision.replace('/', '-')}")
        if api and action in (None, "revision"):
            files = [{"rfilename": str(file.relative_to(repo))} for file in sorted(repo.rglob("*")) if file.is_file()]
            info = {"id": "/".join(parts[:2]), "sha": COMMIT, "private": False, "gated": False, "siblings": files}
            return self.answer(200, info | {"downloads": 0, "likes": 0, "tags": []})
        if api and action == "tree" and (repo / path).is_dir():
            recursive = parse_qs(urlsplit(self.path).query).get("recursive", ["false"])[0].lower() in ("true", "1")
            entries = sorted((repo / path).rglob("*") if recursive else (repo / path).iterdir())
            return self.answer(200, [self.entry(repo, entry) for entry in entries])
        if api and action == "paths-info":
            body = self.body().decode()
            asked = json.loads(body)["paths"] if body.startswith("{") else parse_qs(body)["paths"]
            found = [repo / name for name in ([asked] if isinstance(asked, str) else asked)]
            return self.answer(200, [self.entry(repo, entry) for entry in found if entry.exists()])
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
        if "Range" in self.headers:
            first, last = self.headers["Range"].removeprefix("bytes=").split("-")
            first, last = int(first), min(int(last or len(body)), len(body) - 1)
            headers["Content_Range"] = f"bytes {first}-{last}/{len(body)}"
            body = body[first : last + 1]
        if self.command == "GET":
            self.server.sent += len(body)
        self.answer(206 if "Content_Range" in headers else 200, body, **headers)


def serve(folder, port=0, token=None):
    """Start serving in a thread; the server's address is its `endpoint`. It keeps count of the `requests` and of the
    bytes of files that it has `sent`."""
    server = ThreadingHTTPServer(("127.0.0.1", port), Hub)
    server.folder, server.token, server.requests, server.sent = Path(folder), token, [], 0
    server.revisions, server.branches = set(), {"refs/convert/parquet"}  # besides main
    server.endpoint = f"http://127.0.0.1:{server.server_port}"
    threading.Thread(target=server.serve_forever, daemon=True).start()
    return server


if __name__ == "__main__":
    server = serve(sys.argv[1], int(sys.argv[2]) if len(sys.argv) > 2 else 0)
    print(f"HF_ENDPOINT={server.endpoint}", flush=True)
    threading.Event().wait()
