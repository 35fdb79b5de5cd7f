"""Rows from the `.h5mu` file of a MuData object or the `.h5ad` file of an AnnData object, read with h5py."""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from dmvae.config.section import RESERVED_NAMES
from dmvae.config.sources import H5muModality, H5muSource
from dmvae.data.errors import DatasetError
from dmvae.data.preparation.class_names import ClassNames
from dmvae.data.preparation.rows import Rows
from dmvae.data.preparation.sources.anndata_matrix import Matrix, has_x, index_name, read_column
from dmvae.data.preparation.sources.arrow_columns import ROW_FIELDS, read_row_column, shown
from dmvae.data.preparation.stream import Chunk, SourceLocation, Stream, chunk_rows

Array = np.ndarray[Any, np.dtype[Any]]

_WHOLE = "X"
"""The name of an AnnData file's `X`, as a key; keys of MuData are those of its modalities."""


def read(source: H5muSource, seed: int, scratch: Path) -> Stream:
    """Read the observations of all modalities; a modality is missing in the observations that it lacks.

    Integers are counts and become float32. The table of observations stays in memory, and so does a sparse matrix
    that is stored by columns.

    Raises:
        DatasetError: if h5py is not installed, the file is of another kind, or something in the settings is absent.
    """
    try:
        h5py = import_module("h5py")
    except ImportError as error:
        raise DatasetError("The source 'h5mu' needs h5py. Run pip install 'dmvae[h5mu]'.") from error
    with _open(h5py, source.path) as file:
        labels = ClassNames()
        found, notes = _modalities(file, source)
        fields, remarks = _row_fields(file, source, labels)
        matrices = {name: _matrix(file, name, settings, source.path) for name, settings in found.items()}
        notes += remarks + _stored_elsewhere(file, found, matrices)
    ids = fields.pop("ids")
    return Stream(
        _chunks(h5py, source, ids, fields),
        len(ids),
        notes=tuple(notes),
        features={name: matrix.features for name, matrix in matrices.items() if matrix.features},
        labels=labels,
    )


@contextmanager
def _open(h5py: Any, path: str) -> Iterator[Any]:
    if not Path(path).is_file():
        raise DatasetError(f"Source file not found: {path}. Correct source.path.")
    try:
        with h5py.File(path, "r") as file:
            if "obs" not in file or ("mod" not in file and "var" not in file):
                raise DatasetError(
                    f"{path} is neither a MuData nor an AnnData file: expected 'obs' and 'mod' or 'var', got "
                    f"{shown(sorted(file)) or 'nothing'}. Write it with mudata or anndata."
                )
            if file.attrs.get("axis", 0) != 0:
                raise DatasetError(
                    f"Modalities of {path} share variables (axis=1), but must share observations. "
                    f"Write the file with axis=0."
                )
            yield file
    except (OSError, KeyError, RuntimeError) as error:
        raise DatasetError(f"Cannot read {path} as MuData or AnnData: {error}. Write the file again.") from error


def _modalities(file: Any, source: H5muSource) -> tuple[dict[str, H5muModality], list[str]]:
    """Return the settings of each modality to read, with its key in the file, and remarks on names."""
    if source.modalities is None:
        return _all_modalities(file, source.path)
    found, is_mudata = {}, "mod" in file
    for name, settings in source.modalities.items():
        key, layer = settings.key or (name if is_mudata else _WHOLE), settings.layer
        if not is_mudata and key != _WHOLE:
            key, layer = _WHOLE, layer or key
        if not is_mudata and settings.key is None and layer is None and name in file.get("obsm", {}):
            layer = name
        if is_mudata and key not in file["mod"]:
            raise DatasetError(
                f"Modality {key!r} not found in {source.path}, which has {shown(sorted(file['mod']))}. "
                f"Set source.modalities.{name}.key."
            )
        found[name] = settings.model_copy(update={"key": key, "layer": layer})
    plain = [name for name, settings in found.items() if not is_mudata and settings.layer is None]
    if len(plain) > 1:
        raise DatasetError(
            f"Modalities {plain} would all be X of {source.path}, which has obsm "
            f"{shown(sorted(file.get('obsm', {}))) or 'none'}. Set source.modalities.{plain[-1]}.layer."
        )
    return found, []


def _all_modalities(file: Any, path: str) -> tuple[dict[str, H5muModality], list[str]]:
    """Return every modality of a MuData file; of an AnnData file `X` and what is in obsm and not made from `X`."""
    if "mod" in file:
        settings = {str(key): H5muModality(key=str(key)) for key in file["mod"]}
    else:
        settings = {_WHOLE: H5muModality(key=_WHOLE)} if has_x(file) or len(file.get("layers", {})) else {}
        for key in file.get("obsm", {}):
            if not key.startswith("X_"):  # as scanpy names embeddings of X
                settings[str(key)] = H5muModality(key=_WHOLE, layer=str(key))
    found: dict[str, H5muModality] = {}
    notes = []
    for key, setting in settings.items():
        name = _legal(key)
        if name in found:
            raise DatasetError(
                f"Modality {key!r} of {path} would be named {name!r}, as another one is. Name both in "
                f"source.modalities, with their keys."
            )
        if name != key:
            notes.append(f"modality {key!r} is named {name!r}")
        found[name] = setting
    return found, notes


