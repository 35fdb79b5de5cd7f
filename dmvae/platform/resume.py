"""Whether a run or a study may resume: the settings that it began with, compared with the settings requested now."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic_core import to_jsonable_python

from dmvae.config.section import Section
from dmvae.platform.errors import RunError
from dmvae.platform.records import read_settings


@dataclass(frozen=True)
class ResumeRules:
    """Which settings of a run or a study may differ when it resumes; all others must be the same.

    Attributes:
        kind: "run" or "study", for messages.
        section: the configuration, whose defaults stand in for settings that are newer than a record.
        may_change: settings by path; `training.checkpoint_*` is every setting that begins so.
        may_grow: whole numbers that may only become larger.
    """

    kind: str
    section: type[Section]
    may_change: tuple[str, ...]
    may_grow: tuple[str, ...]

    def check(self, file: Path, now: Mapping[str, Any], where: str, remedy: str = "choose another name") -> None:
        """Check that a recorded run or study may resume with the settings in `now`; no file, no conflict.

        Args:
            file: the record, JSON.
            now: the record with the settings requested.
            where: the folder or URI, for the message.
            remedy: what to do other than restoring the settings.

        Raises:
            RecordError: if the record is not valid.
            RunError: listing every setting that must not differ, with both values, and the settings that may.
        """
        recorded = read_settings(file)
        if recorded is None:
            return
        before, after = _settings(recorded), _settings(now)
        before |= {key: to_jsonable_python(default_of(self.section, key)) for key in after.keys() - before.keys()}
        refused = [
            f"  {key}: {before.get(key)!r} in the {self.kind}, {after.get(key)!r} requested"
            for key in sorted(before.keys() | after.keys())
            if before.get(key) != after.get(key) and not self._is_free(key, before.get(key), after.get(key))
        ]
        if refused:
            raise RunError(
                "\n".join([f"Cannot resume the {self.kind} at {where} with other settings:", *refused])
                + f"\nRestore them, or {remedy}. {', '.join(self.may_grow)} may grow; "
                f"{', '.join(self.may_change)} may change."
            )

    def _is_free(self, key: str, before: Any, after: Any) -> bool:
        if key in self.may_grow:
            is_number = isinstance(before, int) and not isinstance(before, bool)
            return is_number and 0 < before <= after
        return any(
            key.startswith(path.removesuffix("*")) if path.endswith("*") else key == path for path in self.may_change
        )


def _settings(record: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in flatten(record).items() if value != {}}


def flatten(tree: Mapping[str, Any]) -> dict[str, Any]:
    """Return `{"optim": {"learning_rate": 1e-3}}` as `{"optim.learning_rate": 1e-3}`; an empty mapping is a value."""
    return dict(_leaves(tree, ""))


def _leaves(tree: Mapping[str, Any], prefix: str) -> Iterator[tuple[str, Any]]:
    for key, value in tree.items():
        if isinstance(value, Mapping) and value:
            yield from _leaves(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def default_of(section: type[Section], key: str) -> Any:
    """Return the default of a setting such as `data.unit`; records older than the setting were made with it.

    None where a section's keys are the user's own, or no setting has that name.
    """
    first, _, rest = key.partition(".")
    field = section.model_fields.get(first)
    if field is None:
        return None
    if not rest:
        return None if field.is_required() else field.get_default(call_default_factory=True)
    inner = field.annotation
    return default_of(inner, rest) if isinstance(inner, type) and issubclass(inner, Section) else None
