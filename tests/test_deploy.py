"""deploy/: what can be checked of it without Slurm, Kubernetes and Docker."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from ruamel.yaml import YAML

from tests.builders import COMMANDS, ROOT

DEPLOY = ROOT / "deploy"
SBATCH = DEPLOY / "slurm.sbatch"
PROGRAM = "python -m tune_cifar "

# Fields of ray.io/v1, as KubeRay's reference lists them.
RAY_JOB = {
    *("entrypoint", "runtimeEnvYAML", "jobId", "shutdownAfterJobFinishes", "submissionMode"),
    *("ttlSecondsAfterFinished", "activeDeadlineSeconds", "backoffLimit", "rayClusterSpec"),
    *("clusterSelector", "submitterPodTemplate", "metadata", "entrypointNumCpus", "suspend"),
}
RAY_CLUSTER = {
    *("rayVersion", "enableInTreeAutoscaling", "autoscalerOptions", "headGroupSpec"),
    *("workerGroupSpecs", "suspend", "managedBy", "headServiceAnnotations", "authOptions"),
}
GROUP = {
    *("groupName", "replicas", "minReplicas", "maxReplicas", "numOfHosts", "idleTimeoutSeconds"),
    *("rayStartParams", "template", "scaleStrategy", "serviceType", "headService", "suspend"),
}
# Of the Compose specification.
SERVICE = {
    *("image", "build", "restart", "environment", "volumes", "healthcheck", "command"),
    *("depends_on", "entrypoint", "ports"),
}


def load(name: str) -> Any:
    return YAML(typ="safe").load((DEPLOY / name).read_text(encoding="utf-8"))


def check_command(text: str) -> None:
    """Check that a command line of ours parses."""
    words = shlex.split(text.partition(PROGRAM)[2])
    size = 2 if " ".join(words[:2]) in COMMANDS else 1
    name = " ".join(words[:size])
    COMMANDS[name].make_context(name, words[size:])


def test_the_ray_job_has_known_fields_and_a_command_that_parses() -> None:
    job = load("kuberay.yaml")
    assert (job["apiVersion"], job["kind"]) == ("ray.io/v1", "RayJob")
    spec = job["spec"]
    assert set(spec) <= RAY_JOB and set(spec["rayClusterSpec"]) <= RAY_CLUSTER
    cluster = spec["rayClusterSpec"]
    groups = [cluster["headGroupSpec"], *cluster["workerGroupSpecs"]]
    for group in groups:
        assert set(group) <= GROUP and "rayStartParams" in group
        (container,) = group["template"]["spec"]["containers"]
        mounted = {mount["name"] for mount in container["volumeMounts"]}
        assert mounted == {volume["name"] for volume in group["template"]["spec"]["volumes"]}
        assert container["resources"]["requests"] == container["resources"]["limits"]
    # The version that constraints.txt holds, and so the image.
    assert f"ray=={cluster['rayVersion']}" in (ROOT / "constraints.txt").read_text().splitlines()
    assert "--continue" in spec["entrypoint"] and "--address auto" in spec["entrypoint"]
    check_command(spec["entrypoint"])


def test_the_ray_job_has_a_token_and_fetches_the_data_that_its_head_reads() -> None:
    cluster = load("kuberay.yaml")["spec"]["rayClusterSpec"]
    # Not in `env`, where the operator, the autoscaler and the submitting pod would not have it.
    assert cluster["authOptions"] == {"mode": "token"}
    pod = cluster["headGroupSpec"]["template"]["spec"]
    (container,), (fetch,) = pod["containers"], pod["initContainers"]
    environment = {entry["name"]: entry.get("value") for entry in container["env"]}
    assert not [name for name in environment if name.startswith("RAY_AUTH")]
    check_command(f"{PROGRAM}{shlex.join(fetch['args'])}")  # the image's entry point
    assert fetch["args"][-1] == environment["TUNE_CIFAR_DATA"]
    assert fetch["image"] == container["image"]
    assert fetch["volumeMounts"] == container["volumeMounts"]
    # The image's user may write on the volume.
    dockerfile = (ROOT / "Dockerfile").read_text(encoding="utf-8")
    assert f"ARG UID={pod['securityContext']['fsGroup']}\n" in dockerfile


def test_the_compose_file_has_known_fields_no_password_and_listens_on_loopback() -> None:
    text = (DEPLOY / "compose.yaml").read_text(encoding="utf-8")
    found = load("compose.yaml")
    for name, service in found["services"].items():
        assert set(service) <= SERVICE, name
        assert all(port.startswith("127.0.0.1:") for port in service.get("ports", ()))
        for key, value in service.get("environment", {}).items():
            if re.search("PASSWORD|SECRET", key):
                assert value.startswith("${") and ":?" in value, key
        named = [each.split(":")[0] for each in service.get("volumes", ())]
        assert set(named) <= set(found["volumes"])
    wanted = set(re.findall(r"\$\{(\w+):\?", text))
    example = (DEPLOY / "env.example").read_text().splitlines()
    assert wanted == {line.partition("=")[0] for line in example if not line.startswith("#")}
    assert "deploy/.env" in (ROOT / ".gitignore").read_text().splitlines()


# Imitations of what the script calls: each notes its words; `srun` runs what it is given, and the
# search ends once all nodes have been started.
IMITATIONS = {
    "scontrol": 'case $1 in show) printf "n1\\nn2\\nn3\\n";; esac',
    "srun": 'for word; do case $word in --*) shift;; *) break;; esac; done; "$@"',
    "hostname": "echo 10.0.0.1 fe80::1",
    "ray": "case $1 in start) sleep 30 & wait;; status) exit 0;; esac",
    "python": 'trap "exit 130" TERM; until [ "$(grep -c "^ray start" "$CALLS")" = 3 ]; do '
    "sleep 0.05; done; sleep $SECONDS_OF_SEARCH & wait $!; exit $STATUS",
}


@contextmanager
def run_script(
    folder: Path, status: int = 0, seconds: int = 0, options: tuple[str, ...] = ()
) -> Iterator[tuple[subprocess.Popen[bytes], Path]]:
    """Run the script with imitations of Slurm's commands; yield it and the file of their calls."""
    programs, calls = folder / "bin", folder / "calls"
    programs.mkdir()
    calls.touch()
    for name, body in IMITATIONS.items():
        path = programs / name
        path.write_text(f'#!/bin/bash\necho "{name} $*" >> {calls}\n{body}\n')
        path.chmod(0o755)
    environment = os.environ | {
        "PATH": f"{programs}:{os.environ['PATH']}",
        "SLURM_SUBMIT_DIR": str(folder),
        "SLURM_JOB_NODELIST": "n[1-3]",
        "SLURM_JOB_ID": "4242",
        "SLURM_CPUS_PER_TASK": "8",
        "SECONDS_OF_SEARCH": str(seconds),
        "STATUS": str(status),
        "CALLS": str(calls),
    }
    with (folder / "output").open("wb") as output:
        words = ["bash", str(SBATCH), *options]
        script = subprocess.Popen(
            words, env=environment, stdout=output, stderr=output, start_new_session=True
        )
        try:
            yield script, calls
        finally:  # as Slurm does at the end of a job
            subprocess.run(["pkill", "-KILL", "-s", str(script.pid)], check=False)
            script.wait()


