"""The files of `cluster/`: valid, of the versions that are tested, with commands that the jobs understand."""

import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from dmvae.config.errors import UserError
from tests.manifests import ROOT, commands, faults, images, lock, parse_command, version

CLUSTER = ROOT / "cluster"
FILES = sorted(
    file for file in CLUSTER.rglob("*") if file.suffix in (".yaml", ".sh") or file.name == "Dockerfile"
)  # fmt: skip
MANIFESTS = [file for file in FILES if file.suffix == ".yaml"]
TEXTS = [file for file in CLUSTER.rglob("*") if file.is_file()]
# how each is broken: what is replaced by what
BREAKS = {
    "Dockerfile": [("COPY jobs jobs", "ADD jobs jobs"), ("WORKDIR /source", "WORKDIR source"), ('"$@"', "$@")],
    "cluster.yaml": [
        ("groupName:", "groupname:"),
        ("minReplicas: 0", "minReplicas: none"),
        ("mountPath: /shared", "mountpath: /shared"),
        ("mode: token", "mode: tokens"),
    ],
    "train.yaml": [
        ("backoffLimit:", "backOffLimit:"),
        ("httpGet: {path", "httpget: {path"),
        ("runAsNonRoot: true", "runAsNonRoot: 'true'"),
    ],
    "search.yaml": [("submissionMode:", "submissionmode:"), ("maxReplicas: 8", "maxReplicas: many")],
    "aws.yaml": [
        ("head_node_type: head", "head_node_type: heads"),
        ("min_workers: 0", "min_worker: 0"),
        ("max_workers: 16", "max_workers: many"),
    ],
    "mlflow.yaml": [
        ("volumeClaimTemplates:", "volumeClaimTemplate:"),
        ("runAsUser: 70", "runAsUser: seventy"),
        ("secretKeyRef:", "secretRef:"),
    ],
    "compose.yaml": [
        ("healthcheck:", "healthCheck:"),
        ("condition: service_healthy", "condition: healthy"),
        ("shm_size:", "shm:"),
    ],
    "slurm.sh": [
        ('"${here[@]}"', "${here[@]}"),
        ("2>/dev/null; do", "2>/dev/null"),
        ('cd "$SLURM_SUBMIT_DIR"', "cd $DIR"),
    ],
    "storage.yaml": [("accessModes:", "accessMode:"), ("kind: PersistentVolumeClaim", "kind: PersistentVolume")],
}


def relative(file: Path) -> str:
    return str(file.relative_to(CLUSTER))


def documents(file: Path) -> list[dict[str, Any]]:
    return list(yaml.safe_load_all(file.read_text()))


def resources(kind: str) -> dict[str, dict[str, Any]]:
    found = [(relative(file), document) for file in MANIFESTS for document in documents(file)]
    return {name: document for name, document in found if document.get("kind") == kind}


@pytest.mark.parametrize("file", FILES, ids=relative)
def test_every_file_is_valid(file: Path) -> None:
    assert faults(file) == []


@pytest.mark.parametrize("file", FILES, ids=relative)
def test_a_broken_copy_of_every_file_is_refused(file: Path, tmp_path: Path) -> None:
    assert file.name in BREAKS, "each file is broken in some way"
    for before, after in BREAKS[file.name]:
        assert before in file.read_text()
        broken = tmp_path / file.name
        broken.write_text(file.read_text().replace(before, after, 1))
        assert faults(broken), f"{before!r} became {after!r}"


@pytest.mark.parametrize("file", MANIFESTS, ids=relative)
def test_images_are_named_after_the_versions_of_the_lock(file: Path) -> None:
    ours = f"dmvae:{version()}-ray{lock()['ray']}"
    for image in images(documents(file)):
        name, _, tag = image.partition(":")
        assert re.search(r"\d", tag), f"{image} names no version"
        assert name != "dmvae" or image in (f"{ours}-cpu", f"{ours}-cuda")


@pytest.mark.parametrize("file", TEXTS, ids=relative)
def test_no_other_version_of_ray_or_of_the_image_is_mentioned(file: Path) -> None:
    text = file.read_text()
    assert set(re.findall(r"(?i)ray(?:Version: |[ -]?)v?(\d+\.\d+\.\d+)", text)) <= {lock()["ray"]}
    assert set(re.findall(r"dmvae[:@](\d+\.\d+\.\d+)", text)) <= {version()}


def test_the_image_has_the_python_that_is_tested() -> None:
    (base,) = set(re.findall(r"^FROM (\S+)", (CLUSTER / "Dockerfile").read_text(), re.MULTILINE))
    assert base.startswith("python:3.11-")


def test_every_command_is_one_that_its_job_understands() -> None:
    found = [(relative(file), verb, rest) for file in TEXTS for verb, rest in commands(file.read_text())]
    jobs = {name: commands(job["spec"]["entrypoint"]) for name, job in resources("RayJob").items()}
    assert all(len(job) == 1 for job in jobs.values())
    found += [(name, verb, rest) for name, job in jobs.items() for verb, rest in job]
    assert {
        "kuberay/train.yaml",
        "kuberay/search.yaml",
        "kuberay/cluster.yaml",
        "aws.yaml",
        "compose.yaml",
        "slurm.sh",
    } <= {name for name, _, _ in found}
    for _, verb, arguments in found:
        assert parse_command(verb, arguments)


def test_a_command_with_a_misspelt_flag_is_refused() -> None:
    ((verb, arguments),) = commands(resources("RayJob")["kuberay/train.yaml"]["spec"]["entrypoint"])
    with pytest.raises(UserError):
        parse_command(verb, [*arguments, "--workers.nums", "4"])
    with pytest.raises(UserError, match=r"workers\.num"):
        parse_command(verb, [*arguments, "--workers.num", "0"])


def test_jobs_bring_the_cluster_that_stands_alone() -> None:
    (cluster,) = resources("RayCluster").values()
    for job in resources("RayJob").values():
        assert job["spec"]["rayClusterSpec"] == cluster["spec"]


def test_the_cluster_keeps_its_promises() -> None:
    (cluster,) = resources("RayCluster").values()
    spec = cluster["spec"]
    assert spec["rayVersion"] == lock()["ray"]
    assert spec["authOptions"] == {"mode": "token", "secretName": "dmvae-token"}
    assert spec["headGroupSpec"]["rayStartParams"]["num-cpus"] == "0"
    assert "affinity" not in spec["headGroupSpec"]["template"]["spec"], "a head is not preemptible"
    groups = {group["groupName"]: group for group in spec["workerGroupSpecs"]}
    assert groups.keys() == {"cpu", "gpu"}
    assert all((group["replicas"], group["minReplicas"]) == (0, 0) for group in groups.values())
    for group in (spec["headGroupSpec"], *groups.values()):
        pod = group["template"]["spec"]
        (container,) = pod["containers"]
        assert pod["securityContext"]["runAsNonRoot"]
        assert {"readinessProbe", "livenessProbe", "startupProbe"} <= container.keys()
        assert container["resources"]["requests"] == container["resources"]["limits"]
    assert "nvidia.com/gpu" in groups["gpu"]["template"]["spec"]["containers"][0]["resources"]["limits"]
