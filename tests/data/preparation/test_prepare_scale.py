"""Preparing takes memory that does not grow with the source."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from dmvae.data.format.manifest import load_manifest

SIZES = (20, 30, 40, 50, 60, 80)
MEASURED = """
import resource, sys
from dmvae.config.data import PrepareConfig
from dmvae.config.sources import ParquetSource
from dmvae.data.preparation.prepare import prepare

scaling = {f"view{number}": "standardise" for number in range(6)}
prepare(PrepareConfig(dataset=sys.argv[2], source=ParquetSource(path=sys.argv[1]), scaling=scaling))
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
"""


def write_views(path: Path, num_rows: int, step: int = 50_000) -> None:
    """Six views of 280 floats together, each but the first missing in 3 rows of 10."""
    draw = np.random.default_rng(0)
    writer = None
    for start in range(0, num_rows, step):
        num = min(step, num_rows - start)
        columns = {"id": pa.array(np.arange(start, start + num)), "label": pa.array(draw.integers(0, 10, num))}
        for view, size in enumerate(SIZES):
            values = draw.standard_normal((num, size), dtype=np.float32)
            missing = pa.array(draw.random(num) < 0.3 if view else np.zeros(num, dtype=bool))
            lists = pa.FixedSizeListArray.from_arrays(pa.array(values.reshape(-1)), size, mask=missing)
            columns[f"view{view}"] = lists.cast(pa.list_(pa.float32()))
        table = pa.table(columns)
        writer = writer or pq.ParquetWriter(path, table.schema)
        writer.write_table(table)
    assert writer is not None
    writer.close()


@pytest.mark.acceptance
def test_a_million_rows_of_six_views_are_prepared_in_less_than_a_gigabyte(tmp_path: Path) -> None:
    write_views(tmp_path / "views.parquet", 1_000_000)
    command = [sys.executable, "-c", MEASURED, str(tmp_path / "views.parquet"), str(tmp_path / "data")]
    lines = subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()
    manifest = load_manifest(tmp_path / "data")
    assert {name: split.rows for name, split in manifest.splits.items()} == {
        "train": 800_000,
        "val": 100_000,
        "test": 100_000,
    }
    assert sum(shard.bytes for split in manifest.splits.values() for shard in split.shards) > 1_100_000_000
    assert any(line.startswith("read ") and line.endswith(" left") for line in lines)
    assert int(lines[-1]) < 1_000_000, f"{lines[-1]} KiB"
