"""Counts and sequences from a source to a trained model: cells (genes counted, proteins measured), and sentences."""

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from dmvae import DMVAE, Batch
from dmvae.config.data import PrepareConfig
from dmvae.data.preparation.prepare import prepare
from dmvae.data.reading.dataset import open_dataset
from dmvae.distributions.likelihoods import Likelihood
from dmvae.distributions.likelihoods.negative_binomial import NegativeBinomial
from tests.runs import make_config, train_here

pytestmark = pytest.mark.slow

Arrays = dict[str, np.ndarray]


def cells(num: int, genes: int, seed: int = 0) -> Arrays:
    """Cells of six kinds with depths over an order of magnitude; a quarter lacks the genes, a quarter the proteins."""
    rng = np.random.default_rng(seed)
    kind, state = rng.integers(0, 6, num), rng.normal(size=(num, 2))
    programs = np.where(rng.random((6, genes)) < 0.15, rng.normal(0, 1.5, (6, genes)), 0)
    weights = rng.normal(0, 0.4, (2, genes)) * (rng.random(genes) < 0.3)
    share = np.exp(rng.normal(-1, 1.5, genes) + programs[kind] + state @ weights)
    mean = share / share.sum(1, keepdims=True) * np.exp(rng.normal(7, 0.6, (num, 1)))
    dispersion = np.exp(rng.normal(0.7, 0.7, genes))
    measured = rng.normal(size=(6, 8))[kind] + 0.5 * state @ rng.normal(size=(2, 8)) + 0.5 * rng.normal(size=(num, 8))
    lost = rng.integers(0, 4, num)
    return {
        "rna": rng.poisson(rng.gamma(dispersion, mean / dispersion)),
        "protein": measured.astype(np.float32),
        "mask.rna": lost != 0,
        "mask.protein": lost != 1,
        "label": kind,
        "split": rng.choice(["train", "val", "test"], p=[0.7, 0.1, 0.2], size=num),
    }


def prepared(folder: Path, arrays: Arrays, **settings: Any) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    np.savez(folder / "rows.npz", **arrays)
    source = {"kind": "npz", "path": str(folder / "rows.npz")}
    config = PrepareConfig.model_validate({"dataset": str(folder / "data"), "source": source, **settings})
    return prepare(config, progress=lambda text: None)


def trained(folder: Path, dataset: Path, epochs: int, **model: Any) -> DMVAE:
    fields = {"latent_dim": 6, "modalities_specific_dim": 2, "architectures": {}, **model}
    training = {"epochs": epochs, "batch_size": 64, "precision": "float32", "log_steps": 100}
    config = make_config(folder, dataset, model=fields, training=training, optim={"learning_rate": 5e-3})
    return train_here(config)[0].model.eval()


def rows(dataset: Path, split: str) -> Batch:
    opened = open_dataset(dataset).split(split)
    return opened.read(np.arange(len(opened)))


@pytest.mark.parametrize("likelihood", ["poisson", "negative_binomial"])
def test_counts_are_prepared_and_trained_on_with_size_factors(tmp_path: Path, likelihood: str) -> None:
    arrays = cells(300, 20)
    arrays["size_factor"] = np.where(arrays["mask.rna"], arrays["rna"].sum(1) / 1000, np.nan)
    dataset = prepared(tmp_path, arrays, likelihood={"rna": likelihood})
    model = trained(tmp_path, dataset, epochs=8)
    assert model.config.distributions["rna"] == likelihood
    params = model.config.dist_params("rna")
    here = arrays["mask.rna"] & (arrays["split"] == "train")
    assert params["size_factor"] == pytest.approx(arrays["size_factor"][here].mean())
    assert params["size_factor"] * params["rate"] == pytest.approx(arrays["rna"][here].mean(), rel=1e-6)
    torch.manual_seed(0)
    untrained = DMVAE(model.config).eval()
    test = rows(dataset, "test")
    before, after = (float(m(test).loss.detach()) for m in (untrained, model))
    assert after < before - 10


class RoundedNormal(Likelihood):
    """Counts as a normal of log(1 + x) gives them: the normal's probability between half a count less and more."""

    def __init__(self, shape: tuple[int, ...], scale: float) -> None:
        super().__init__(shape)
        self.scale = scale

    def log_prob(self, output: Tensor, value: Tensor) -> Tensor:
        counts = torch.expm1(value).round()
        low = torch.where(counts > 0, torch.log1p((counts - 0.5).clamp(min=0.5)), -math.inf)
        low, high = ((end - output) / self.scale for end in (low, torch.log1p(counts + 0.5)))
        # on the side where the distribution function is small, and so exact
        low, high = torch.where(low > 0, -high, low), torch.where(low > 0, -low, high)
        p = (torch.special.ndtr(high.double()) - torch.special.ndtr(low.double())).clamp(min=1e-300)
        return self._sum(p.log()).to(output.dtype)