def _legal(key: str) -> str:
    """Return a modality's name in the file with every character that a name cannot have replaced by `_`."""
    name = re.sub("[^A-Za-z0-9_-]+", "_", key).strip("_")
    name = name if name[:1].isalpha() else f"m_{name}"
    return f"{name}_" if name in RESERVED_NAMES else name


def _stored_elsewhere(file: Any, found: dict[str, H5muModality], matrices: dict[str, Matrix]) -> list[str]:
    """Return a line for what is read in place of `X`, and one for every matrix of the file that is not read."""
    notes = [
        f"{name}: there is no X, and {matrix.stored_as} is read"
        for name, matrix in matrices.items()
        if found[name].layer is None and matrix.stored_as != "X"
    ]
    groups = {str(key): group for key, group in file["mod"].items()} if "mod" in file else {_WHOLE: file}
    read = {(found[name].key, matrix.stored_as) for name, matrix in matrices.items()}
    left = []
    for key, group in groups.items():
        stored = ["X"] * has_x(group) + [
            f"{kind}/{name}" for kind in ("layers", "obsm") for name in group.get(kind, {})
        ]
        left += [f"{key}: {name}" if "mod" in file else name for name in stored if (key, name) not in read]
    return [*notes, f"not taken: {len(left)} matrices ({shown(left)})"] if left else notes


def _row_fields(file: Any, source: H5muSource, labels: ClassNames) -> tuple[dict[str, Array], list[str]]:
    """Return ids, labels and the like of all observations, by field of `Rows`, and where they were found."""
    obs, where = file["obs"], f"{source.path}, obs"
    ids = read_row_column(
        "ids", read_column(obs, index_name(obs), where), SourceLocation(where, 0, "observation"), labels
    )
    fields, notes = {"ids": ids}, []
    for setting in ("label", "split", "size_factor", "group"):
        column = getattr(source, setting)
        if column is None:
            continue
        found = _find_column(file, column, ids, source.path)
        if found is None and column != setting:
            raise DatasetError(
                f"Column {column!r} not found in {where}, which has {shown(sorted(obs)) or 'no columns'}, nor in the "
                f"obs of its modalities. Correct source.{setting}."
            )
        if found is not None:
            values, place = found
            location = SourceLocation(f"{source.path}, {place}", 0, "observation")
            fields[ROW_FIELDS[setting]] = read_row_column(ROW_FIELDS[setting], values, location, labels)
            if place != "obs":
                notes.append(f"{setting}: column {column!r} of {place}")
    return fields, notes


def _find_column(file: Any, column: str, ids: Array, path: str) -> tuple[pa.Array, str] | None:
    """Return a column of obs, or of the obs of the only modality that has it; `MODALITY:COLUMN` names one.

    It is null in observations that the modality lacks.
    """
    if column in file["obs"]:
        return read_column(file["obs"], column, f"{path}, obs"), "obs"
    having = {}
    for key, modality in file.get("mod", {}).items():
        name = column.removeprefix(f"{key}:")
        if name in modality["obs"]:
            having[key] = name
    if len(having) > 1:
        raise DatasetError(
            f"Column {column!r} of {path} is in the obs of {shown(sorted(having))}. Name one of them, such as "
            f"{min(having)}:{column}."
        )
    for key, name in having.items():
        positions = _positions(file, file["mod"][key], key, ids, path)
        values = read_column(file["mod"][key]["obs"], name, f"{path}, obs of {key}")
        return values.take(pa.array(positions, mask=positions < 0)), f"obs of modality {key}"
    return None


def _matrix(file: Any, name: str, settings: H5muModality, path: str, ids: Array | None = None) -> Matrix:
    key = settings.key or name
    modality, positions = (file["mod"][key], None) if "mod" in file else (file, None)
    if ids is not None:
        positions = _positions(file, modality, key, ids, path) if "mod" in file else np.arange(len(ids))
    return Matrix(modality, name, settings, key, path, positions)


def _positions(file: Any, modality: Any, key: str, ids: Array, path: str) -> Array:
    """Return the position in a modality of each observation of the file; -1 where the modality lacks it."""
    if key in file.get("obsmap", {}):
        return np.asarray(file["obsmap"][key][()].astype(np.int64).reshape(-1) - 1)
    names = read_column(modality["obs"], index_name(modality["obs"]), path).to_pylist()
    position = {name: index for index, name in enumerate(names)}
    return np.array([position.get(name, -1) for name in ids.tolist()], dtype=np.int64)


def _chunks(h5py: Any, source: H5muSource, ids: Array, fields: dict[str, Array]) -> Iterator[Chunk]:
    with _open(h5py, source.path) as file:
        matrices = {
            name: _matrix(file, name, settings, source.path, ids)
            for name, settings in _modalities(file, source)[0].items()
        }
        step = chunk_rows(sum(matrix.row_bytes for matrix in matrices.values()))
        for start in range(0, len(ids), step):
            part = slice(start, start + step)
            found = {name: matrix.rows(part) for name, matrix in matrices.items()}
            data, present = ({name: pair[index] for name, pair in found.items()} for index in (0, 1))
            others = {field: values[part] for field, values in fields.items()}
            yield Chunk(Rows(ids[part], data, present, **others), SourceLocation(source.path, start, "observation"))
