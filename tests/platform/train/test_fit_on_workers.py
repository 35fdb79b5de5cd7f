"""`dmvae.fit` with workers is the same run as in this process."""

from pathlib import Path

import numpy as np
import pytest

import dmvae
from tests.fitting.rows import SHORT, frames


@pytest.mark.usefixtures("cluster")
def test_two_workers_train_the_run_of_this_process(tmp_path: Path) -> None:
    here = dmvae.fit(frames(), **SHORT)
    there = dmvae.fit(frames(), workers=2, folder=tmp_path, **SHORT)
    for name in ("train/loss", "val/loss"):
        expected = here.history[name].dropna()
        found = there.history[name].dropna()
        assert found.index.tolist() == expected.index.tolist()
        np.testing.assert_allclose(found, expected, rtol=0, atol=1e-9)
    np.testing.assert_allclose(there.latents(frames()), here.latents(frames()), atol=1e-9)
    assert there.to_config().startswith('name = "fit"')