def own_distributions(train: Batch, test: Batch) -> Tensor:
    """Return -log p of every test row with each gene and protein by itself, at the row's size factor."""
    sides = []
    for batch in (train, test):
        assert batch.masks is not None
        sides.append((batch.data["rna"][batch.masks["rna"]], batch.data["protein"][batch.masks["protein"]]))
    (genes, proteins), (test_genes, test_proteins) = sides
    module = NegativeBinomial((genes.shape[1],))
    output = (genes.sum(0).clamp(min=1) / genes.sum()).log().requires_grad_()
    optimizer = torch.optim.Adam([output, *module.parameters()], lr=0.05)
    for _ in range(200):
        optimizer.zero_grad()
        (-module.log_prob(output, genes).mean()).backward()
        optimizer.step()
    normal = torch.distributions.Normal(proteins.mean(0), proteins.std(0))
    assert test.masks is not None
    nll = torch.zeros(len(test))
    nll[test.masks["rna"]] -= module.log_prob(output, test_genes).detach()
    nll[test.masks["protein"]] -= normal.log_prob(test_proteins).sum(1)
    return nll


@pytest.mark.acceptance
def test_negative_binomial_cells_beat_genes_by_themselves_and_a_normal_of_logarithms(tmp_path: Path) -> None:
    arrays = cells(1500, 60)
    counted = prepared(tmp_path / "counts", arrays, likelihood={"rna": "negative_binomial"})
    logs = prepared(tmp_path / "logs", arrays | {"rna": np.log1p(arrays["rna"]).astype(np.float32)})
    learned = {"protein": {"scale": "learned"}}
    ours = trained(tmp_path / "counts", counted, 20, decoder_dist_params=learned)
    poisson = trained(tmp_path / "poisson", counted, 20, decoder_dist_params=learned, decoders_dist={"rna": "poisson"})
    normal = trained(tmp_path / "logs", logs, 20, decoder_dist_params=learned | {"rna": {"scale": "learned"}})
    scale = float(normal.likelihoods["rna"].log_scale.detach().exp())
    normal.likelihoods["rna"] = RoundedNormal((60,), scale)  # a probability of counts, as ours is
    chosen = torch.arange(100)
    test, test_logs = rows(counted, "test")[chosen], rows(logs, "test")[chosen]
    nll = {
        "negative binomial": ours.joint_nll(test, 300).nll,
        "poisson": poisson.joint_nll(test, 300).nll,
        "normal of log(1 + x)": normal.joint_nll(test_logs, 300, proposal="encoder").nll,
        "each gene by itself": own_distributions(rows(counted, "train"), test).double(),
    }
    for name, values in nll.items():
        gap = values - nll["negative binomial"]
        print(f"{name:<22} {float(values.mean()):8.1f} nats a row; ours less by {float(gap.mean()):6.1f} "
              f"+- {float(gap.std() / math.sqrt(len(gap))):.1f}")  # fmt: skip
    for name in ("poisson", "normal of log(1 + x)", "each gene by itself"):
        gap = nll[name] - nll["negative binomial"]
        assert float(gap.mean()) > 3 * float(gap.std()) / math.sqrt(len(gap)), name


def test_a_normal_of_rounded_logarithms_is_a_distribution_of_counts() -> None:
    module = RoundedNormal((1,), 0.6)
    value = torch.log1p(torch.arange(3000.0, dtype=torch.float64))[:, None]
    for mean in (-1.0, 0.3, 3.0):
        p = module.log_prob(torch.full_like(value, mean), value).exp()
        assert float(p.sum()) == pytest.approx(1, abs=1e-9)


PAD, WORDS, LENGTH = 0, 13, 12


def sentences(num: int, seed: int = 0) -> Arrays:
    """Sentences of four to twelve words after one of three patterns, a word in five any other, and a pattern's mark."""
    rng = np.random.default_rng(seed)
    pattern = rng.integers(0, 3, num)
    words = rng.integers(1, WORDS, (3, LENGTH))[pattern]
    words = np.where(rng.random(words.shape) < 0.2, rng.integers(1, WORDS, words.shape), words)
    words[np.arange(LENGTH) >= rng.integers(4, LENGTH + 1, (num, 1))] = PAD
    lost = rng.integers(0, 4, num)
    return {
        "text": words,
        "mark": (np.eye(3)[pattern] + 0.3 * rng.normal(size=(num, 3))).astype(np.float32),
        "mask.text": lost != 0,
        "mask.mark": lost != 1,
        "split": rng.choice(["train", "val", "test"], p=[0.7, 0.1, 0.2], size=num),
    }


def test_sentences_of_any_length_are_learned_and_predicted(tmp_path: Path) -> None:
    dataset = prepared(tmp_path, sentences(700))
    config = {
        "latent_dim": 3,
        "decoder_dist_params": {"text": {"pad": PAD}, "mark": {"scale": 0.3}},
        "architectures": {"text": {"name": "sequence"}},
    }
    model = trained(tmp_path, dataset, epochs=12, **config)
    test = rows(dataset, "test")
    assert test.masks is not None
    here = test[test.masks["text"] & test.masks["mark"]]
    text, word = here.data["text"], here.data["text"] != PAD
    predicted = model.predict(here, "mark", "text", return_mean=True).text.argmax(-1)
    right = float((predicted == text)[word].float().mean())
    assert right > 0.7  # a word in five is another, and 1 in 12 of these the same: at best 0.82
