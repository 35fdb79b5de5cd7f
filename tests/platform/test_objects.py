"""Every job with its dataset in an object store: acceptance only.

Reading shards from a store is tested in `tests/data/storage`, a run that lies there in `train/test_object_store.py`.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import tomli_w

from tests.objects import object_store
from tests.runs import make_config

pytestmark = [pytest.mark.usefixtures("cluster"), pytest.mark.acceptance, pytest.mark.timeout(1800)]

URI = "s3://bucket/sets/pairs"


def test_prepare_train_evaluate_embed_and_report_take_a_uri(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    cause = rng.normal(size=(600, 2))
    mixed = {name: cause @ rng.normal(size=(2, dim)) for name, dim in (("left", 5), ("right", 3))}
    views = {name: (x + 0.3 * rng.normal(size=x.shape)).astype(np.float32) for name, x in mixed.items()}
    np.savez(tmp_path / "rows.npz", id=np.arange(600), label=rng.integers(0, 2, 600), **views)
    prepared = {"dataset": URI, "shard_megabytes": 1, "source": {"kind": "npz", "path": str(tmp_path / "rows.npz")}}
    (tmp_path / "prepare.toml").write_text(tomli_w.dumps(prepared))
    trained = make_config(tmp_path, URI, workers={"num": 2}).model_dump(mode="json", exclude_unset=True)
    (tmp_path / "train.toml").write_text(tomli_w.dumps(trained))
    best = str(tmp_path / "runs/run/best")
    with object_store() as (wire, environment):

        def job(*words: str) -> None:
            own = {**os.environ, **environment, "DMVAE_CACHE": str(tmp_path / "cache"), "PYTHONPATH": str(Path.cwd())}
            subprocess.run([sys.executable, "-m", *words], env=own, check=True)

        job("jobs.prepare", str(tmp_path / "prepare.toml"))
        job("jobs.inspect", "--dataset", URI)
        job("jobs.train", str(tmp_path / "train.toml"))
        job("jobs.evaluate", "--model", best, "--dataset", URI, "--workers", "2", "--evaluation.num-draws", "20")
        job("jobs.embed", "--model", best, "--dataset", URI, "--output", str(tmp_path / "latents"))
        job("jobs.report", "--model", best, "--dataset", URI, "--num-draws", "20")
        assert set(wire.shards_asked().values()) == {1}, "a node fetches a shard once, whichever jobs read it"
    assert json.loads((tmp_path / "runs/run/run.json").read_text())["data"]["dataset"] == URI
    assert sum(pq.read_metadata(file).num_rows for file in (tmp_path / "latents").rglob("*.parquet")) == 600
