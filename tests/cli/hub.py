"""A hub on loopback: as much of its HTTP interface as sending and reading one model takes, in memory."""

import base64
import contextlib
import json
import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


class Handler(BaseHTTPRequestHandler):
    """`self.server.files` are the files of the one repository `me/small`, `made` whether it was created."""

    protocol_version = "HTTP/1.1"

    def log_message(self, *_):
        """Say nothing."""

    def answer(self, status, body=b"", **headers):
        """Send a reply; a dict as JSON."""
        body = json.dumps(body).encode() if isinstance(body, dict | list) else body
        self.send_response(status)
        for name, value in {"Content-Length": len(body), **headers}.items():
            self.send_header(name.replace("_", "-"), str(value))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def do_GET(self):
        """Who is asking, what the repository is, and its files, whole or a range of bytes."""
        self.server.asked.append((self.command, self.path, self.headers.get("Range")))
        if self.path == "/api/whoami-v2":
            known = self.headers.get("Authorization") == "Bearer hf_test"
            self.answer(200, {"name": "me"}) if known else self.answer(401, {"error": "who are you?"})
        elif re.fullmatch(r"/api/models/me/small/tree/\w+(\?.*)?", self.path) and self.server.made:
            entries = ({"path": name, "size": len(data)} for name, data in self.server.files.items())
            self.answer(200, [{"type": "file", "oid": "0" * 40, **entry} for entry in entries])
        elif self.path.startswith("/api/models/me/small/tree/"):
            self.answer(404, {"error": "no such folder"}, X_Error_Code="EntryNotFound")
        elif self.path.startswith("/api/models/me/small") and self.server.made:
            siblings = [{"rfilename": name} for name in self.server.files]
            self.answer(200, {"id": "me/small", "sha": "0" * 40, "siblings": siblings})
        elif found := re.fullmatch(r"/me/small/resolve/\w+/(.+)", self.path):
            self.file(found[1])
        else:
            self.answer(404, {"error": "not here"}, X_Error_Code="RepoNotFound")

    def do_HEAD(self):
        """As `do_GET`, without the body."""
        self.do_GET()

    def file(self, name):
        """A file, with what the client wants to know of it."""
        if name not in self.server.files:
            self.answer(404, X_Error_Code="EntryNotFound", X_Repo_Commit="0" * 40)
            return
        data = self.server.files[name]
        status, headers = 200, {"ETag": f'"{hash(data):x}"', "X_Repo_Commit": "0" * 40}
        if wanted := re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range") or ""):
            start, stop = int(wanted[1]), min(int(wanted[2]) + 1, len(data))
            headers["Content_Range"] = f"bytes {start}-{stop - 1}/{len(data)}"
            status, data = 206, data[start:stop]
        self.answer(status, data, **headers)

    def do_POST(self):
        """Make the repository, tell how files are to be sent, and take a commit."""
        self.server.asked.append((self.command, self.path, None))
        body = self.rfile.read(int(self.headers["Content-Length"]))
        if self.path == "/api/repos/create":
            self.server.made = True
            self.answer(200, {"url": f"http://{self.headers['Host']}/me/small"})
        elif self.path == "/api/validate-yaml":
            self.answer(200, {"errors": [], "warnings": []})
        elif "/preupload/" in self.path:
            names = [file["path"] for file in json.loads(body)["files"]]
            plain = {"uploadMode": "regular", "shouldIgnore": False}
            self.answer(200, {"files": [{"path": name, **plain} for name in names]})
        elif "/commit/" in self.path:
            for line in map(json.loads, body.decode().splitlines()):
                if line["key"] == "file":
                    self.server.files[line["value"]["path"]] = base64.b64decode(line["value"]["content"])
            address = f"http://{self.headers['Host']}/me/small/commit/{40 * '0'}"
            self.answer(200, {"success": True, "commitOid": 40 * "0", "commitUrl": address, "hookOutput": ""})
        else:
            self.answer(404, {"error": f"no {self.path}"})


@contextlib.contextmanager
def running(port):
    """A server at a port, within the context."""
    with ThreadingHTTPServer(("127.0.0.1", port), Handler) as server:
        server.files, server.made, server.asked = {}, False, []
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server
        server.shutdown()
