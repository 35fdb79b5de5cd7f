"""The base class and the field types that all configuration sections share."""

import re
from pathlib import Path
from typing import Annotated, Any

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field

_MODALITY = re.compile(r"[A-Za-z][A-Za-z0-9_-]*")
RESERVED_NAMES = frozenset({"all", "joint", "shared", "id", "label", "size_factor"})


class Section(BaseModel):
    """A frozen group of settings that rejects unknown keys."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False, validate_default=True)

    @classmethod
    def located(cls, tree: dict[str, Any], folder: Path) -> dict[str, Any]:
        """Return a TOML file's content with references to other files resolved against the file's folder."""
        return tree


def check_modality_name(name: str) -> str:
    """Return `name` if it is a valid name for a modality.

    Raises:
        ValueError: if it is not a letter followed by letters, digits, `_` or `-`, or is reserved.
    """
    if not _MODALITY.fullmatch(name) or name in RESERVED_NAMES:
        raise ValueError(
            f"Invalid modality name {name!r}: it must be a letter followed by letters, digits, '_' or '-', and cannot "
            f"be one of {', '.join(sorted(RESERVED_NAMES))}. Rename the modality."
        )
    return name


ModalityName = Annotated[str, AfterValidator(check_modality_name)]


def check_name(name: str) -> str:
    """Return `name` if it is a valid name for a run, a study or a split.

    Raises:
        ValueError: if it has other characters than letters, digits, `.`, `_` and `-`.
    """
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", name):
        raise ValueError(f"Invalid name {name!r}: it can only have letters, digits, '.', '_' and '-', and no path.")
    return name


Name = Annotated[str, AfterValidator(check_name)]


def _check_part(path: str) -> str:
    if not re.fullmatch(r"(encoders|decoders|likelihoods)(\.[A-Za-z0-9_-]+)*", path):
        raise ValueError(
            f"Invalid part {path!r}: it must begin with encoders, decoders or likelihoods, as `encoders.image` does."
        )
    return path


Part = Annotated[str, AfterValidator(_check_part)]
"""A part of a model by its path; a prefix of the paths of its weights."""


# a password may contain "/" or "@": all up to the last "@" is secret, unless the first ":" stands before a port
_USERINFO = r"(?![^/\s:@]*:\d{1,5}/)[^/\s:@]*:\S*"


def has_password(uri: str) -> bool:
    """Return whether a URI contains credentials."""
    option = r"(?i)[?&][^=&\s]*(?:token|password|secret|signature|sig|(?:access|account|secret)_key)="
    return re.search(f"://{_USERINFO}@", uri) is not None or re.search(option, uri) is not None


def scrub(text: str) -> str:
    """Return `text` without the user names, passwords and tokens of the URLs in it."""
    text = re.sub(rf"(://)(?:{_USERINFO}|[^/\s]*)@", r"\1", text)
    return re.sub(r"(?i)([?&][^=&\s]*(?:token|password|secret|signature|sig|key)=)[^&\s]+", r"\1***", text)


def _check_runs_dir(place: str) -> str:
    if has_password(place):
        raise ValueError(
            "The URI contains credentials, and configurations are recorded. Remove them, and set AWS_ACCESS_KEY_ID "
            "and AWS_SECRET_ACCESS_KEY in the environment."
        )
    return place


_DURATION = re.compile(r"(?:(\d+)h)?(?:(\d+)m)?(?:(\d+)s)?")


def seconds_of(duration: str) -> float:
    """Return the seconds of a duration such as `3h30m`.

    Raises:
        ValueError: if it is not hours, minutes and seconds in this order, or is zero.
    """
    found = _DURATION.fullmatch(duration)
    hours, minutes, seconds = (int(part or 0) for part in found.groups()) if found else (0, 0, 0)
    total = 3600 * hours + 60 * minutes + seconds
    if total == 0:
        raise ValueError(f"A duration must be hours, minutes and seconds, such as 3h30m or 90s, got {duration!r}.")
    return float(total)


def _check_duration(duration: str) -> str:
    seconds_of(duration)
    return duration


Duration = Annotated[str, AfterValidator(_check_duration)]
"""Hours, minutes and seconds: `3h30m`, `90s`."""

RunsDir = Annotated[str, Field(min_length=1), AfterValidator(_check_runs_dir)]


Trust = tuple[str, ...]
"""Packages whose code a model may name and loading it may run, beside dmvae itself."""


def _refuse_bool(number: Any) -> Any:
    if isinstance(number, bool):
        raise ValueError(f"expected a number, got {str(number).lower()}. Write {int(number)}.")
    return number


_NotBool = BeforeValidator(_refuse_bool)
Size = Annotated[int, _NotBool, Field(gt=0, lt=2**31)]
"""A whole number of at least 1."""
Count = Annotated[int, _NotBool, Field(ge=0, lt=2**31)]
"""A whole number of at least 0."""
Seed = Annotated[int, _NotBool, Field(ge=0, lt=2**63)]
"""A seed of random numbers."""
