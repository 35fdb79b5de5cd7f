"""Verify shards: their checksums against the manifest, and that a model can be trained on their values."""

import os
from collections.abc import Container, Iterator, Mapping, Sequence
from contextlib import suppress
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import UInt64

from dmvae.config.likelihoods import values_of
from dmvae.data.errors import DatasetError
from dmvae.data.files import sha256_of
from dmvae.data.format.manifest import Manifest, ShardInfo
from dmvae.data.format.schema import missing_cells
from dmvae.data.format.shard import MappedShard, ShardFile
from dmvae.data.storage.shard_cache import cache_folder

Array = np.ndarray[Any, np.dtype[Any]]


def row_blocks(shard: MappedShard) -> Iterator[Array]:
    """Yield the positions of all rows, one record batch at a time."""
    for start in range(0, shard.rows, shard.record_batch_rows):
        yield np.arange(start, min(start + shard.record_batch_rows, shard.rows))


def count_cells(shard: MappedShard, name: str) -> int:
    """Return the number of observed cells of a modality, in the rows that have it."""
    counts = (
        int((~missing_cells(shard.gather(name, rows[shard.present(name, rows)]))).sum()) for rows in row_blocks(shard)
    )
    return sum(counts)


def check_values(
    shard: MappedShard,
    classes: Mapping[str, int | None],
    likelihood: Mapping[str, str],
    missing: Container[str] | None = None,
) -> None:
    """Check that a model can be trained on every observed value of a shard.

    Args:
        shard: the shard.
        classes: the number of classes of each categorical modality; None if not known yet.
        likelihood: the suggested likelihood of each modality, which tells which ones hold counts.
        missing: the modalities that may have missing cells; None: all.

    Raises:
        DatasetError: for infinity, a missing cell that is not allowed, a row without any cell, a class out of range,
            a count that is negative or fractional, a negative label, or a size factor that is not positive or is
            missing from a row with counts; with the file, the column and the first such row.
    """
    counts = [name for name in shard.columns.modalities if values_of(likelihood.get(name)) == "counts"]
    for rows in row_blocks(shard):
        for name, column in shard.columns.modalities.items():
            if column.dtype != "uint8":
                allowed = missing is None or name in missing
                _check_modality(shard, name, rows, classes.get(name), name in counts, allowed)
        if shard.columns.size_factor:
            _check_size_factors(shard, rows, counts)
        if shard.columns.has_label:
            negative = shard.present("label", rows) & (shard.gather("label", rows) < 0)
            if negative.any():
                raise DatasetError(
                    f"Labels must be 0 or more, or null, but got {shard.gather('label', rows)[negative][0]} in "
                    f"{_first(shard, 'label', rows[negative])}. Set it to null."
                )


def _check_modality(
    shard: MappedShard, name: str, rows: Array, classes: int | None, counts: bool, may_miss_cells: bool
) -> None:
    values = shard.gather(name, rows).reshape(len(rows), -1)
    if counts:
        wrong = ~(np.isfinite(values) & (values >= 0) & (values == np.floor(values)))
        law = "Counts must be whole numbers of 0 or more"
    elif values.dtype == np.int64:
        wrong = (values < 0) | (values >= (np.iinfo(np.int64).max if classes is None else classes))
        law = "Classes must be 0 or more" if classes is None else f"Classes must be between 0 and {classes - 1}"
    else:
        wrong, law = ~np.isfinite(values), "Observed values must be finite"
    found = shard.present(name, rows) & wrong.any(axis=1)
    if may_miss_cells and found.any():
        gone = missing_cells(values)
        empty = shard.present(name, rows) & gone.all(axis=1)
        if empty.any():
            raise DatasetError(
                f"No cell is observed in {_first(shard, name, rows[empty])}. Set {name!r} of that row to null, and "
                f"prepare the dataset again."
            )
        wrong &= ~gone
        found &= wrong.any(axis=1)
    if found.any():
        value = values[found][0][wrong[found][0]][0]
        raise DatasetError(
            f"{law}, but got {value} in {_first(shard, name, rows[found])}. In the source, correct it or set {name!r} "
            f"of that row to null; then prepare the dataset again."
        )


def _check_size_factors(shard: MappedShard, rows: Array, counts: list[str]) -> None:
    factors, present = shard.gather("size_factor", rows), shard.present("size_factor", rows)
    wrong = present & ~(np.isfinite(factors) & (factors > 0))
    if wrong.any():
        raise DatasetError(
            f"Size factors must be positive and finite, but got {factors[wrong][0]} in "
            f"{_first(shard, 'size_factor', rows[wrong])}. Correct it in the source, and prepare the dataset again."
        )
    for name in counts:
        absent = shard.present(name, rows) & ~present
        if absent.any():
            raise DatasetError(
                f"Missing size factor for the counts of modality {name!r} in "
                f"{_first(shard, 'size_factor', rows[absent])}. Fill it in, or remove the column."
            )


