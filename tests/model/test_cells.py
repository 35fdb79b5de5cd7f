"""Missing cells: they are never read, a row without any lacks the modality, and the rest is the closed form."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from dmvae import DMVAE, Batch, DMVAEConfig
from dmvae.distributions.likelihoods import Likelihood, registry
from dmvae.evaluation.elbo import negative_elbo
from dmvae.model.loss import Noise
from dmvae.nn.networks import DecoderOutput, EncoderOutput
from tests.linear_gaussian import exact_log_prob, linear_layer, linear_model, sample_rows

SHAPES = {
    "normal": (5,),
    "laplace": (2, 3),
    "bits": (4,),
    "class": (3,),
    "counts": (4,),
    "many": (3,),
    "text": (6,),
    "table": (5,),
}
KINDS = ("real", "count", "category", "binary", "category")
LIKELIHOODS = {
    "laplace": "laplace",
    "bits": "bernoulli",
    "class": "categorical",
    "counts": "poisson",
    "many": "negative_binomial",
    "text": "categorical",
    "table": "columns",
}
ROWS = 5


def every_model(**settings: Any) -> DMVAE:
    """Return a model with every likelihood and architecture, in eval mode."""
    torch.manual_seed(0)
    config = DMVAEConfig(
        input_dims=SHAPES,
        latent_dim=3,
        decoders_dist=LIKELIHOODS,
        decoder_dist_params={
            "normal": {"scale": "learned_per_feature"},
            "laplace": {"scale": "learned_per_modality"},
            "class": {"classes": 3},
            "text": {"classes": 5, "pad": 0},
            "table": {"kinds": KINDS, "classes": (3, 3)},
        },
        architectures={
            **{name: {"hidden_dims": (7,)} for name in SHAPES},
            "laplace": {"name": "skip_mlp", "hidden_dims": (7,)},
            "text": {"name": "sequence", "hidden_dims": (6,)},
        },
        missing_cells=tuple(SHAPES),
        **settings,
    )
    return DMVAE(config).double().eval()


def every_batch(seed: int = 0, missing: float = 0.3) -> Batch:
    """Return rows with random missing cells; the second row lacks every other modality, cell by cell."""
    draw = torch.Generator().manual_seed(seed)
    data: dict[str, Tensor] = {}
    for name, shape in SHAPES.items():
        values = torch.randn(ROWS, *shape, generator=draw, dtype=torch.float64)
        if name in ("bits", "counts", "many"):
            values = values.abs().floor().clamp(max=1 if name == "bits" else 9)
        if name in ("class", "text"):
            values = torch.randint(1, 3, values.shape, generator=draw)
        data[name] = values
    data["table"][:, 1:] = torch.randint(0, 2, (ROWS, 4), generator=draw).double()
    masks = {name: torch.rand(data[name].shape, generator=draw) >= missing for name in SHAPES}
    for name in list(SHAPES)[::2]:
        masks[name][1] = False
    return Batch(data, masks, ids=torch.arange(ROWS))


def dirty(batch: Batch, garbage: float) -> Batch:
    data = {}
    for name, values in batch.data.items():
        wrong = garbage if values.is_floating_point() else 2
        data[name] = values.masked_fill(~batch.cells[name], wrong)
    return Batch(data, batch.masks, ids=batch.ids, cells=batch.cells)


def noise_of(model: DMVAE) -> Noise:
    draw = torch.Generator().manual_seed(1)
    width = Noise.width(model.config)
    return Noise.from_normals(torch.randn(ROWS, width, generator=draw, dtype=torch.float64), model.config)


def gradients(model: DMVAE, batch: Batch) -> tuple[Tensor, list[Tensor]]:
    model.zero_grad()
    output = model(batch, noise_of(model))
    output.loss.backward()
    return output.row_loss, [p.grad for p in model.parameters() if p.grad is not None]


@pytest.mark.parametrize("garbage", [math.nan, math.inf, -7.5, 1e300])
def test_garbage_in_a_missing_cell_changes_nothing(garbage: float) -> None:
    model, batch = every_model(), every_batch()
    (clean_loss, clean), (dirty_loss, spoiled) = gradients(model, batch), gradients(model, dirty(batch, garbage))
    assert bool(torch.isfinite(clean_loss).all())
    assert torch.equal(clean_loss, dirty_loss)
    assert all(torch.equal(one, other) for one, other in zip(clean, spoiled, strict=True))
    for method in (
        lambda rows: model.encode(rows, N=2, generator=torch.Generator().manual_seed(0)).z,
        lambda rows: model.joint_nll(rows, K=100, batch_size_K=50).nll,
        lambda rows: model.joint_nll(rows, K=8, proposal="encoder").nll,
        lambda rows: negative_elbo(model, rows),
        lambda rows: model.means(model.predict(rows, return_mean=True)["many"], "many", rows),
    ):
        assert torch.equal(method(batch), method(dirty(batch, garbage)))


def test_a_row_without_any_cell_of_a_modality_lacks_the_modality() -> None:
    model, batch = every_model(), every_batch()
    gone = list(SHAPES)[::2]
    assert [name for name in SHAPES if not batch.masks[name][1]] == gone
    whole = {name: mask.clone() for name, mask in batch.cells.items()}
    rows = {name: torch.ones(ROWS, dtype=torch.bool) for name in SHAPES}
    for name in gone:
        whole[name][1], rows[name][1] = True, False
    other = Batch(batch.data, rows, ids=batch.ids, cells=whole)
    assert torch.equal(model(batch, noise_of(model)).row_loss, model(other, noise_of(model)).row_loss)
    assert torch.equal(model.joint_nll(batch, K=8).nll, model.joint_nll(other, K=8).nll)


def test_images_with_missing_pixels_are_convolved_beside_their_mask() -> None:
    config = DMVAEConfig(input_dims={"image": (1, 28, 28)}, architectures={"image": {"name": "conv"}})
    with_cells = DMVAE(config.model_copy(update={"missing_cells": ("image",)}))
    values, cells = torch.rand(3, 1, 28, 28), torch.rand(3, 1, 28, 28) < 0.7
    one = with_cells.posteriors(Batch({"image": values.masked_fill(~cells, math.nan)}, {"image": cells}))[0].mean
    other = with_cells.posteriors(Batch({"image": values.masked_fill(~cells, 0)}))[0].mean
    assert torch.equal(one, with_cells.posteriors(Batch({"image": values}, {"image": cells}))[0].mean)
    assert not torch.equal(one, other)  # an observed zero is not a missing pixel


def test_masks_of_cells_that_are_all_there_are_masks_of_rows() -> None:
    model, batch = every_model(), every_batch()
    full = Batch(batch.data, {name: torch.ones_like(mask) for name, mask in batch.cells.items()}, ids=batch.ids)
    plain = Batch(batch.data, ids=batch.ids)
    assert torch.equal(model(full, noise_of(model)).row_loss, model(plain, noise_of(model)).row_loss)


def test_every_likelihood_adds_up_its_observed_cells() -> None:
    model, batch = every_model(), every_batch()
    for name, likelihood in model.likelihoods.items():
        shape, cells = SHAPES[name], batch.cells[name]
        values = batch.data[name].masked_fill(~cells, 0)
        output = torch.randn(2, ROWS, *likelihood.output_shape, dtype=torch.float64)
        found = likelihood.log_prob(output, likelihood.observe(values, torch.full((ROWS,), 2.0)), cells)
        one_by_one = torch.zeros(2, ROWS, dtype=torch.float64)
        for place in range(math.prod(shape)):
            only = torch.zeros(math.prod(shape), dtype=torch.bool)
            only[place] = True
            only = only.view(shape) & cells
            kept = likelihood.observe(values.masked_fill(~only, 0), torch.full((ROWS,), 2.0))
            one_by_one += likelihood.log_prob(output, kept, only)
        torch.testing.assert_close(found, one_by_one)


@pytest.mark.parametrize("proposal", ["encoder", "refined"])
def test_the_nll_of_random_cells_is_the_closed_form_within_its_error(proposal: str) -> None:
    shapes = {"a": (3,), "b": (4,), "c": (2, 3)}
    model = linear_model(shapes, private_dims={"a": 1, "b": 2, "c": 1}, missing_cells=("a", "c"))
    with torch.no_grad():
        for encoder in model.encoders.values():
            # these take a missing cell for an observed zero: only wide ones reach the posterior
            for log_var in linear_layer(encoder).bias.split(encoder.heads.sizes)[1::2]:
                log_var += 1.5
    batch = sample_rows(model, 60, missing=0.2, missing_cells=0.4)
    rows = {name: mask for name, mask in batch.masks.items() if name != "b"} | {"b": batch.cells["b"].flatten(1).all(1)}
    batch = Batch(batch.data, rows, cells={name: batch.cells[name] for name in ("a", "c")})
    found = model.joint_nll(batch, K=2000, batch_size_K=500, proposal=proposal)
    exact = -exact_log_prob(model, batch)
    assert float(((found.nll - exact).abs() <= 4 * found.se + 1e-9).double().mean()) >= 0.95
    bound = negative_elbo(model, batch, num_draws=256)
    assert bool((bound >= exact - 0.5).all())


def test_scores_and_information_are_those_of_the_observed_cells() -> None:
    # a Gaussian fit is exact for a linear model: so are its weights, whatever the pattern of cells
    model = linear_model({"a": (6,), "b": (5,)}, missing_cells=("a", "b"))
    batch = sample_rows(model, 40, missing_cells=0.5)
    found = model.joint_nll(batch, K=1000, batch_size_K=500)
    torch.testing.assert_close(found.nll, -exact_log_prob(model, batch), atol=0.05, rtol=0)


@pytest.mark.parametrize(("name", "at"), [("normal", (4, 2)), ("laplace", (3, 1, 2))])
def test_a_nan_that_no_mask_covers_is_refused_with_its_place(name: str, at: tuple[int, ...]) -> None:
    model, batch = every_model(), every_batch(missing=0.0)
    batch.data[name][at] = math.nan
    batch.cells[name][at] = True
    batch.masks[name][at[0]] = True
    element = str(at[1]) if len(at) == 2 else rf"\[{', '.join(map(str, at[1:]))}\]"
    for method in (model, model.encode, model.predict, model.joint_nll, model.posteriors):
        with pytest.raises(ValueError, match=rf"'{name}' is NaN in row {at[0]} \(id {at[0]}\), element {element}\."):
            method(batch)


def test_masks_of_cells_need_the_shape_of_the_values_and_a_model_that_has_missing_cells() -> None:
    values = {"a": torch.zeros(3, 2, 2)}
    with pytest.raises(ValueError, match=r"'a' must be \(rows,\) or \(rows, 1\), or have the shape \(3, 2, 2\)"):
        Batch(values, {"a": torch.ones(3, 4)})
    with pytest.raises(ValueError, match="0/1, but has other values"):
        Batch(values, {"a": torch.full((3, 2, 2), 0.5)})
    model = DMVAE(DMVAEConfig(input_dims={"a": (2, 2)}))
    with pytest.raises(ValueError, match=r"Build it with missing_cells=\('a',\)"):
        model(Batch(values, {"a": torch.ones(3, 2, 2)}))
    with pytest.raises(ValueError, match=r"Unknown modalities in missing_cells: \['b'\]"):
        DMVAEConfig(input_dims={"a": (2, 2)}, missing_cells=("b",))


def test_batches_keep_their_cells_when_rows_are_chosen_and_moved() -> None:
    batch = every_batch()
    for part, rows in (
        (batch[2:5], slice(2, 5)),
        (batch[torch.tensor([4, 1])], [4, 1]),
        (batch.to("cpu"), slice(None)),
    ):
        for name in SHAPES:
            assert torch.equal(part.cells[name], batch.cells[name][rows])
            assert torch.equal(part.masks[name], batch.masks[name][rows])


class Blind(nn.Module):
    """An encoder that knows of no missing cells."""

    def forward(self, x: Tensor) -> EncoderOutput:
        """Map rows to the posteriors' parameters."""
        return EncoderOutput(*torch.zeros(4, len(x), 2))


