"""Print an overview of a dataset: what it holds, what may be wrong with it, and settings for a first run."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import tomli_w

from dmvae.config.inspect import InspectConfig
from dmvae.config.training import TrainConfig
from dmvae.data.errors import DatasetError
from dmvae.data.format.manifest import ModalityInfo
from dmvae.data.inspection.findings import Finding, list_findings
from dmvae.data.inspection.profile import CappedCounter, DatasetProfile, profile_dataset
from dmvae.data.inspection.suggestions import LikelihoodSuggestion, suggest_likelihoods, suggest_run
from dmvae.data.reading.dataset import open_dataset

_TOP = 12  # patterns and labels in the table
_DRAWN = 20  # patterns in the plot
_FEW = 6  # with at most this many modalities, patterns are written by name


@dataclass(frozen=True)
class Inspection:
    """The result of an inspection.

    Attributes:
        lines: the overview.
        findings: the most serious first.
        run: the content of `train.toml`; None if the dataset cannot be trained on.
    """

    lines: tuple[str, ...]
    findings: tuple[Finding, ...]
    run: str | None

    def count(self, level: str) -> int:
        """Return the number of findings with this level."""
        return sum(finding.level == level for finding in self.findings)


def inspect(config: InspectConfig, progress: Callable[[str], None]) -> Inspection:
    """Read a dataset once and report on it; write `train.toml` and `missingness.png` if `config` names a folder.

    An existing `train.toml` is not overwritten.

    Raises:
        DatasetError: if it is not a dataset, a shard cannot be read, or the folder cannot be written.
        ImportError: if a picture is to be drawn and matplotlib is not installed.
    """
    dataset = open_dataset(config.dataset)
    folder = None if config.output is None else _make_folder(config.output)
    if not any(split.rows for split in dataset.manifest.splits.values()):
        raise DatasetError(f"Dataset {config.dataset} has no rows in any split. Prepare it again.")
    faults = []
    if config.verify:
        progress("checking every shard against the manifest")
        try:
            dataset.verify()
        except DatasetError as error:
            faults.append(Finding("error", str(error)))
    profile = profile_dataset(dataset, progress)
    findings = [*faults, *list_findings(profile)]
    fits = suggest_likelihoods(profile)
    lines = [
        *_head(profile, config.dataset), "", *_modalities(profile), "", *_tables(profile),
        *_patterns(profile), "", *_labels(profile),
        "suggested likelihoods",
        *(f"  {name:<{_width(fits)}}  {fit.likelihood:<12} {fit.reason}" for name, fit in fits.items()),
    ]  # fmt: skip
    try:
        run = _toml(suggest_run(profile, config.dataset, fits), fits, config.dataset)
    except ValueError as error:
        run = None
        if not any(finding.level == "error" for finding in findings):
            raise AssertionError("a dataset that cannot be trained on must have a finding") from error
    if folder is not None:
        _write(folder, profile, run, progress)
    return Inspection(tuple(lines), tuple(findings), run)


def _make_folder(output: str) -> Path:
    folder = Path(output)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / ".inspect").touch()
        (folder / ".inspect").unlink()
    except OSError as error:
        raise DatasetError(f"Cannot write to {output}: {error.strerror}. Choose another folder for output.") from error
    return folder


def _head(profile: DatasetProfile, where: str) -> Iterator[str]:
    manifest = profile.dataset.manifest
    shards = [shard for split in manifest.splits.values() for shard in split.shards]
    rows = sum(shard.rows for shard in shards)
    yield (
        f"{where}: {rows:,} rows, {_bytes(sum(shard.bytes for shard in shards))} in {len(shards)} shards, "
        f"{manifest.id_type} ids, {'labels' if manifest.has_label else 'no labels'}"
    )
    yield f"fingerprint {manifest.fingerprint[:16]}"
    yield ""
    table = [["split", "rows", "shards", "on disk", "complete rows"]]
    for name, split in manifest.splits.items():
        held = profile.splits.get(name)
        complete = sum(count for kind, count in held.patterns.counts.items() if all(kind)) if held else 0
        size = _bytes(sum(shard.bytes for shard in split.shards))
        table.append([name, f"{split.rows:,}", f"{len(split.shards)}", size, _share(complete, split.rows)])
    yield from _columns(table)


def _modalities(profile: DatasetProfile) -> Iterator[str]:
    splits = profile.dataset.manifest.splits
    table = [
        ["modality", "shape", "stored as", "read as", "range", "mean", "std", "zeros", *(f"in {s}" for s in splits)]
    ]
    for name, info in profile.dataset.manifest.modalities.items():
        values = profile.values(name)
        statistics = ["-"] * 4
        if values is not None and values.rows:
            mean, std = values.overall
            ends = f"{values.low.min():.4g} .. {values.high.max():.4g}"
            zeros = values.zeros / (values.rows * len(values.low))
            statistics = [ends, f"{mean:.4g}", f"{std:.4g}", f"{zeros:.1%}"]
            if info.classes is not None:
                statistics[1:3] = "-", "-"
        observed = [_share(split.observed.get(name, 0), split.rows) for split in splits.values()]
        table.append([name, "x".join(map(str, info.shape)), info.dtype, _read_as(info), *statistics, *observed])
    yield from _columns(table)


def _tables(profile: DatasetProfile) -> Iterator[str]:
    for name, info in profile.dataset.manifest.modalities.items():
        if info.columns is None or info.features is None:
            continue
        table = [[f"column of {name}", "kind", "why", "classes"]]
        for feature, column in zip(info.features, info.columns, strict=True):
            unit = (info.units or {}).get(feature)
            shown = ", ".join(column.classes[:_FEW]) + (", ..." if len(column.classes) > _FEW else "")
            table.append([f"{feature} ({unit})" if unit else feature, column.kind, column.reason, shown])
        yield from _columns(table)
        yield ""


def _read_as(info: ModalityInfo) -> str:
    if info.classes is not None:
        return f"{info.classes} classes"
    if info.dtype == "uint8":
        return "x / 255"
    names = {
        "none": "stored",
        "unit": "[0, 1]",
        "standardise": "(x-mean)/std",
        "log1p": "log(1 + x)",
        "columns": "by kind",
    }
    return names[info.scaling]


def _patterns(profile: DatasetProfile) -> Iterator[str]:
    names = list(profile.dataset.manifest.modalities)
    top, others = _most_common(sum((split.patterns for split in profile.splits.values()), CappedCounter()), _TOP)
    few = len(names) <= _FEW
    order = "" if few else " (# observed, . missing, in the order of the table above)"
    table = [[f"observed modalities{order}", *profile.splits]]
    for kind, _ in top:
        written = " + ".join(name for name, here in zip(names, kind, strict=True) if here) or "none"
        marks = "".join(".#"[here] for here in kind)
        counts = [split.patterns.counts[kind] for split in profile.splits.values()]
        table.append([written if few else marks, *(f"{count:,}" for count in counts)])
    if others:
        rest = [split.rows - sum(split.patterns.counts[kind] for kind, _ in top) for split in profile.splits.values()]
        kinds = len({kind for split in profile.splits.values() for kind in split.patterns.counts}) - len(top)
        table.append([f"{kinds:,} other combinations", *(f"{count:,}" for count in rest)])
    yield from _columns(table)


def _most_common(tally: CappedCounter, num: int) -> tuple[list[tuple[tuple[bool, ...], int]], int]:
    top = tally.counts.most_common(num)
    return top, tally.counts.total() + tally.others - sum(count for _, count in top)


def _labels(profile: DatasetProfile) -> Iterator[str]:
    if not profile.dataset.manifest.has_label:
        return
    splits = profile.splits.values()
    both = sum((split.labels for split in splits), CappedCounter())
    shown = sorted(label for label, _ in both.counts.most_common(_TOP))
    table = [["label", *profile.splits]]
    name_of = profile.dataset.manifest.label_name
    table += [[name_of(label), *(f"{split.labels.counts[label]:,}" for split in splits)] for label in shown]
    labelled = [split.labels.counts.total() + split.labels.others for split in splits]
    if len(both.counts) > len(shown):
        rest = [
            count - sum(split.labels.counts[label] for label in shown)
            for count, split in zip(labelled, splits, strict=True)
        ]
        table.append([f"{len(both.counts) - len(shown):,} others", *(f"{count:,}" for count in rest)])
    without = [_share(split.rows - count, split.rows) for count, split in zip(labelled, splits, strict=True)]
    yield from _columns([*table, ["no label", *without]])
    yield ""


def _columns(table: Sequence[Sequence[str]]) -> Iterator[str]:
    """Lay out a table: the first column aligned left, the others right."""
    widths = [max(len(row[column]) for row in table) for column in range(len(table[0]))]
    for first, *rest in table:
        cells = (f"{cell:>{width}}" for cell, width in zip(rest, widths[1:], strict=True))
        yield f"  {first:<{widths[0]}}  {'  '.join(cells)}".rstrip()


def _width(names: dict[str, LikelihoodSuggestion]) -> int:
    return max(map(len, names))


def _share(part: int, whole: int) -> str:
    return f"{part / whole:.1%}" if whole else "-"


def _bytes(num: int) -> str:
    for unit, size in (("GB", 10**9), ("MB", 10**6), ("kB", 10**3)):
        if num >= size:
            return f"{num / size:.1f} {unit}"
    return f"{num} B"


def _toml(run: TrainConfig, fits: dict[str, LikelihoodSuggestion], dataset: str) -> str:
    """Return the settings of a run as TOML, with the reasons for its likelihoods."""
    head = [f"# A first run on {dataset}, suggested by jobs.inspect.", "#"]
    head += [f"# {name}: {fit.likelihood}; {fit.reason}." for name, fit in fits.items()]
    for name, network in run.model.architectures.items():
        if network.name == "conv":
            head.append(f"# Without a GPU, remove model.architectures.{name}: a perceptron is about 20 times as fast.")
    if run.data.val_split == run.data.train_split:
        head.append(
            "# Validation uses the training rows, for lack of others, so its metrics do not show generalisation."
        )
    return "\n".join([*head, "", tomli_w.dumps(run.model_dump(mode="json", exclude_unset=True))])


def _write(folder: Path, profile: DatasetProfile, run: str | None, progress: Callable[[str], None]) -> None:
    from dmvae.report.charts import missing_patterns

    file, picture_file = folder / "train.toml", folder / "missingness.png"
    manifest, train = profile.dataset.manifest, profile.splits[profile.train]
    top, _ = _most_common(train.patterns, _DRAWN)
    observed = [train.values[name].rows / train.rows if name in train.values else 0.0 for name in manifest.modalities]
    picture = missing_patterns(list(manifest.modalities), observed, top, train.rows)
    picture.figure.savefig(picture_file, dpi=110)
    progress(f"wrote     {picture_file}")
    if run is None:
        return
    if file.exists() and file.read_text() != run:
        progress(f"kept      {file}, which differs from the suggestion")
    else:
        file.write_text(run)
        progress(f"wrote     {file}")
