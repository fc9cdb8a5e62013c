"""Sources on the hub: what is asked for, where it ends up, and what happens without a network."""

import http.server
import json
import subprocess
import sys
import threading

import pytest
import tiny_checkpoint as tiny

from moe_jax.checkpoints import CheckpointError, resolve_source

COMMIT = "0123456789012345678901234567890123456789"
RESOLVE = """
import sys
from moe_jax.checkpoints import CheckpointError, convert, resolve_source
try:
    print(resolve_source(sys.argv[1]))
    convert(sys.argv[1], sys.argv[2])
except CheckpointError as error:
    print(error)
    sys.exit(3)
"""


class Hub(http.server.ThreadingHTTPServer):
    """A hub with one repository, which remembers what was downloaded."""

    def __init__(self, files):
        super().__init__(("127.0.0.1", 0), HubHandler)
        self.files = files
        self.downloaded = set()


class HubHandler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.respond(with_body=True)

    def do_HEAD(self):
        self.respond(with_body=False)

    def respond(self, with_body):
        path = self.path.partition("?")[0]
        if path.startswith("/api/models/somebody/tiny"):
            siblings = [{"rfilename": name} for name in self.server.files]
            tree = [
                {"type": "file", "path": name, "oid": "0" * 40, "size": len(data)}
                for name, data in self.server.files.items()
            ]
            body = (
                tree
                if "/tree/" in path
                else {"id": "somebody/tiny", "modelId": "somebody/tiny", "sha": COMMIT, "siblings": siblings}
            )
            self.answer(200, json.dumps(body).encode(), {"Content-Type": "application/json"}, with_body)
        elif path.startswith("/somebody/tiny/resolve/") and path.rpartition("/")[2] in self.server.files:
            name = path.rpartition("/")[2]
            if with_body:
                self.server.downloaded.add(name)
            headers = {"X-Repo-Commit": COMMIT, "ETag": f'"{name}"'}
            self.answer(200, self.server.files[name], headers, with_body)
        else:
            self.answer(404, b"{}", {"X-Error-Code": "RepoNotFound"}, with_body)

    def answer(self, status, body, headers, with_body):
        self.send_response(status)
        for key, value in {**headers, "Content-Length": len(body)}.items():
            self.send_header(key, str(value))
        self.end_headers()
        if with_body:
            self.wfile.write(body)

    def log_message(self, *arguments):
        pass


def resolve_in_child(source, output, cache, **environment):
    import os

    return subprocess.run(
        [sys.executable, "-c", RESOLVE, source, output],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "HF_HOME": str(cache), "HF_HUB_DISABLE_XET": "1", **environment},
    )


def test_a_repository_is_downloaded_without_pickles_and_code_and_converted(tmp_path, rng):
    folder = tiny.write_folder(tmp_path / "repository", tiny.random_tensors(rng), shards=2)
    wanted = {path.name: path.read_bytes() for path in folder.iterdir()} | {"tokenizer.json": b"{}"}
    refused = {
        "pytorch_model.bin": b"\x80",
        "modeling_tiny.py": b"raise SystemExit",
        "README.md": b"read me",
        "consolidated.safetensors": b"x",
        "original/model.safetensors": b"x",
    }
    hub = Hub({**wanted, **refused})
    thread = threading.Thread(target=hub.serve_forever)
    thread.start()
    try:
        endpoint = f"http://127.0.0.1:{hub.server_port}"
        child = resolve_in_child("somebody/tiny", tmp_path / "output", tmp_path / "cache", HF_ENDPOINT=endpoint)
    finally:
        hub.shutdown()
        thread.join()
        hub.server_close()
    assert child.returncode == 0, child.stdout + child.stderr
    assert hub.downloaded == wanted.keys()
    assert (tmp_path / "output" / "moe_jax.json").exists()
    offline = resolve_in_child("somebody/tiny", tmp_path / "again", tmp_path / "cache", HF_HUB_OFFLINE="1")
    assert offline.returncode == 0, offline.stdout + offline.stderr
    absent = resolve_in_child("somebody/absent", tmp_path / "absent", tmp_path / "cache", HF_HUB_OFFLINE="1")
    assert absent.returncode == 3
    assert "somebody/absent: is not a folder, and cannot be downloaded" in absent.stdout


def test_a_folder_is_its_own_source(tmp_path):
    assert resolve_source(tmp_path) == tmp_path


@pytest.mark.parametrize("source", ["no/such/folder", "/absent", "plain-name", "../up", "bad id/name"])
def test_what_is_neither_a_folder_nor_an_id_is_refused(source):
    with pytest.raises(CheckpointError, match="does not exist"):
        resolve_source(source)
