"""Values by the names of their features, and cells of tables as people write them: classes by name, dates as text."""

import datetime
import math
from collections.abc import Mapping, Sequence
from difflib import get_close_matches
from typing import Any

from pydantic import BaseModel, ConfigDict

from dmvae.config.likelihoods import UNSEEN


class ColumnSpec(BaseModel):
    """A column of a table; the fields of the manifest with the same names."""

    model_config = ConfigDict(extra="ignore", frozen=True)

    kind: str
    classes: tuple[str, ...] = ()
    since: str | None = None


def in_order(given: Mapping[str, Any], features: Sequence[str], where: str) -> list[Any]:
    """Return values given by name in the order of the features; None for those that are left out.

    Raises:
        ValueError: naming a feature that does not exist, and the nearest one that does.
    """
    for name in given:
        if name not in features:
            near = get_close_matches(name, features, 1)
            hint = f" Did you mean {near[0]!r}?" if near else f" Available: {', '.join(features[:10])}."
            raise ValueError(f"{where}: unknown feature {name!r}.{hint}")
    return [given.get(name) for name in features]


def number_of(cell: Any, column: ColumnSpec, where: str) -> float:
    """Return a cell of a table as the number that stands for it.

    Raises:
        ValueError: if it is no value of the column's kind.
    """
    if column.classes:
        return _class_of(cell, column, where)
    if column.since is not None and isinstance(cell, str):
        try:
            moment = datetime.datetime.fromisoformat(cell)
        except ValueError:
            raise ValueError(f"{where}: expected a date such as 2024-05-31, got {cell!r}.") from None
        passed = moment.replace(tzinfo=None) - datetime.datetime.fromisoformat(column.since)
        return passed / datetime.timedelta(days=1)
    if isinstance(cell, bool) or not isinstance(cell, int | float) or not math.isfinite(cell):
        raise ValueError(f"{where}: expected a finite number, got {cell!r}.")
    if column.kind == "positive" and not cell > 0:
        raise ValueError(f"{where}: values must be above 0, but got {cell:g}.")
    if column.kind == "count" and (cell < 0 or cell % 1):
        raise ValueError(f"{where}: counts must be whole numbers of 0 or more, but got {cell:g}.")
    return float(cell)


def written(number: float, column: ColumnSpec) -> float | str:
    """Return the number of a cell as people write it: the name of a class, a date, else the number."""
    if column.classes:
        place = round(number)
        return column.classes[place] if 0 <= place < len(column.classes) else UNSEEN
    if column.since is not None:
        moment = datetime.datetime.fromisoformat(column.since) + datetime.timedelta(days=round(number))
        return str(moment.date())
    return number


def _class_of(cell: Any, column: ColumnSpec, where: str) -> float:
    name = str(cell).lower() if isinstance(cell, bool) else cell
    if isinstance(name, int | float) and float(name).is_integer():
        name = str(int(name))
    if name in column.classes:
        return float(column.classes.index(name))
    if name == UNSEEN and column.kind == "category":
        return float(len(column.classes))
    near = get_close_matches(str(name), column.classes, 1)
    hint = f" Did you mean {near[0]!r}?" if near else ""
    raise ValueError(f"{where}: unknown class {cell!r}.{hint} Known: {', '.join(column.classes)}.")
