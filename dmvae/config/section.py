"""What every section of a configuration has in common."""

import re
from pathlib import Path
from typing import Annotated, Any

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field

_MODALITY = re.compile(r"[A-Za-z][A-Za-z0-9_-]*")
RESERVED_NAMES = frozenset({"all", "joint", "shared", "id", "label", "size_factor"})


class Section(BaseModel):
    """A frozen group of settings in which a misspelt key is refused."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False, validate_default=True)

    @classmethod
    def located(cls, tree: dict[str, Any], folder: Path) -> dict[str, Any]:
        """Return a TOML file's content with names of other configurations read from the file's own folder."""
        return tree


def check_modality_name(name: str) -> str:
    """Return `name` if a modality may be called so.

    Raises:
        ValueError: if it is not a letter followed by letters, digits, `_` or `-`, or is a reserved word.
    """
    if not _MODALITY.fullmatch(name) or name in RESERVED_NAMES:
        raise ValueError(
            f"a modality's name is a letter followed by letters, digits, '_' or '-', and none of "
            f"{', '.join(sorted(RESERVED_NAMES))}; got {name!r}. Rename it."
        )
    return name


ModalityName = Annotated[str, AfterValidator(check_modality_name)]


def check_name(name: str) -> str:
    """Return `name` if a run, a dataset or a split may be called so.

    Raises:
        ValueError: if it is not letters, digits, `.`, `_` or `-`.
    """
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", name):
        raise ValueError(f"a name is letters, digits, '.', '_' or '-', without a path; got {name!r}. Rename it.")
    return name


Name = Annotated[str, AfterValidator(check_name)]


def has_password(uri: str) -> bool:
    """Tell whether a URI carries credentials."""
    option = r"(?i)[?&][^=&\s]*(?:token|password|secret|signature|sig|(?:access|account|secret)_key)="
    return re.search(r"://[^/\s]*:[^/\s]*@", uri) is not None or re.search(option, uri) is not None


def _check_runs_dir(place: str) -> str:
    if has_password(place):
        raise ValueError(
            "a URI in a configuration carries no keys, because configurations are recorded; got one that does. "
            "Set them in the environment, as AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY."
        )
    return place


RunsDir = Annotated[str, Field(min_length=1), AfterValidator(_check_runs_dir)]


def _check_is_no_truth_value(number: Any) -> Any:
    if isinstance(number, bool):
        raise ValueError(f"a number is no truth value; got {number}. Write, say, {int(number)}.")
    return number


_NoTruthValue = BeforeValidator(_check_is_no_truth_value)
Size = Annotated[int, _NoTruthValue, Field(gt=0, lt=2**31)]
"""Of what there is at least one of."""
Count = Annotated[int, _NoTruthValue, Field(ge=0, lt=2**31)]
"""Of what there may be none of."""
Seed = Annotated[int, _NoTruthValue, Field(ge=0, lt=2**63)]
