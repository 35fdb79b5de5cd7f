"""What the documentation names exists: paths, links, commands with their flags, settings, and code that runs."""

import re
import shlex
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from pydantic import BaseModel

from dmvae.cli import VERBS

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "cluster" / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
REPOSITORY = re.compile(r"`((?:dmvae|jobs|cluster|docs|tests|\.ci)/[\w./-]+)`")
COMMAND = re.compile(r"(?:python -m jobs\.|dmvae )(\w+)((?: [^\s`|]+)*)")
WHERE = {"train": {"name": "run", "data": {"dataset": "data"}}, "search": {"name": "study", "trials": 2}}
"""What a fragment of a configuration leaves out."""

pages = pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))


def blocks(page: Path, language: str) -> Iterator[tuple[str, str]]:
    """Yield the title and the text of a page's code blocks."""
    for title, text in re.findall(rf'^```{language}(?: title="([^"]*)")?\n(.*?)^```$', page.read_text(), re.S | re.M):
        yield title, text


@pages
def test_every_path_of_the_repository_exists(page: Path) -> None:
    assert [path for path in REPOSITORY.findall(page.read_text()) if not (ROOT / path).exists()] == []


@pages
def test_every_link_leads_to_a_file(page: Path) -> None:
    links = [link.partition("#")[0] for link in re.findall(r"\]\(([^)\s]+)\)", page.read_text()) if "://" not in link]
    assert [link for link in links if link and not (page.parent / link).exists()] == []


def has_setting(config: Any, path: list[str]) -> bool:
    """Tell whether a configuration has a setting; the keys of a dict are free."""
    if not path:
        return True
    field = config.model_fields.get(path[0].replace("-", "_")) if isinstance(config, type) and issubclass(config, BaseModel) else None
    return field is not None and (path[0] == "space" or has_setting(field.annotation, path[1:]))


@pages
def test_every_command_has_its_verb_and_flags(page: Path) -> None:
    for verb, rest in COMMAND.findall(page.read_text()):
        if verb not in VERBS:
            assert f"python -m jobs.{verb}" not in page.read_text()
            continue  # the word dmvae in a sentence
        assert verb == "init" or (ROOT / "jobs" / f"{verb}.py").is_file()
        flags = [word.removeprefix("--") for word in shlex.split(rest, comments=True) if word.startswith("--")]
        unknown = [flag for flag in flags if flag != "help" and not has_setting(VERBS[verb].config(), flag.split("."))]
        assert unknown == [], f"{verb}{rest}"
        assert all((ROOT / word).is_file() for word in rest.split() if word.startswith("jobs/")), rest


@pages
def test_every_target_and_every_module_to_run_exists(page: Path) -> None:
    text, makefile = page.read_text(), (ROOT / "Makefile").read_text()
    assert [name for name in re.findall(r"`make (\w+)`", text) if f"\n{name}:" not in makefile] == []
    modules = [ROOT.joinpath(*name.split(".")) for name in re.findall(r"python -m (tests[\w.]*\w)", text)]
    assert [path for path in modules if not path.with_suffix(".py").is_file() and not (path / "__main__.py").is_file()] == []


@pages
def test_every_configuration_is_valid(page: Path) -> None:
    for title, text in blocks(page, "toml"):
        verb = Path(title).stem
        tree = {**WHERE.get(verb, {}), **tomllib.loads(text)}
        if verb == "search":
            tree["base"] = WHERE["train"]
        assert VERBS[verb].config().model_validate(tree)


@pytest.mark.parametrize("page", [ROOT / "README.md", ROOT / "docs" / "python.md"], ids=lambda page: page.name)
def test_the_python_examples_run(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    scope: dict[str, Any] = {}
    for _, text in blocks(page, "python"):
        exec(text, scope)
