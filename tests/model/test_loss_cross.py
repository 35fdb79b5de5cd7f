"""Sources that predict: outside a source private latents come from their prior, without a divergence."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from dmvae import DMVAE, Batch, DMVAEConfig
from dmvae.data.reading.dataset import open_dataset
from dmvae.model.loss import Noise, choose_subsets, with_complements
from dmvae.training.loop import train
from dmvae.training.settings import resolve
from dmvae.training.setup import WorkerData
from dmvae.training.state import TrainState, build_optimizer
from dmvae.training.step import Collectives
from tests.linear_gaussian import exact_log_prob, linear_model, sample_rows
from tests.model.test_loss import SHAPES, draw, every_pattern, rows_of, run, small_model
from tests.runs import make_config, make_dataset

PREDICTING = {"sources": "subsets", "cross": "prior"}
NAMES = list(SHAPES)


def predicting_model(**settings: Any) -> DMVAE:
    return small_model(**(PREDICTING | settings))


def members_of(model: DMVAE, noise: Noise, batch: Batch) -> Tensor:
    """Which modalities each source of each row consists of, `(source, modality, row)`."""
    assert batch.masks is not None
    present = torch.stack([batch.masks[name] for name in SHAPES])
    if model.config.sources == "unimodal":
        return torch.stack([present, *(torch.eye(3, dtype=torch.bool)[:, [place]] & present for place in range(3))])
    assert noise.subsets is not None
    both = with_complements(choose_subsets(noise.subsets, present), present)
    return torch.cat((present[None], both[: model.config.num_subsets]))


@pytest.mark.parametrize("settings", [{}, {"num_subsets": 3}, {"sources": "unimodal"}], ids=["2", "3", "unimodal"])
def test_the_objective_is_the_formula_written_out_row_by_row(settings: dict[str, Any]) -> None:
    betas = {"a": 0.5, "b": 2.0, "c": 1.25}
    model = predicting_model(beta=2.5, modalities_specific_betas=betas, **settings)
    batch = every_pattern(math.nan)
    noise = draw(model, 8)
    members = members_of(model, noise, batch)
    row_loss = model(batch, noise, divergence_weight=0.6).row_loss
    for row in range(8):
        here = [name for name in SHAPES if batch.masks[name][row]]
        codes = {name: model.encoders[name](batch.data[name][row : row + 1]) for name in here}
        loss = torch.zeros((), dtype=torch.float64)
        for place, inside in enumerate(members[:, :, row]):
            source = [name for name in SHAPES if inside[NAMES.index(name)]]
            if not source:
                continue
            precision = sum(torch.exp(-codes[name].log_covariance) for name in source)
            weighted = sum(torch.exp(-codes[name].log_covariance) * codes[name].embedding for name in source)
            if place == 0 or model.config.sources == "subsets":
                precision = precision + 1
            mean, log_var = weighted / precision, -torch.log(precision)
            z = mean + torch.exp(log_var / 2) * noise.shared[place, row]
            loss = loss + 0.6 * 2.5 * 0.5 * (torch.exp(log_var) + mean**2 - 1 - log_var).sum()
            for name, code in codes.items():
                private = noise.private[name][place, row][None]
                if name in source:
                    std = torch.exp(code.style_log_covariance / 2)
                    private = code.style_embedding + std * private
                    divergence = std**2 + code.style_embedding**2 - 1 - code.style_log_covariance
                    loss = loss + 0.6 * betas[name] * 0.5 * divergence.sum()
                output = model.decoders[name](torch.cat((z, private), dim=1)).reconstruction[0]
                loss = loss - torch.distributions.Normal(output, 1.0).log_prob(batch.data[name][row]).sum()
        torch.testing.assert_close(row_loss[row], loss)


@pytest.mark.parametrize("sources", ["subsets", "unimodal"])
def test_every_bound_is_below_the_exact_evidence(sources: str) -> None:
    base = linear_model(SHAPES, 2, {"a": 1, "b": 2, "c": 0}, {"a": 0.7, "b": 1.0, "c": 0.5})
    model = DMVAE(base.config.model_copy(update={"sources": sources, "cross": "prior"})).double().eval()
    model.load_state_dict(base.state_dict())
    patterns = Batch(sample_rows(base, 8).data, every_pattern().masks)
    for row in range(1, 8):
        with torch.no_grad():
            metrics = model(patterns[torch.full((2000,), row)]).metrics
        for source in model.config.source_names:
            if metrics[f"kl_shared/{source}"] > 0:
                assert float(exact_log_prob(base, patterns[row])) + float(metrics[source]) > 0, (row, source)


def test_a_prediction_bound_is_the_evidence_where_the_shared_posterior_is_exact() -> None:
    """With nothing to learn from x_a, E log p(x_b | z_s, z_b) under the priors is all that the source of a can say."""
    model = linear_model({"a": (2,), "b": (3,)}, 1, {"a": 0, "b": 0}, 0.7)
    model = DMVAE(model.config.model_copy(update=PREDICTING)).double().eval()
    with torch.no_grad():
        for name in ("a", "b"):
            model.decoders[name].body[0].weight.zero_()  # z_s says nothing, so its posterior is the prior
            for parameter in model.encoders[name].parameters():
                parameter.zero_()
            model.encoders[name].heads.bias[1] = 60.0  # an expert without information
    batch = sample_rows(model, 5)
    out = model(batch, draw(model, 5))
    for source in model.config.source_names:
        expected = -exact_log_prob(model, batch).mean()
        torch.testing.assert_close(out.metrics[source], expected)


def test_a_private_encoder_learns_nothing_from_sources_it_is_outside_of() -> None:
    model, batch = predicting_model(sources="unimodal"), every_pattern(math.nan)
    for name in SHAPES:
        row = batch[torch.tensor([7])]
        noise = draw(model, 1)
        out = model(row, noise)
        terms = dict(zip(out.terms.names, out.terms.total.tolist(), strict=True))
        with torch.no_grad():
            model.encoders[name].heads.weight[4:] += 1.0  # the private heads
        moved = model(row, noise)
        other = dict(zip(moved.terms.names, moved.terms.total.tolist(), strict=True))
        for source in SHAPES:
            key = f"log_likelihood/{source}/{name}"
            assert (terms[key] == other[key]) == (source != name), key


def test_a_subset_and_its_complement_are_what_a_row_has() -> None:
    present = torch.tensor([[True, True, True, True], [True, False, True, True], [False, True, False, False]]).T
    present = torch.cat((present, torch.zeros(4, 1, dtype=torch.bool)), dim=1)
    chosen = choose_subsets(torch.randn(2000, 4, 5, dtype=torch.float64), present)
    both = with_complements(chosen, present)
    first, rest = both[::2], both[1::2]
    assert not bool((first & rest).any())
    several = present.sum(0) > 1
    assert bool(((first | rest)[..., several] == present[:, several]).all())
    assert bool(first[..., several].any(1).all() and rest[..., several].any(1).all())
    assert not bool(both[..., ~several].any()), "a row with one modality has nothing to predict"
    for part in (first, rest):
        members = part[:, :, 0].double().mean(0)
        torch.testing.assert_close(members, torch.full_like(members, 0.5), atol=0.05, rtol=0)


def test_what_is_missing_has_no_effect() -> None:
    outputs = []
    for missing in (0.0, math.nan, math.inf):
        model = predicting_model()
        torch.manual_seed(0)
        for parameter in model.parameters():
            torch.nn.init.normal_(parameter, std=0.3)
        outputs.append(run(model, every_pattern(missing)))
    for out, gradients in outputs[1:]:
        torch.testing.assert_close(out.row_loss, outputs[0][0].row_loss)
        for name, gradient in gradients.items():
            torch.testing.assert_close(gradient, outputs[0][1][name])
    assert outputs[0][0].row_loss[0] == 0


def test_a_row_s_loss_belongs_to_the_row() -> None:
    model, batch, order = predicting_model(), every_pattern(math.nan), torch.randperm(8)
    noise = draw(model, 8)
    assert noise.subsets is not None
    part = rows_of(noise, order)
    assert noise.subsets.shape == (1, 8, 4), "one draw is a pair of subsets"
    picked = Noise(part.shared, part.private, noise.subsets[:, order])
    torch.testing.assert_close(model(batch[order], picked).row_loss, model(batch, noise).row_loss[order])


@pytest.mark.parametrize("sources", ["subsets", "unimodal"])
def test_the_gradient_reaches_every_parameter(sources: str) -> None:
    model = predicting_model(
        sources=sources,
        modalities_specific_dim={"a": 1, "b": 2, "c": 0},
        architectures={name: {"name": "skip_mlp", "hidden_dims": (5, 4)} for name in SHAPES},
        decoder_dist_params={"a": {"scale": "learned_per_feature"}, "c": {"scale": "learned_per_modality"}},
    )
    _, gradients = run(model, every_pattern(math.nan))
    assert gradients.keys() == dict(model.named_parameters()).keys()
    for name, gradient in gradients.items():
        assert bool(gradient.isfinite().all()), name
        assert bool((gradient != 0).any()), name


def test_two_workers_have_the_gradient_of_one(tmp_path: Path) -> None:
    dataset = make_dataset(tmp_path)
    config = resolve(make_config(tmp_path, dataset, model=PREDICTING), open_dataset(dataset))
    gradients = []
    for num in (1, 2):
        total: dict[str, torch.Tensor] = {}
        for rank in range(num):
            torch.manual_seed(0)
            model = DMVAE(config.model).double()
            state = TrainState(model, build_optimizer(model, config.optim))
            next(iter(train(state, WorkerData(config, rank, num, torch.float64), config, Collectives(model, num))))
            for name, parameter in model.named_parameters():
                assert parameter.grad is not None
                total[name] = total.get(name, 0) + parameter.grad / num
        gradients.append(total)
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, rtol=1e-9, atol=1e-12)


def test_a_source_outside_one_modality_is_refused() -> None:
    with pytest.raises(ValueError, match="two or more modalities, but got one"):
        DMVAEConfig(input_dims={"a": (1,)}, cross="prior")
