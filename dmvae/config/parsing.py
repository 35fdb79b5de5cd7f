"""Read a configuration from a TOML file and flags, and explain what is wrong with it."""

import io
import sys
import tomllib
from collections.abc import Sequence
from contextlib import redirect_stderr
from difflib import get_close_matches
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError

from dmvae.config.errors import UserError
from dmvae.config.section import Section

S = TypeVar("S", bound=Section)


def parse(config: type[S], prog: str, summary: str, argv: Sequence[str], first: str = "CONFIG.toml") -> S:
    """Read the TOML file that `argv` begins with, apply the flags on top, and validate the result.

    Raises:
        UserError: naming the file or flag, the key, the value and what must hold.
        SystemExit: after `--help`, or for an unknown flag.
    """
    import tyro

    file = Path(argv[0]) if argv and not argv[0].startswith("-") else None
    default = None if file is None else read_toml(config, file)
    usage = f"{summary}\n\nusage: {prog} {first} [--flags]; a flag overrides the file's setting."
    rest, messages = list(argv[file is not None :]), io.StringIO()
    try:
        with redirect_stderr(messages):
            flat = tyro.conf.AvoidSubcommands[config] if default is not None else config  # type: ignore[valid-type, misc]
            parsed: Any = tyro.cli(flat, prog=prog, description=usage, args=rest, default=default)
            return config.model_validate(parsed)
    except SystemExit as stop:
        fault = stop.__context__
        while fault is not None and not isinstance(fault, ValidationError):
            fault = fault.__context__
        if fault is not None:  # tyro would print pydantic's message in a frame
            raise UserError(explain(fault, "command line", config, _section_named(fault.title, config))) from None
        sys.stderr.write(messages.getvalue())
        raise


def read_toml(config: type[S], file: Path) -> S:
    """Read and validate one TOML file.

    Raises:
        UserError: if the file does not exist, is not TOML, or is not a valid configuration.
    """
    try:
        return config.model_validate(config.located(tomllib.loads(file.read_text()), file.parent))
    except FileNotFoundError:
        raise UserError(f"Configuration file not found: {file}.") from None
    except IsADirectoryError:
        raise UserError(f"{file} is a folder. The first argument must be a TOML file.") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"{file} is not valid TOML: {error}.") from None
    except ValidationError as error:
        raise UserError(explain(error, str(file), config)) from None


def explain(error: ValidationError, where: str, config: type[BaseModel], section: str = "") -> str:
    """Return a validation error as one line per fault: place, key, what is wrong, value, and the nearest known key.

    Args:
        error: raised by pydantic.
        where: the file, or "command line".
        config: the class that was validated; its fields are suggested for misspelt keys.
        section: the setting that holds what was validated, if it is a part of `config`.
    """
    lines = []
    for fault in error.errors(include_url=False):
        path = (*filter(None, [section]), *fault["loc"])
        key = ".".join(str(part) for part in path if not str(part).startswith(("function-", "dict[")))
        message = fault["msg"].removeprefix("Value error, ")
        if fault["type"] == "extra_forbidden":
            message = f"unknown setting{_suggestion(config, path)}"
        elif fault["type"] == "missing":
            message = "this setting is required"
        elif fault["type"] != "value_error":
            message += f"; got {fault['input']!r}"
        lines.append(f"{where}: {key + ': ' if key else ''}{message}")
    return "\n".join(lines)


def _section_named(title: str, config: type[BaseModel]) -> str:
    """Return the setting of `config` whose section is of the class `title`; empty if there is none."""
    classes = {getattr(field.annotation, "__name__", ""): name for name, field in config.model_fields.items()}
    return classes.get(title, "")


def _suggestion(config: type[BaseModel], location: tuple[int | str, ...]) -> str:
    section: Any = config
    for part in location[:-1]:
        field = section.model_fields.get(str(part)) if hasattr(section, "model_fields") else None
        section = None if field is None else field.annotation
    fields = list(section.model_fields) if hasattr(section, "model_fields") else []
    close = get_close_matches(str(location[-1]), fields, n=1)
    return f"; did you mean {close[0]!r}?" if close else f" (known: {', '.join(fields)})" if fields else ""
