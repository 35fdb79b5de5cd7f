"""How far the epoch order mixes rows, against a full permutation: rows written sorted by label, over 20 epochs.

    python -m tests.benchmarks.order_quality [FOLDER] [--rows 500000]

writes `order_quality.json` and `order_quality.md` into FOLDER (default build/order).
"""

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from dmvae.data.reading.sampler import EpochSampler

BATCH, CLASSES, EPOCHS = 256, 100, 20

Array = np.ndarray[Any, np.dtype[Any]]


def mixing(epoch_rows: Callable[[int], Array], num: int, epochs: int, batch: int, classes: int) -> dict[str, float]:
    """Measure an order of rows that were written sorted by label.

    Args:
        epoch_rows: the rows of an epoch in their order.
        num: number of rows.
        epochs: how many are looked at.
        batch: rows of a batch.
        classes: labels, as many rows of each.

    Returns:
        labels: variance of a label's count over batches, divided by what drawing without replacement has.
        nearby: the same of 16 batches in a row taken together.
        company: pairs that share a batch in two epochs in a row, divided by what chance has.
        travel: mean distance of a row's place from that in the epoch before, as a share of the epoch. Chance: 1/3.
        range: mean range of a row's places over all epochs, as a share of the epoch. Chance: (epochs - 1)/(epochs + 1).
        correlation: of a row's places in two epochs in a row.
    """
    label = np.arange(num) * classes // num
    first, last = np.full(num, num), np.zeros(num, dtype=np.int64)
    place: Array | None = None
    sums: dict[str, list[float]] = {name: [] for name in ("labels", "nearby", "company", "travel", "correlation")}
    for epoch in range(epochs):
        rows = epoch_rows(epoch)
        now = np.empty(num, dtype=np.int64)
        now[rows] = np.arange(num)
        first, last = np.minimum(first, now), np.maximum(last, now)
        for name, size in (("labels", batch), ("nearby", 16 * batch)):
            sums[name].append(_dispersion(label[rows], size, classes))
        if place is not None:
            sums["company"].append(_company(place // batch, now // batch, batch))
            sums["travel"].append(float(np.abs(now - place).mean()) / num)
            sums["correlation"].append(float(np.corrcoef(now, place)[0, 1]))
        place = now
    found = {name: float(np.mean(values)) for name, values in sums.items()}
    found["correlation"] = float(np.abs(sums["correlation"]).max())
    return {**found, "range": float((last - first).mean()) / num}


def _dispersion(labels: Array, size: int, classes: int) -> float:
    whole = len(labels) // size
    batch = np.repeat(np.arange(whole), size)
    counts = np.bincount(batch * classes + labels[: whole * size], minlength=whole * classes).reshape(whole, classes)
    share = 1 / classes
    expected = size * share * (1 - share) * (len(labels) - size) / (len(labels) - 1)
    return float(((counts - size * share) ** 2).mean() / expected)


def _company(before: Array, now: Array, size: int) -> float:
    _, together = np.unique(before * (now.max() + 1) + now, return_counts=True)
    pairs = np.bincount(before)
    by_chance = (pairs * (pairs - 1) / 2).sum() * (size - 1) / (len(now) - 1)
    return float((together * (together - 1) / 2).sum() / by_chance)


def orders(num: int) -> dict[str, Callable[[int], Array]]:
    """Return the orders that are compared, by name."""
    found: dict[str, Callable[[int], Array]] = {
        "a full permutation": lambda epoch: np.random.default_rng(epoch).permutation(num)
    }
    for size in (256, 1024, 4096):
        groups = np.full(num // size, size)
        groups = np.append(groups, num - groups.sum()) if num % size else groups
        order = EpochSampler(groups, seed=0, batch_size=BATCH)
        found[f"record batches of {size}, sorted"] = lambda epoch, order=order: order.rows_of(
            epoch, [(step, 0, order.batch_size_of(step)) for step in range(order.num_batches)]
        )
    written = np.random.default_rng(1).permutation(num)  # what `jobs.prepare` does once
    last = found["record batches of 1024, sorted"]
    found["record batches of 1024, shuffled when written"] = lambda epoch: written[last(epoch)]
    return found


def main() -> None:
    """Measure every order and write the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", nargs="?", default="build/order", type=Path)
    parser.add_argument("--rows", default=500_000, type=int)
    arguments = parser.parse_args()
    arguments.folder.mkdir(parents=True, exist_ok=True)
    table = {
        name: mixing(rows, arguments.rows, EPOCHS, BATCH, CLASSES) for name, rows in orders(arguments.rows).items()
    }
    lines = [
        f"| {arguments.rows:,} rows, {EPOCHS} epochs, batches of {BATCH} | label counts | of 16 batches "
        "| same company | travel | range | correlation |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, found in table.items():
        figures = (found[key] for key in ("labels", "nearby", "company", "travel", "range", "correlation"))
        lines.append(f"| {name} | " + " | ".join(f"{figure:.3f}" for figure in figures) + " |")
    text = "\n".join([*lines, ""])
    (arguments.folder / "order_quality.json").write_text(json.dumps(table, indent=2))
    (arguments.folder / "order_quality.md").write_text(text)
    print(text)


if __name__ == "__main__":
    main()
