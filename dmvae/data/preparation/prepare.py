"""Prepare a dataset: read and check a source, split and shuffle its rows, and write shards, in bounded memory."""

import tempfile
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from dmvae.config.data import PrepareConfig
from dmvae.data.format.manifest import ColumnInfo, save_manifest
from dmvae.data.preparation.build_manifest import build_manifest
from dmvae.data.preparation.object_rows import ObjectRows
from dmvae.data.preparation.read_source import read_source
from dmvae.data.preparation.scan import Scan
from dmvae.data.preparation.sources.arrow_columns import shown
from dmvae.data.preparation.stream import Stream
from dmvae.data.preparation.texts import PAD
from dmvae.data.preparation.writer import SplitWriter, check_target, new_dataset
from dmvae.data.progress import Progress
from dmvae.data.storage.location import LocalDataset, check_free, locate, upload

Array = np.ndarray[Any, np.dtype[Any]]


def prepare(config: PrepareConfig, progress: Callable[[str], None] = print, rows: ObjectRows | None = None) -> Path:
    """Write the dataset that `config` describes, and return its folder.

    The same configuration and rows give the same bytes. The source is read once; a few numbers of each row stay in
    memory. Meanwhile the rows take up twice their size on disk.

    Args:
        config: the source, and how to prepare it.
        progress: called with each line of progress.
        rows: of the source, if they are in memory already.

    Raises:
        DatasetError: if the folder exists, the source is absent or invalid, or the disk is full.
    """
    target = Path(config.dataset)
    check_target(target, config.replace)
    progress(f"reading the {config.reads.kind} source")
    with new_dataset(target, config.replace) as part:
        scratch = part / ".scratch"
        scratch.mkdir()
        stream = read_source(config.reads, config.seed, scratch) if rows is None else rows.stream
        for note in stream.notes:
            progress(note)
        scan = Scan(config, stream, scratch / "rows", progress)
        for remark in stream.remarks:
            progress(remark)
        names = stream.labels.names
        columns = _describe_tables(scan, stream)
        vocabularies = _describe_texts(scan, stream)
        for name, classes in vocabularies.items():
            progress(f"{name}: {len(classes)} classes of {stream.texts[name].num_words} words, from training rows")
        for name, table in columns.items():
            progress(f"{name}: {_summary(stream.features[name], table)}")
        if names:
            progress(f"labels: {', '.join(f'{number} = {name}' for number, name in enumerate(names))}")
        _write(scan, stream, part, config.shard_megabytes << 20, progress)
        scan.shuffle.remove()
        scratch.rmdir()
        progress("checking the shards")
        origin = config.model_dump(mode="json", exclude={"dataset", "replace"})
        if stream.notes or stream.remarks:
            origin["notes"] = [*stream.notes, *stream.remarks]
        features = {n: f for n, f in stream.features.items() if len(scan.columns.modalities[n].shape) == 1}
        manifest = build_manifest(
            part,
            scaling=config.scaling,
            likelihood=config.likelihood,
            features=features,
            units={name: found for name, found in stream.units.items() if name in features},
            columns=columns,
            vocabularies=vocabularies,
            pads={**stream.pads, **dict.fromkeys(stream.texts, PAD)},
            label_names=names,
            origin=origin,
        )
        save_manifest(manifest, part)
    progress(f"wrote {target}")
    return target


def prepare_and_upload(config: PrepareConfig, progress: Callable[[str], None] = print) -> str:
    """Write the dataset to the folder or URI that `config` names, and return that.

    For an object store, the dataset is written to a temporary folder and then uploaded, the manifest last.

    Raises:
        DatasetError: see `prepare`; or if the upload fails.
    """
    location = locate(config.dataset)
    if isinstance(location, LocalDataset):
        return str(prepare(config.model_copy(update={"dataset": str(location.folder)}), progress))
    check_free(config.dataset, config.replace)
    with tempfile.TemporaryDirectory(prefix="dmvae-") as scratch:
        folder = prepare(config.model_copy(update={"dataset": f"{scratch}/dataset"}), progress)
        upload(folder, config.dataset, config.replace)
    progress(f"wrote {config.dataset}")
    return config.dataset


