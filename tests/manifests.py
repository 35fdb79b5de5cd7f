"""What is wrong with a file of `cluster/`: each kind is judged by the tool that knows it."""

import json
import re
import shlex
import subprocess
import sys
import tomllib
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Any

import jsonschema
import yaml

from dmvae.cli import VERBS
from dmvae.config.errors import UserError
from dmvae.config.parsing import parse
from dmvae.config.section import Section

ROOT = Path(__file__).parents[1]
_KUBERAY = Path(__file__).parent / "kuberay" / "rayjob.v1.schema.json"
_COMMAND = re.compile(r"(?:python -m jobs\.|\bdmvae |cluster/slurm\.sh )(" + "|".join(VERBS) + r") ([^`\n]*)")


def faults(file: Path) -> list[str]:
    """Return what the tools for files of this kind say against one; nothing if it is well."""
    if file.name == "Dockerfile":
        return _run("hadolint", "--no-color", str(file))
    if file.suffix == ".sh":
        return _run("shellcheck", str(file))
    documents = list(yaml.safe_load_all(file.read_text()))
    if file.name == "compose.yaml":
        return _by_schema(documents[0], _compose_schema())
    if "available_node_types" in documents[0]:
        return _by_autoscaler(documents[0])
    return [fault for document in documents for fault in _by_kubernetes(document)]


def _run(tool: str, *arguments: str) -> list[str]:
    program = str(Path(sys.executable).with_name(tool))
    done = subprocess.run([program, *arguments], capture_output=True, text=True, check=False)
    assert bool(done.returncode) == bool(done.stdout.strip()), done.stderr
    return done.stdout.splitlines()


def _by_kubernetes(document: dict[str, Any]) -> list[str]:
    """Judge by the schema of the resource's kind; an API server would drop an unknown field without a word."""
    if document["apiVersion"] == "ray.io/v1":
        return _by_schema(document, _ray_schema(document["kind"]))
    import kubernetes_validate

    try:
        kubernetes_validate.validate(document, kubernetes_validate.latest_version(), strict=True)
    except (kubernetes_validate.ValidationError, kubernetes_validate.SchemaNotFoundError) as error:
        return [str(error)]
    return []


def _by_autoscaler(document: dict[str, Any]) -> list[str]:
    """Judge by what `ray up` does first; its message is the last line of its exception."""
    from ray.autoscaler._private.util import prepare_config, validate_config

    try:
        validate_config(prepare_config(document))
    except (jsonschema.ValidationError, ValueError, NotImplementedError) as error:
        return [str(error)]
    return []


def _by_schema(document: Any, schema: dict[str, Any]) -> list[str]:
    validator = jsonschema.validators.validator_for(schema, jsonschema.Draft7Validator)(schema)
    return [f"{error.json_path}: {error.message}" for error in validator.iter_errors(document)]


@cache
def _compose_schema() -> dict[str, Any]:
    """Return the Compose Specification's own schema."""
    vendored = files("check_jsonschema").joinpath("builtin_schemas/vendor/compose-spec.json")
    schema: dict[str, Any] = json.loads(vendored.read_text())
    return schema


@cache
def _ray_schema(kind: str) -> dict[str, Any]:
    """Return KubeRay 1.7's schema of a RayJob or a RayCluster, in which unknown fields are errors."""
    job = json.loads(_KUBERAY.read_text())
    _close(job["properties"]["spec"])
    job["additionalProperties"] = False
    if kind == "RayCluster":
        job["properties"]["spec"] = job["properties"]["spec"]["properties"]["rayClusterSpec"]
    return dict(job)


def _close(schema: Any) -> None:
    if isinstance(schema, list):
        for part in schema:
            _close(part)
    if not isinstance(schema, dict):
        return
    if isinstance(schema.get("properties"), dict):
        schema["additionalProperties"] = False
    if schema.get("x-kubernetes-int-or-string"):
        schema["type"] = ["integer", "string"]
    for part in schema.values():
        _close(part)


def commands(text: str) -> list[tuple[str, list[str]]]:
    """Return every command of this project in a text, as a verb and its arguments."""
    joined = re.sub(r"\\\n\s*", "", text)
    return [(found[1], shlex.split(found[2], comments=True)) for found in _COMMAND.finditer(joined)]


def parse_command(verb: str, arguments: list[str]) -> Section:
    """Parse a command as the job itself would; what stands for a person's file is the shipped one.

    Raises:
        UserError: if the job would refuse it.
    """
    configs, first = f"{ROOT}/jobs/configs/", VERBS[verb].first
    if first is not None and arguments and not arguments[0].startswith("-"):
        arguments = [f"--{first}", *arguments]
    named = [
        f"{configs}{verb}.toml" if part == "CONFIG.toml" else re.sub("^/configs/", configs, part) for part in arguments
    ]
    try:
        return parse(VERBS[verb].config(), verb, "", named)
    except SystemExit as stop:
        raise UserError(f"{verb} {shlex.join(arguments)}: exit code {stop.code}") from None


def images(document: Any) -> set[str]:
    """Return the container images that a document names, wherever it does."""
    if isinstance(document, dict):
        own = {value for key, value in document.items() if key == "image" and isinstance(value, str)}
        return own.union(*map(images, document.values()))
    return set().union(*map(images, document)) if isinstance(document, list) else set()


def version() -> str:
    """Return the project's version."""
    return str(tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"])


def lock() -> dict[str, str]:
    """Return the version of every package in the lock."""
    lines = (ROOT / "requirements.lock").read_text().splitlines()
    return dict(line.split("==") for line in lines if "==" in line)
