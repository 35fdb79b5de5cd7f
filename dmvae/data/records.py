"""The one reader of the small JSON files that this project writes for itself: whole, of a known version, and valid.

A file may come from a stranger, or have lost its content in a power cut. Whatever is wrong becomes one `RecordError`
that names the file, the field and what to do.
"""

import os
import stat
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel, ConfigDict, TypeAdapter, ValidationError
from pydantic_core import from_json

T = TypeVar("T")

VERSION = 1
"""The version of all records; one without the key `version` has it. A change that old readers must refuse raises it."""
_MAX_BYTES = 64 << 20
_adapter: Callable[[Any], Any] = cache(TypeAdapter)


class RecordError(ValueError):
    """A record cannot be read, is not valid, or was written by a newer release."""


class Record(BaseModel):
    """A frozen record that rejects unknown fields."""

    model_config = ConfigDict(extra="forbid", frozen=True)


def read_record(file: Path, schema: type[T] | Any, remedy: str) -> T | None:
    """Read and validate one file; None if there is no file of this name.

    Args:
        file: holds one JSON object.
        schema: a `Record`, or any type that pydantic validates.
        remedy: a sentence for the end of every message.

    Raises:
        RecordError: if it is not a regular file, cannot be read, or `parse_record` rejects it.
    """
    try:
        kind = file.stat().st_mode
        if not stat.S_ISREG(kind):  # a pipe would never end
            raise RecordError(f"{file} must be a regular file. {remedy}")
        with file.open("rb") as stream:
            text = stream.read(_MAX_BYTES + 1)
    except OSError as error:
        if isinstance(error, FileNotFoundError) and not os.path.lexists(file):
            return None
        raise RecordError(f"Cannot read {file}: {error.strerror}. {remedy}") from None
    if len(text) > _MAX_BYTES:
        raise RecordError(f"{file} is too large: expected at most {_MAX_BYTES >> 20} MiB. {remedy}")
    found: T = parse_record(text, str(file), schema, remedy)
    return found


def parse_record(text: bytes | str, where: str, schema: type[T] | Any, remedy: str) -> T:
    """Parse and validate the text of a record; `where` names the file in messages.

    Raises:
        RecordError: if the text is not JSON, the version is newer, or a field is unknown, missing or invalid.
    """
    if not text.strip():
        raise RecordError(f"{where} is empty, as after a power cut. {remedy}")
    try:
        tree = from_json(text)
    except ValueError as error:
        raise RecordError(f"{where} is not valid JSON: {error}. {remedy}") from None
    if isinstance(tree, dict) and (version := tree.pop("version", VERSION)) != VERSION:
        raise RecordError(
            f"Cannot read {where}: expected version {VERSION}, got {version!r:.40}. It was written by a newer "
            "release: upgrade dmvae."
        )
    try:
        found: T = _adapter(schema).validate_python(tree)
    except ValidationError as error:
        raise RecordError(f"{_first_fault(error, where)} {remedy}") from None
    return found


def _first_fault(error: ValidationError, where: str) -> str:
    fault = error.errors(include_url=False, include_context=False)[0]
    field = ".".join(str(part) for part in fault["loc"] if not str(part).startswith(("function-", "dict[")))
    place = f"{where}, {field[:100]}" if field else where
    if fault["type"] == "extra_forbidden":
        return f"{place}: unknown field. A newer release may have written it: upgrade dmvae."
    if fault["type"] == "missing":
        return f"{place}: this field is missing."
    return f"{place}: {fault['msg'].removeprefix('Value error, ')}, but got {fault['input']!r:.60}."
