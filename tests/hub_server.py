"""A small hub on loopback, for the client of huggingface_hub."""

import hashlib
import json
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, unquote, urlsplit


class Hub(ThreadingHTTPServer):
    """Repositories by id, each a dict of revisions to files; what was asked for is in `log`."""

    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.endpoint = f"http://127.0.0.1:{self.server_port}"
        self.repositories = {}
        self.answers = {}  # by repository: a status and headers in place of what was asked for
        self.closed = {}  # likewise, for its files alone
        self.heads = {}  # by repository: the revision that its main branch is at, if not main
        self.silent = set()  # repositories about which it never says anything
        self.cuts = {}  # by repository: how many times its weights are cut half way
        self.stall, self.stalled, self.released = None, threading.Event(), threading.Event()
        self.log = []

    def add(self, name, *, main, **revisions):
        self.repositories[name] = {"main": main, **revisions}

    def asked(self, name):
        """The files of a repository that were asked for, with the ranges."""
        return [entry for entry in self.log if entry[0] == name and entry[1] is not None]


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *arguments):
        pass

    def do_GET(self):
        parts = [unquote(part) for part in urlsplit(self.path).path.strip("/").split("/")]
        hub = self.server
        if parts[0] == "datasets":  # their ids here begin so
            parts[:2] = ["/".join(parts[:2])]
        if parts[0] == "api":
            prefix = "datasets/" if parts[1] == "datasets" else ""
            name, file = prefix + "/".join(parts[2:4]), None
            action = (*parts[4:6], "", "")[:2]
        else:
            name, file, action = "/".join(parts[:2]), "/".join(parts[4:]), ("resolve", parts[3])
        hub.log.append((name, file, self.command, self.headers.get("Range")))
        if name in hub.silent:
            return time.sleep(60)
        if name in hub.answers:
            return self.answer(*hub.answers[name])
        if name not in hub.repositories:
            return self.answer(404, {"X-Error-Code": "RepoNotFound"})
        head = hub.heads.get(name, "main")
        revisions = {"": head, "main": head, **{commit(name, r): r for r in hub.repositories[name]}}
        revision = revisions.get(action[1], action[1])
        if revision not in hub.repositories[name]:
            return self.answer(404, {"X-Error-Code": "RevisionNotFound"})
        files, sha = hub.repositories[name][revision], commit(name, revision)
        if action[0] in ("tree", "paths-info"):
            listed = [
                {"type": "file", "path": path, "size": len(content), "oid": etag(content)}
                for path, content in files.items()
            ]
            if self.command == "POST":
                body = self.rfile.read(int(self.headers["Content-Length"]))
                listed = [
                    entry for entry in listed if entry["path"] in parse_qs(body.decode())["paths"]
                ]
            return self.answer(200, {}, json.dumps(listed).encode())
        if action[0] != "resolve":
            siblings = [{"rfilename": path} for path in files]
            info = {"id": name, "sha": sha, "siblings": siblings, "private": False}
            return self.answer(200, {}, json.dumps(info).encode())
        if name in hub.closed:
            return self.answer(*hub.closed[name])
        if file not in files:
            return self.answer(404, {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": sha})
        self.send_file(name, sha, file, files[file])

    do_HEAD = do_POST = do_GET

    def answer(self, status, headers, body=b""):
        if status is None:  # hang up
            self.close_connection = True
            return
        self.send_response(status)
        for key, value in {"Content-Length": str(len(body)), **headers}.items():
            self.send_header(key, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def send_file(self, name, sha, file, content):
        hub = self.server
        headers = {"ETag": f'"{etag(content)}"', "X-Repo-Commit": sha, "Accept-Ranges": "bytes"}
        start, status = 0, 200
        if asked := self.headers.get("Range"):
            start, status = int(asked.removeprefix("bytes=").partition("-")[0]), 206
            headers["Content-Range"] = f"bytes {start}-{len(content) - 1}/{len(content)}"
        body = content[start:]
        weights = self.command == "GET" and file == "model.safetensors"
        if not weights or not (hub.cuts.get(name) or hub.stall == name):
            return self.answer(status, headers, body)
        self.answer(status, {"Content-Length": str(len(body)), **headers}, body[: len(body) // 2])
        if hub.cuts.get(name):
            hub.cuts[name] -= 1
        else:
            hub.stalled.set()
            hub.released.wait(60)
        self.close_connection = True


def commit(name, revision):
    return hashlib.sha1(f"{name}@{revision}".encode()).hexdigest()


def etag(content):
    return hashlib.sha256(content).hexdigest()
