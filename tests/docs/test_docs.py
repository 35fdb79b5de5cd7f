"""What the documentation names exists: paths, links, commands with their flags, settings, and code that runs."""

import os
import re
import shlex
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from pydantic import BaseModel

from dmvae.cli import VERBS

ROOT = Path(__file__).parents[2]
PAGES = [
    ROOT / "README.md",
    ROOT / "CONTRIBUTING.md",
    ROOT / "CHANGELOG.md",
    ROOT / "cluster" / "README.md",
    *(page for page in sorted((ROOT / "docs").glob("*.md")) if not page.is_symlink()),
]
REPOSITORY = re.compile(r"`((?:dmvae|jobs|cluster|docs|tests|\.ci)/[\w./-]+)`")
COMMAND = re.compile(rf"(?:python -m jobs\.|`dmvae )({'|'.join(VERBS)})\b((?: [^\s`|]+)*)")
OF_OTHERS = {"working-dir"}
"""Flags of commands that are not ours."""
WHERE: dict[str, dict[str, object]] = {
    "train": {"name": "run", "data": {"dataset": "data"}},
    "search": {"name": "study", "trials": 2},
}
"""What a fragment of a configuration leaves out."""

pages = pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))


def blocks(page: Path, language: str) -> list[tuple[str, str]]:
    """Return the title and the text of a page's code blocks."""
    return re.findall(rf'^```{language}(?: title="([^"]*)")?\n(.*?)^```$', page.read_text(), re.S | re.M)


@pages
def test_every_path_of_the_repository_exists(page: Path) -> None:
    assert [path for path in REPOSITORY.findall(page.read_text()) if not (ROOT / path).exists()] == []


@pages
def test_every_link_leads_to_a_file(page: Path) -> None:
    links = [link.partition("#")[0] for link in re.findall(r"\]\(([^)\s]+)\)", page.read_text()) if "://" not in link]
    assert [link for link in links if link and not (page.parent / link).exists()] == []


def has_setting(config: type[BaseModel], flag: str) -> bool:
    """Tell whether a configuration has the setting of a flag."""
    first, _, rest = flag.replace("-", "_").partition(".")
    if first not in config.model_fields:
        return False
    section = config.model_fields[first].annotation
    return not rest or (isinstance(section, type) and issubclass(section, BaseModel) and has_setting(section, rest))


@pages
def test_every_command_has_its_verb_and_flags(page: Path) -> None:
    for verb, rest in COMMAND.findall(page.read_text()):
        words = shlex.split(rest, comments=True)
        flags = [word.removeprefix("--") for word in words if word.startswith("--") and word != "--help"]
        assert [flag for flag in flags if not has_setting(VERBS[verb].config(), flag)] == [], f"{verb}{rest}"
        assert [word for word in words if word.startswith("jobs/") and not (ROOT / word).is_file()] == []


@pages
def test_every_flag_in_the_text_is_one_of_some_verb(page: Path) -> None:
    flags = re.findall(r"`--([a-z][\w.-]*)[^`]*`", page.read_text())
    configs = [verb.config() for verb in VERBS.values()]
    assert [flag for flag in flags if flag not in OF_OTHERS and not any(has_setting(c, flag) for c in configs)] == []


@pages
def test_every_target_and_every_module_to_run_exists(page: Path) -> None:
    text, makefile = page.read_text(), (ROOT / "Makefile").read_text()
    assert [name for name in re.findall(r"`make (\w+)`", text) if f"\n{name}:" not in makefile] == []
    modules = [ROOT.joinpath(*name.split(".")) for name in re.findall(r"python -m (tests[\w.]*\w)", text)]
    assert [
        path for path in modules if not path.with_suffix(".py").is_file() and not (path / "__main__.py").is_file()
    ] == []


@pages
def test_every_configuration_is_valid(page: Path) -> None:
    for title, text in blocks(page, "toml"):
        verb = Path(title).stem
        tree = {**WHERE.get(verb, {}), **tomllib.loads(text)}
        if verb == "search":
            tree["base"] = WHERE["train"]
        assert VERBS[verb].config().model_validate(tree)


@pytest.mark.slow
@pytest.mark.parametrize(
    "page", ["README.md", "docs/notebook.md", "docs/python.md", "docs/multivae.md", "docs/extending.md"]
)
def test_the_python_examples_run(page: str, tmp_path: Path) -> None:
    examples = [text for _, text in blocks(ROOT / page, "python")]
    program = "\n".join(["import torch", "torch.set_num_threads(1)", *examples])
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    subprocess.run([sys.executable, "-c", program], cwd=tmp_path, env=environment, check=True)
