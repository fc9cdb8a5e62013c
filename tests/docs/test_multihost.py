"""The job files of docs/multihost.md hang together, and every `moe-jax` command in them parses."""

import re
import shlex
import subprocess

import pytest
import yaml
from support.documentation import FENCE, ROOT

from moe_jax.cli.main import build_parser

PAGE = (ROOT / "docs/multihost.md").read_text()


def job_file(heading):
    """The first block under a heading."""
    return FENCE.search(PAGE, PAGE.index(f"\n### {heading}\n"))["code"]


def commands(script):
    """The arguments of each `moe-jax` in a shell script, also inside quotes, with variables as they stand."""
    for line in script.replace("\\\n", " ").splitlines():
        words = shlex.split(line, comments=True)
        inner = [shlex.split(word) for word in words if "moe-jax generate" in word]
        for candidate in [words, *inner]:
            names = [index for index, word in enumerate(candidate) if word.rpartition("/")[2] == "moe-jax"]
            if names and candidate[names[0] + 1 : names[0] + 2] == ["generate"]:
                yield candidate[names[0] + 1 :]


def kubernetes():
    return {document["kind"]: document for document in yaml.safe_load_all(job_file("Kubernetes"))}


@pytest.mark.parametrize("heading", ["SLURM", "TPU pods"])
def test_scripts_are_valid_and_start_a_job_of_all_processes(heading, tmp_path):
    script = job_file(heading)
    (tmp_path / "job.sh").write_text(script)
    subprocess.run(["bash", "-n", "job.sh"], cwd=tmp_path, check=True)
    (command,) = commands(script)
    arguments = build_parser().parse_args(command)
    assert arguments.distributed
    assert arguments.prompt


def test_every_gpu_of_the_slurm_job_is_in_the_mesh():
    script = job_file("SLURM")
    nodes, tasks, gpus = (
        int(re.search(rf"^#SBATCH --{name}=(\d+)$", script, re.MULTILINE)[1])
        for name in ("nodes", "ntasks-per-node", "gpus-per-node")
    )
    assert tasks == gpus
    (command,) = commands(script)
    assert build_parser().parse_args(command).mesh == {"expert": nodes * gpus}


def test_the_kubernetes_job_is_what_jax_recognises():
    documents = kubernetes()
    job, service = documents["Job"], documents["Service"]
    pod = job["spec"]["template"]["spec"]
    assert job["spec"]["completionMode"] == "Indexed"
    assert job["spec"]["completions"] == job["spec"]["parallelism"]
    assert service["spec"]["clusterIP"] == "None"
    assert service["spec"]["selector"] == {"job-name": job["metadata"]["name"]}
    assert pod["subdomain"] == service["metadata"]["name"]
    assert pod["serviceAccountName"] == documents["ServiceAccount"]["metadata"]["name"]
    assert documents["RoleBinding"]["subjects"][0]["name"] == pod["serviceAccountName"]
    assert documents["RoleBinding"]["roleRef"]["name"] == documents["Role"]["metadata"]["name"]
    volumes = {volume["name"] for volume in pod["volumes"]}
    (container,) = pod["containers"]
    assert {mount["name"] for mount in container["volumeMounts"]} == volumes


def test_the_kubernetes_command_parses_and_uses_every_gpu():
    job = kubernetes()["Job"]
    (container,) = job["spec"]["template"]["spec"]["containers"]
    assert container["command"] == ["moe-jax"]
    arguments = build_parser().parse_args(container["args"])
    assert arguments.distributed
    assert arguments.mesh == {"expert": job["spec"]["parallelism"] * container["resources"]["limits"]["nvidia.com/gpu"]}


def test_options_in_prose_exist():
    parser = build_parser()
    parser.parse_args(["convert", "a", "b", "--shards", "2"])
    by_hand = ["--coordinator", "a:1", "--num-processes", "2", "--process-id", "1"]
    assert all(option in PAGE for option in by_hand[::2])
    parser.parse_args(["generate", "m", "--mesh", "expert=2", "--distributed", *by_hand])