def _write(scan: Scan, stream: Stream, folder: Path, shard_bytes: int, progress: Callable[[str], None]) -> None:
    """Write the rows to the folders of their splits, in shuffled order."""
    labels = stream.labels.final
    observed = {split: dict.fromkeys(scan.columns.modalities, 0) for split in scan.names}
    written, done = Progress(progress, "wrote", len(scan.codes)), 0
    with ExitStack() as stack:
        writers = [stack.enter_context(SplitWriter(folder / split, scan.columns, shard_bytes)) for split in scan.names]
        for rows, numbers in scan.shuffle.sorted():
            scan.check_unique(rows, numbers)
            codes = scan.codes[numbers]
            if len(labels) and rows.labels is not None:
                rows = replace(rows, labels=np.append(labels, -1)[rows.labels])
            recoded = {name: table.recode(rows.data[name]) for name, table in stream.tables.items()}
            recoded |= {name: text.recode(rows.data[name]) for name, text in stream.texts.items()}
            rows = replace(rows, data={**rows.data, **recoded})
            for code, (split, writer) in enumerate(zip(scan.names, writers, strict=True)):
                chosen = rows.take(codes == code)
                writer.write(chosen)
                for name, mask in chosen.present.items():
                    observed[split][name] += int(mask.sum())
            done += len(rows)
            written.update(done)
    for code, (split, counts) in enumerate(observed.items()):
        num = int((scan.codes == code).sum())
        shares = ", ".join(f"{name} in {count / max(num, 1):.1%}" for name, count in counts.items())
        progress(f"{split}: {num} rows, {shares if num else 'empty'}")


def _describe_tables(scan: Scan, stream: Stream) -> dict[str, tuple[ColumnInfo, ...]]:
    """Return the columns of tables; classes are those of training rows (of all rows, if there is no split 'train')."""
    trained: dict[str, list[Array]] = {
        name: [np.zeros(0) for _ in table.columns] for name, table in stream.tables.items()
    }
    wanted = {
        name: [place for place, column in enumerate(table.columns) if column.may_have_classes]
        for name, table in stream.tables.items()
    }
    for rows, numbers in scan.shuffle.sorted(keep=True) if any(wanted.values()) else ():
        chosen = scan.codes[numbers] == scan.names.index("train") if "train" in scan.names else scan.codes[numbers] >= 0
        for name, places in wanted.items():
            values = rows.data[name][chosen & rows.present[name]]
            for place in places:
                known = values[~np.isnan(values[:, place]), place]
                trained[name][place] = np.union1d(trained[name][place], known)
    return {name: table.describe(trained[name]) for name, table in stream.tables.items()}


def _describe_texts(scan: Scan, stream: Stream) -> dict[str, tuple[str, ...]]:
    """Return the names of the classes of texts, from training rows (all rows, if there is no split 'train')."""
    counts = {name: np.zeros(text.num_words + 1, np.int64) for name, text in stream.texts.items()}
    train = scan.names.index("train") if "train" in scan.names else None
    for rows, numbers in scan.shuffle.sorted(keep=True) if any(t.num_words for t in stream.texts.values()) else ():
        chosen = scan.codes[numbers] >= 0 if train is None else scan.codes[numbers] == train
        for name, count in counts.items():
            values = rows.data[name][chosen & rows.present[name]]
            if stream.texts[name].num_words:
                count += np.bincount(values.reshape(-1), minlength=len(count))
    return {name: text.describe(counts[name]) for name, text in stream.texts.items()}


def _summary(features: Sequence[str], columns: Sequence[ColumnInfo]) -> str:
    """Return the columns of a table by kind, for the user."""
    kinds = dict.fromkeys(column.kind for column in columns)
    of = {kind: [f for f, column in zip(features, columns, strict=True) if column.kind == kind] for kind in kinds}
    return "; ".join(f"{len(found)} {kind} ({shown(found)})" for kind, found in of.items())