def read_calls(calls: Path, name: str) -> list[str]:
    lines = calls.read_text().splitlines()
    return [line for line in lines if line.startswith(f"{name} ")]


@pytest.mark.parametrize(("status", "is_requeued"), [(0, False), (1, False), (130, True)])
def test_the_slurm_job_starts_a_node_each_searches_and_is_queued_again_if_interrupted(
    tmp_path: Path, status: int, is_requeued: bool
) -> None:
    with run_script(tmp_path, status, options=("--set", "epochs=4")) as (script, calls):
        assert script.wait(timeout=60) == status, (tmp_path / "output").read_text()
    starts = [line for line in read_calls(calls, "ray") if line.startswith("ray start")]
    assert sum("--head" in line for line in starts) == 1
    assert sum("--address=10.0.0.1:24242" in line for line in starts) == 2
    nodes = re.findall(r"--nodelist=(\w+) --overlap", "\n".join(read_calls(calls, "srun")))
    assert sorted(nodes) == ["n1", "n2", "n3"]
    (search,) = read_calls(calls, "python")
    assert search.endswith("--continue --address 10.0.0.1:24242 --set epochs=4")
    check_command(search)
    assert ("scontrol requeue 4242" in read_calls(calls, "scontrol")) == is_requeued


def test_the_slurm_job_hands_its_signal_to_the_search(tmp_path: Path) -> None:
    with run_script(tmp_path, seconds=30) as (script, calls):
        while not read_calls(calls, "python"):
            assert script.poll() is None
        script.terminate()  # as Slurm does, to the script alone
        assert script.wait(timeout=20) == 130
    assert "scontrol requeue 4242" in read_calls(calls, "scontrol")


def test_the_options_of_sbatch_are_real_and_leave_time_for_checkpoints() -> None:
    options = dict(re.findall(r"^#SBATCH --([a-z-]+)=?(.*)$", SBATCH.read_text(), re.MULTILINE))
    assert set(options) == {
        *("job-name", "nodes", "ntasks-per-node", "cpus-per-task", "time", "signal"),
        *("requeue", "open-mode"),
    }
    kind, seconds = options["signal"].split("@")
    assert kind == "B:TERM" and int(seconds) >= 60
