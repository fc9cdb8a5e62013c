"""Sources on the hub: what is asked for, where it ends up, and what happens without a network."""

import dataclasses
import http.server
import json
import re
import subprocess
import sys
import threading

import pytest
import tiny_checkpoint as tiny

from moe_jax.checkpoints import CheckpointError, convert, export, inspect, resolve_config, resolve_source, verify

COMMIT = "0123456789012345678901234567890123456789"
CHILD = """
import dataclasses, json, sys
from moe_jax.checkpoints import CheckpointError, convert, inspect, resolve_config, resolve_source
source, output, revision = "{source}", "{output}", {revision!r}
try:
    {code}
except CheckpointError as error:
    print(error)
    sys.exit(3)
"""
CONVERT = "print(resolve_source(source, revision)); convert(source, output, revision=revision)"
INSPECT = "print(json.dumps(dataclasses.asdict(inspect(source, revision=revision)), default=str))"


class Hub(http.server.ThreadingHTTPServer):
    """A hub with one repository, which remembers what was asked for and what was downloaded."""

    def __init__(self, files):
        super().__init__(("127.0.0.1", 0), HubHandler)
        self.files = files
        self.paths = set()
        self.downloaded = set()
        self.heads = set()
        """Files of which the beginning was downloaded."""

    def __enter__(self):
        self.thread = threading.Thread(target=self.serve_forever)
        self.thread.start()
        return self

    def __exit__(self, *error):
        self.shutdown()
        self.thread.join()
        self.server_close()

    @property
    def endpoint(self):
        return f"http://127.0.0.1:{self.server_port}"


class HubHandler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.respond(with_body=True)

    def do_HEAD(self):
        self.respond(with_body=False)

    def respond(self, with_body):
        path = self.path.partition("?")[0]
        self.server.paths.add(path)
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
            headers = {"X-Repo-Commit": COMMIT, "ETag": f'"{name}"'}
            span = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range", ""))
            if with_body:
                (self.server.heads if span else self.server.downloaded).add(name)
            if span:
                first, last = map(int, span.groups())
                self.answer(206, self.server.files[name][first : last + 1], headers, with_body)
            else:
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


