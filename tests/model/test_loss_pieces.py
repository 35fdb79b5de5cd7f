"""Decoding in several calls is decoding in one."""

import pytest
import torch

from dmvae.model import loss as objective
from dmvae.model.dmvae import DMVAE
from tests.benchmarks.steps import make_batch, small_mlps


@pytest.mark.parametrize("missing", [0.0, 0.5])
def test_decoding_in_pieces_changes_no_loss_and_no_gradient(missing: float, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    model = DMVAE(small_mlps(3)).double()
    batch = make_batch(model.config, missing, rows=11)
    found = []
    for numbers in (2**30, 100):
        monkeypatch.setattr(objective, "_DECODED_NUMBERS", numbers)
        model.zero_grad()
        torch.manual_seed(1)
        output = model(batch)
        output.row_loss.sum().backward()
        found.append([output.row_loss.detach(), *(p.grad.clone() for p in model.parameters() if p.grad is not None)])
    for once, pieces in zip(*found, strict=True):
        torch.testing.assert_close(pieces, once)
