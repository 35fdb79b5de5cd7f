"""A dataset as a table for a person: what it holds, what may be wrong with it, and a run to begin with."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import tomli_w

from dmvae.config.inspect import InspectConfig
from dmvae.config.training import TrainConfig
from dmvae.data.errors import DatasetError
from dmvae.data.format.manifest import ModalityInfo
from dmvae.data.inspection.findings import Finding, find
from dmvae.data.inspection.profile import Census, Tally, take_census
from dmvae.data.inspection.suggestions import LikelihoodSuggestion, propose_likelihoods, propose_run
from dmvae.data.reading.dataset import open_dataset

_TOP = 12  # patterns and labels in the table
_DRAWN = 20  # patterns in the plot
_FEW = 6  # modalities that a pattern is told by their names of


@dataclass(frozen=True)
class Inspection:
    """What was found.

    Attributes:
        lines: the table.
        findings: the worst first.
        run: what `train.toml` says; None where something is wrong that training refuses.
    """

    lines: tuple[str, ...]
    findings: tuple[Finding, ...]
    run: str | None

    def count(self, level: str) -> int:
        """Return the number of findings of a level."""
        return sum(finding.level == level for finding in self.findings)


def inspect(config: InspectConfig, progress: Callable[[str], None]) -> Inspection:
    """Read a dataset once and say what it holds; write `train.toml` and `missingness.png` if a folder is named.

    A `train.toml` that is there already stays as it is.

    Raises:
        DatasetError: if it is no dataset, a shard cannot be read, or the folder cannot be written.
        ImportError: if a picture is asked for and there is no matplotlib.
    """
    dataset = open_dataset(config.dataset)
    folder = None if config.output is None else _make_folder(config.output)
    if not any(split.rows for split in dataset.manifest.splits.values()):
        raise DatasetError(f"{config.dataset}: a dataset has rows; got none in any split. Prepare it again.")
    faults = []
    if config.verify:
        progress("checking every shard against the manifest")
        try:
            dataset.verify()
        except DatasetError as error:
            faults.append(Finding("wrong", str(error)))
    census = take_census(dataset, progress)
    findings = [*faults, *find(census)]
    fits = propose_likelihoods(census)
    lines = [
        *_head(census, config.dataset), "", *_modalities(census), "", *_patterns(census), "", *_labels(census),
        "likelihoods that would fit",
        *(f"  {name:<{_width(fits)}}  {fit.likelihood:<12} {fit.reason}" for name, fit in fits.items()),
    ]  # fmt: skip
    try:
        run = _toml(propose_run(census, config.dataset, fits), fits, config.dataset)
    except ValueError as error:
        run = None
        if not any(finding.level == "wrong" for finding in findings):
            raise AssertionError("what cannot be trained is found to be wrong") from error
    if folder is not None:
        _write(folder, census, run, progress)
    return Inspection(tuple(lines), tuple(findings), run)


def _make_folder(output: str) -> Path:
    folder = Path(output)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / ".inspect").touch()
        (folder / ".inspect").unlink()
    except OSError as error:
        raise DatasetError(f"output: a folder that can be written; got {output!r}: {error.strerror}.") from error
    return folder


def _head(census: Census, where: str) -> Iterator[str]:
    manifest = census.dataset.manifest
    shards = [shard for split in manifest.splits.values() for shard in split.shards]
    rows = sum(shard.rows for shard in shards)
    yield (
        f"{where}: {rows:,} rows, {_bytes(sum(shard.bytes for shard in shards))} in {len(shards)} shards; "
        f"ids {manifest.id_type}, {'labels' if manifest.has_label else 'no labels'}"
    )
    yield f"fingerprint {manifest.fingerprint[:16]}"
    yield ""
    table = [["split", "rows", "shards", "on disk", "complete rows"]]
    for name, split in manifest.splits.items():
        held = census.splits.get(name)
        complete = sum(count for kind, count in held.patterns.counts.items() if all(kind)) if held else 0
        size = _bytes(sum(shard.bytes for shard in split.shards))
        table.append([name, f"{split.rows:,}", f"{len(split.shards)}", size, _share(complete, split.rows)])
    yield from _columns(table)


def _modalities(census: Census) -> Iterator[str]:
    splits = census.dataset.manifest.splits
    table = [["modality", "shape", "stored", "read as", "range", "mean", "std", "zeros", *(f"in {s}" for s in splits)]]
    for name, info in census.dataset.manifest.modalities.items():
        values = census.values(name)
        figures = ["-"] * 4
        if values is not None and values.rows:
            mean, std = values.overall
            ends = f"{values.low.min():.4g} .. {values.high.max():.4g}"
            zeros = values.zeros / (values.rows * len(values.low))
            figures = [ends, f"{mean:.4g}", f"{std:.4g}", f"{zeros:.1%}"]
            if info.classes is not None:
                figures[1:3] = "-", "-"
        have = [_share(split.observed.get(name, 0), split.rows) for split in splits.values()]
        table.append([name, "x".join(map(str, info.shape)), info.dtype, _read_as(info), *figures, *have])
    yield from _columns(table)


def _read_as(info: ModalityInfo) -> str:
    if info.classes is not None:
        return f"{info.classes} classes"
    if info.dtype == "uint8":
        return "x / 255"
    names = {"none": "it is", "unit": "[0, 1]", "standardise": "(x-mean)/std", "log1p": "log(1 + x)"}
    return names[info.scaling]


def _patterns(census: Census) -> Iterator[str]:
    names = list(census.dataset.manifest.modalities)
    top, others = _most_common(sum((split.patterns for split in census.splits.values()), Tally()), _TOP)
    few = len(names) <= _FEW
    order = "" if few else " (# has it, . lacks it, in the order of the table above)"
    table = [[f"rows that have exactly{order}", *census.splits]]
    for kind, _ in top:
        told = " + ".join(name for name, here in zip(names, kind, strict=True) if here) or "nothing"
        marks = "".join(".#"[here] for here in kind)
        counts = [split.patterns.counts[kind] for split in census.splits.values()]
        table.append([told if few else marks, *(f"{count:,}" for count in counts)])
    if others:
        rest = [split.rows - sum(split.patterns.counts[kind] for kind, _ in top) for split in census.splits.values()]
        kinds = len({kind for split in census.splits.values() for kind in split.patterns.counts}) - len(top)
        table.append([f"{kinds:,} other combinations", *(f"{count:,}" for count in rest)])
    yield from _columns(table)


def _most_common(tally: Tally, num: int) -> tuple[list[tuple[tuple[bool, ...], int]], int]:
    top = tally.counts.most_common(num)
    return top, tally.counts.total() + tally.others - sum(count for _, count in top)


def _labels(census: Census) -> Iterator[str]:
    if not census.dataset.manifest.has_label:
        return
    splits = census.splits.values()
    both = sum((split.labels for split in splits), Tally())
    shown = sorted(label for label, _ in both.counts.most_common(_TOP))
    table = [["label", *census.splits]]
    table += [[f"{label}", *(f"{split.labels.counts[label]:,}" for split in splits)] for label in shown]
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
    """Lay out a table: the first column to the left, numbers to the right."""
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
    """Write a run as TOML, with the reasons for its likelihoods."""
    head = [f"# A first run on {dataset}, proposed by jobs.inspect.", "#"]
    head += [f"# {name}: {fit.likelihood}; {fit.reason}." for name, fit in fits.items()]
    for name, network in run.model.architectures.items():
        if network.name == "conv":
            head.append(
                f"# Without a GPU, remove model.architectures.{name}: a perceptron takes a twentieth of the time."
            )
    if run.data.val_split == run.data.train_split:
        head.append("# There are no rows but those trained on, so its figures say nothing of other rows.")
    return "\n".join([*head, "", tomli_w.dumps(run.model_dump(mode="json", exclude_unset=True))])


def _write(folder: Path, census: Census, run: str | None, progress: Callable[[str], None]) -> None:
    from dmvae.report.charts import missing_patterns

    file, picture_file = folder / "train.toml", folder / "missingness.png"
    manifest, train = census.dataset.manifest, census.splits[census.train]
    top, _ = _most_common(train.patterns, _DRAWN)
    observed = [train.values[name].rows / train.rows if name in train.values else 0.0 for name in manifest.modalities]
    picture = missing_patterns(list(manifest.modalities), observed, top, train.rows)
    picture.figure.savefig(picture_file, dpi=110)
    progress(f"drawn     {picture_file}")
    if run is None:
        return
    if file.exists() and file.read_text() != run:
        progress(f"kept      {file}, which differs from what is proposed now")
    else:
        file.write_text(run)
        progress(f"written   {file}")