def _first(shard: MappedShard, column: str, rows: Array) -> str:
    return f"{shard.where}, column {column!r}, row {rows[0]} (id {shard.ids(rows[:1])[0]})"


Sums = UInt64[np.ndarray, " group"]


def verify_shard(file: ShardFile, info: ShardInfo, manifest: Manifest, remember: bool = True) -> Sums:
    """Check a shard's SHA-256 and values against the manifest, once for each content and manifest on this node.

    A shard that passed before is not read again here: the sums of its record batches that were recorded then are
    returned, and the reader compares each with the file when it first reads one of its rows. Another file with the same
    content (a copy, or one that was written anew) is compared with these sums whole, which is fast.

    Args:
        file: the shard.
        info: its entry in the manifest.
        manifest: the manifest of the dataset.
        remember: use and record sums in the user's cache folder, and trust the SHA-256 of a file that was verified when
            it was copied here just now.

    Raises:
        DatasetError: if the file was altered, or has an invalid value.
    """
    memory = cache_folder() / "sums" / f"{info.sha256}-{manifest.fingerprint[:16]}.npy"
    known = _read_sums(memory, info) if remember else None
    if known is not None:
        marker = memory.with_suffix(f".{_identity(file.path)}")
        if not marker.exists():
            shard = file.map()
            check_sums(shard, known, range(shard.num_groups))
            _touch(marker)
        return known
    found = info.sha256 if remember and file.is_verified else sha256_of(file.path)
    if found != info.sha256:
        raise DatasetError(
            f"Checksum mismatch in {file.where}: expected SHA-256 {info.sha256[:12]}..., got {found[:12]}.... The "
            f"shard was damaged or altered: copy it again, or prepare the dataset again."
        )
    shard = file.map()
    modalities = manifest.modalities.items()
    check_values(
        shard,
        {name: m.classes for name, m in modalities},
        {name: m.likelihood for name, m in modalities},
        info.observed_cells,
    )
    for name, count in info.observed.items():
        seen = sum(int(shard.present(name, rows).sum()) for rows in row_blocks(shard))
        if seen != count:
            raise DatasetError(
                f"Wrong count in the manifest: it says {count} rows of {file.where} have modality {name!r}, but {seen} "
                f"do. Compute the manifest from the shards with dmvae.data.preparation.build_manifest."
            )
    for name, count in info.observed_cells.items():
        if (seen := count_cells(shard, name)) != count:
            raise DatasetError(
                f"Wrong count in the manifest: it says {count} cells of modality {name!r} are observed in "
                f"{file.where}, but {seen} are. Compute the manifest from the shards with "
                f"dmvae.data.preparation.build_manifest."
            )
    sums = shard.word_sums(0, shard.num_groups)
    if remember:
        _write_sums(memory, sums)
        _touch(memory.with_suffix(f".{_identity(file.path)}"))
    return sums


def _identity(path: Path) -> str:
    """Return what tells a file from another one, or from the same one after it was written anew."""
    state = path.stat()
    return sha256(f"{path.resolve()} {state.st_ino} {state.st_size} {state.st_mtime_ns}".encode()).hexdigest()[:16]


def _touch(marker: Path) -> None:
    with suppress(OSError):  # in a read-only folder the file is compared again
        marker.touch()


def check_sums(shard: MappedShard, expected: Sums, groups: Sequence[int]) -> None:
    """Compare record batches with the sums that `verify_shard` returned.

    Raises:
        DatasetError: naming the first record batch that differs.
    """
    for group in groups:
        if group >= len(expected) or shard.word_sums(group, group + 1)[0] != expected[group]:
            first = group * shard.record_batch_rows
            last = min(first + shard.record_batch_rows, shard.rows) - 1
            raise DatasetError(
                f"Checksum mismatch in {shard.where}, record batch {group} (rows {first} to {last}): the shard has "
                f"changed since it was verified. Copy the shard again, or prepare the dataset again."
            )


def _read_sums(memory: Path, info: ShardInfo) -> Sums | None:
    try:
        sums = np.load(memory, allow_pickle=False)
    except (OSError, ValueError, EOFError):
        return None
    is_whole = isinstance(sums, np.ndarray) and sums.dtype == np.uint64
    return sums if is_whole and sums.shape == (max(1, -(-info.rows // info.record_batch_rows)),) else None


def _write_sums(memory: Path, sums: Sums) -> None:
    """Record sums; in a read-only folder they are lost, and the shard is verified again in full."""
    part = memory.with_name(f".{memory.name}.{os.getpid()}")
    try:
        memory.parent.mkdir(parents=True, exist_ok=True)
        with part.open("wb") as file:
            np.save(file, sums, allow_pickle=False)
        part.replace(memory)
    except OSError:
        with suppress(OSError):
            part.unlink(missing_ok=True)