class Seeing(nn.Module):
    """An encoder of means over the observed cells, and its decoder."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(()))

    def forward(self, x: Tensor, cells: Tensor | None = None) -> Any:
        """Map rows to the posteriors' parameters, or latents to values."""
        if x.shape[1] == 4:
            return DecoderOutput(self.weight * x[:, :3])
        assert cells is not None
        assert bool((x[~cells] == 0).all())
        mean = (x.sum(1, keepdim=True) / cells.sum(1, keepdim=True)).expand(-1, 2)
        return EncoderOutput(mean, self.weight * torch.zeros(len(x), 2), mean, torch.zeros(len(x), 2))


def test_own_networks_and_likelihoods_must_take_the_cells(monkeypatch: pytest.MonkeyPatch) -> None:
    config = DMVAEConfig(input_dims={"a": (3,)}, latent_dim=2, missing_cells=("a",))
    with pytest.raises(
        ValueError, match=r"'a' has missing cells, so its encoder's forward must take \(values, cells\)"
    ):
        DMVAE(config, encoders={"a": Blind()})
    model = DMVAE(config, encoders={"a": Seeing()}, decoders={"a": Seeing()})
    batch = Batch({"a": torch.full((2, 3), math.nan)}, {"a": torch.tensor([[1, 0, 1], [0, 1, 0]])})
    batch.data["a"][batch.cells["a"]] = 1.5
    assert torch.equal(model.posteriors(batch)[0].mean, torch.full((2, 2), 0.75))  # half way to the prior

    class Old(Likelihood):
        def log_prob(self, output: Tensor, value: Tensor) -> Tensor:  # type: ignore[override]
            return self._sum(-(output - value).abs())

    monkeypatch.setitem(registry._REGISTRY, "knows_no_cells", Old)
    with pytest.raises(ValueError, match=r"likelihood's log_prob must take \(output, value, cells\)"):
        DMVAE(config.model_copy(update={"decoders_dist": {"a": "knows_no_cells"}}))


def test_scales_start_at_the_deviations_of_observed_cells() -> None:
    model = DMVAE(
        DMVAEConfig(
            input_dims={"a": (3,)},
            missing_cells=("a",),
            decoder_dist_params={"a": {"scale": "learned_per_feature"}},
        )
    ).double()
    values = torch.randn(500, 3, dtype=torch.float64) * torch.tensor([1.0, 5.0, 0.2])
    cells = torch.rand(500, 3) < 0.6
    cells[:, 2] = False
    model.initialize_likelihoods(Batch({"a": values.masked_fill(~cells, math.nan)}, {"a": cells}))
    expected = [values[cells[:, place], place].var(unbiased=False) for place in (0, 1)]
    expected.append(torch.stack(expected).mean())
    scale = model.likelihoods["a"].log_scale.detach().exp()
    torch.testing.assert_close(scale.square(), torch.stack(expected))
