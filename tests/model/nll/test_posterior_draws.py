"""Draws from rows' posteriors against the closed form, for any pattern of missing cells."""

import torch

from dmvae import Batch
from tests.linear_gaussian import exact_conditional, linear_model, observed_cells, sample_rows

SHAPES = {"a": (4,), "b": (2, 2)}
DRAWS = 2000


def test_predicted_cells_have_the_exact_conditional_mean_and_spread() -> None:
    model = linear_model(SHAPES, missing_cells=("a", "b"), scales=0.5)
    batch = sample_rows(model, 25, missing=0.2, missing_cells=0.4)
    mean, deviation = exact_conditional(model, batch)
    missing = ~observed_cells(batch, list(SHAPES))
    output = model.decode(model.draw_posterior(batch, DRAWS, seed=1))
    generator = torch.Generator().manual_seed(0)
    values = torch.cat([model.draw_values(output[name], name, batch, generator).flatten(2) for name in SHAPES], dim=2)
    error = ((values.mean(0) - mean) / deviation)[missing]
    assert float(error.abs().max()) < 6 / DRAWS**0.5
    spread = (values.std(0) / deviation)[missing]
    assert float((spread - 1).abs().max()) < 0.1


def test_a_row_s_draws_depend_on_its_id_and_the_seed_alone() -> None:
    model = linear_model(SHAPES, missing_cells=("a", "b"))
    rows = sample_rows(model, 12, missing=0.3, missing_cells=0.3)
    batch = Batch(rows.data, rows.masks, ids=torch.arange(12), cells=rows.cells)
    whole, part = (model.draw_posterior(some, 50, seed=3) for some in (batch, batch[torch.tensor([7, 2])]))
    for latents, few in ((whole.z, part.z), *((whole.modalities_z[n], part.modalities_z[n]) for n in SHAPES)):
        torch.testing.assert_close(latents[:, [7, 2]], few, rtol=1e-6, atol=1e-6)
    assert not torch.equal(model.draw_posterior(batch, 50, seed=4).z, whole.z)
