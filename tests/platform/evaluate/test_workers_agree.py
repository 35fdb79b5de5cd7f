"""Per-row results do not depend on how many workers compute them, nor on the chunk."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from dmvae import DMVAE, DMVAEConfig
from dmvae.config.evaluation import EvaluationConfig
from dmvae.evaluation.masking import Removal
from dmvae.platform.evaluate.nll_table import Evaluator, Task, evaluate_nll
from dmvae.platform.evaluate.row_store import BLOCK_ROWS

pytestmark = pytest.mark.usefixtures("cluster")


def test_rows_have_the_same_bits_for_one_two_and_three_workers(dataset: Path, tmp_path: Path) -> None:
    torch.manual_seed(0)
    wide = {name: {"hidden_dims": (96,)} for name in ("left", "right")}
    config = DMVAEConfig(
        input_dims={"left": (5,), "right": (3,)}, latent_dim=2, modalities_specific_dim=1, architectures=wide
    )
    DMVAE(config).save(tmp_path)
    estimate = EvaluationConfig(split="train", num_draws=300, each_modality=True)
    task = Task(str(tmp_path), str(dataset), estimate, "cpu", Removal(("random",), (0.5,), 0))
    alone = evaluate_nll(task).columns
    assert {"conditional/left", "marginal_se/right", "missing/random/50/conditional/left"} <= alone.keys()
    for workers in (2, 3):
        together = evaluate_nll(task, workers).columns
        assert together.keys() == alone.keys()
        for name, column in alone.items():
            np.testing.assert_array_equal(column, together[name], err_msg=name)
    _, chunked = Evaluator(replace(task, config=estimate.model_copy(update={"chunk": 37}))).estimate(0)
    for name, column in chunked.items():
        if name == "nll" or name.startswith(("marginal", "conditional", "missing")):
            np.testing.assert_allclose(column, alone[name][:BLOCK_ROWS], rtol=0, atol=1e-4, err_msg=name)