def run_child(code, source, output, cache, revision=None, **environment):
    """Run `code` in a process that has its own cache; the hub is read when huggingface_hub is imported."""
    import os

    return subprocess.run(
        [sys.executable, "-c", CHILD.format(code=code, source=source, output=output, revision=revision)],
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
    cache = tmp_path / "cache"
    with Hub({**wanted, **refused}) as hub:
        child = run_child(CONVERT, "somebody/tiny", tmp_path / "output", cache, HF_ENDPOINT=hub.endpoint)
    assert child.returncode == 0, child.stdout + child.stderr
    assert hub.downloaded == wanted.keys()
    assert (tmp_path / "output" / "moe_jax.json").exists()
    offline = run_child(CONVERT, "somebody/tiny", tmp_path / "again", cache, HF_HUB_OFFLINE="1")
    assert offline.returncode == 0, offline.stdout + offline.stderr
    inspected = run_child(INSPECT, "somebody/tiny", None, cache, HF_HUB_OFFLINE="1")
    assert json.loads(inspected.stdout)["files"] == 2
    absent = run_child(CONVERT, "somebody/absent", tmp_path / "absent", cache, HF_HUB_OFFLINE="1")
    assert absent.returncode == 3
    assert "somebody/absent: is not a folder, and cannot be downloaded" in absent.stdout


@pytest.mark.parametrize(
    ("code", "change", "words"),
    [
        (CONVERT, {"model_type": "llama"}, "'llama'"),
        (INSPECT, {"quantization_config": {"quant_method": "gptq"}}, "'gptq'"),
    ],
    ids=["family", "quantization"],
)
def test_a_model_that_is_not_supported_is_refused_before_its_weights_are_downloaded(tmp_path, rng, code, change, words):
    folder = tiny.write_folder(tmp_path / "repository", tiny.random_tensors(rng), {**tiny.QWEN3, **change}, shards=2)
    with Hub({path.name: path.read_bytes() for path in folder.iterdir()}) as hub:
        child = run_child(code, "somebody/tiny", tmp_path / "output", tmp_path / "cache", HF_ENDPOINT=hub.endpoint)
    assert child.returncode == 3, child.stdout + child.stderr
    assert words in child.stdout
    assert hub.downloaded <= {"config.json", "model.safetensors.index.json"}
    assert hub.heads == set()


@pytest.mark.parametrize("shards", [1, 2])
def test_inspect_downloads_headers_and_no_weights(tmp_path, rng, shards):
    tensors = tiny.random_tensors(rng)
    folder = tiny.write_folder(tmp_path / "repository", tensors, shards=shards)
    weights = {path.name for path in folder.glob("*.safetensors")}
    cache = tmp_path / "cache"
    with Hub({path.name: path.read_bytes() for path in folder.iterdir()}) as hub:
        child = run_child(INSPECT, "somebody/tiny", None, cache, revision="v2", HF_ENDPOINT=hub.endpoint)
    assert child.returncode == 0, child.stdout + child.stderr
    assert hub.downloaded == {path.name for path in folder.iterdir()} - weights
    assert hub.heads == weights
    assert f"/somebody/tiny/resolve/v2/{min(weights)}" in hub.paths
    found, expected = json.loads(child.stdout), dataclasses.asdict(inspect(folder))
    assert found.pop("nbytes") == sum(array.nbytes for array in tensors.values())  # the files' headers apart
    assert expected.pop("nbytes") > sum(array.nbytes for array in tensors.values())
    assert found.pop("folder").startswith(str(cache))
    assert expected.pop("folder") == folder
    assert found == expected


def test_a_revision_is_asked_for_by_its_name(tmp_path, rng):
    folder = tiny.write_folder(tmp_path / "repository", tiny.random_tensors(rng))
    with Hub({path.name: path.read_bytes() for path in folder.iterdir()}) as hub:
        child = run_child(
            CONVERT, "somebody/tiny", tmp_path / "output", tmp_path / "cache", revision="v2", HF_ENDPOINT=hub.endpoint
        )
    assert child.returncode == 0, child.stdout + child.stderr
    asked = {path.rpartition("/revision/")[2] for path in hub.paths if "/revision/" in path}
    assert asked == {"v2"}


def test_a_folder_has_no_revisions(tmp_path, rng):
    folder = tiny.write_folder(tmp_path / "folder", tiny.random_tensors(rng))
    calls = [
        lambda: resolve_source(folder, "v2"),
        lambda: resolve_config(folder, "v2"),
        lambda: inspect(folder, revision="v2"),
        lambda: convert(folder, tmp_path / "output", revision="v2"),
        lambda: export(folder, tmp_path / "output", revision="v2"),
        lambda: verify(folder, folder, revision="v2"),
    ]
    for call in calls:
        with pytest.raises(CheckpointError, match="is not on the hub, so it has no revision 'v2'"):
            call()


def test_an_output_that_exists_is_noticed_before_anything_is_downloaded(tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda *arguments, **options: pytest.fail("downloads"))
    (tmp_path / "output").mkdir()
    for write in (convert, export):
        with pytest.raises(CheckpointError, match="exists; overwrite it"):
            write("somebody/tiny", tmp_path / "output")


def test_export_takes_a_hub_id(tmp_path, rng, monkeypatch):
    folder = tiny.write_folder(tmp_path / "cached", tiny.random_tensors(rng))
    asked = []

    def download(source, **options):
        asked.append((source, options["revision"]))
        return str(folder)

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    export("somebody/tiny", tmp_path / "output", revision="v2")
    assert verify("somebody/tiny", tmp_path / "output").ok
    assert set(asked) == {("somebody/tiny", "v2"), ("somebody/tiny", None)}


def test_a_folder_is_its_own_source(tmp_path):
    assert resolve_source(tmp_path) == tmp_path


@pytest.mark.parametrize("source", ["no/such/folder", "/absent", "plain-name", "../up", "bad id/name"])
def test_what_is_neither_a_folder_nor_an_id_is_refused(source):
    with pytest.raises(CheckpointError, match="does not exist"):
        resolve_source(source)
