"""What training says when it goes wrong."""

import math
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from dmvae.config.data import PrepareConfig
from dmvae.config.model import DMVAEConfig
from dmvae.config.training import TrainConfig
from dmvae.data.batch import Batch
from dmvae.data.preparation.prepare import prepare
from dmvae.data.reading.dataset import open_dataset
from dmvae.model.dmvae import DMVAE
from dmvae.training.diagnosis import describe_latents, largest_gradients, name_culprits
from dmvae.training.loop import EpochEnded, train
from dmvae.training.settings import resolve
from dmvae.training.step import Collectives, NonFiniteLossError
from dmvae.training.validation import validate
from tests.runs import make_config, make_dataset
from tests.training.test_loop import build, read, run, spoilt


def prepared(folder: Path, scale: float, present: dict[str, tuple[str, ...]]) -> Path:
    """Write 90 rows of two modalities that share a cause; `present` tells which splits have a modality."""
    rng = np.random.default_rng(0)
    cause, splits = rng.normal(size=(90, 2)), np.repeat(["train", "val", "test"], 30)
    arrays = {name: (cause @ rng.normal(size=(2, 4))).astype(np.float32) for name in ("rna", "atac")}
    arrays["atac"] *= scale
    masks = {f"mask.{name}": np.isin(splits, found) for name, found in present.items()}
    np.savez(folder / "rows.npz", id=np.arange(90), split=splits, **arrays, **masks)
    tree = {"dataset": str(folder / "data"), "source": {"kind": "npz", "path": str(folder / "rows.npz")}}
    return Path(prepare(PrepareConfig.model_validate(tree), progress=lambda line: None))


def configured(dataset: Path, **changes: Any) -> TrainConfig:
    """Return a resolved run with the default networks."""
    changes = {"model": {"architectures": {}}, **changes}
    return resolve(make_config(dataset.parent, dataset, **changes), open_dataset(dataset))


def test_a_loss_that_is_not_finite_names_the_modality_its_scale_the_rate_and_the_largest_gradients(
    tmp_path: Path,
) -> None:
    config = resolve(make_config(tmp_path, make_dataset(tmp_path)), open_dataset(tmp_path / "data"))
    state = build(config)
    with pytest.raises(NonFiniteLossError) as refusal:
        for _ in train(state, spoilt(read(config), {3}), config, Collectives(state.model)):
            pass
    message = str(refusal.value)
    assert "Modality 'left' is the likely cause: its values have a root mean square of " in message
    assert "e+2" in message.partition("root mean square of ")[2][:10]
    assert 'scaling.left = "standardise"' in message
    assert re.search(r"Learning rate 0\.\d+, largest gradients: (en|de)coders\.(left|right) \d", message)


def test_a_gradient_that_is_not_finite_names_its_part() -> None:
    model = DMVAE(DMVAEConfig(input_dims={"a": (3,), "b": (2,)}, latent_dim=2))
    norms = torch.tensor([math.inf if "modality_b" in name else 1.0 for name, _ in model.named_parameters()])
    assert largest_gradients(model, norms).startswith("encoders.b inf, decoders.b inf")


def test_the_scale_is_not_blamed_where_it_is_ordinary() -> None:
    config = DMVAEConfig(input_dims={"a": (3,), "b": (2,)}, latent_dim=2)
    model, batch = DMVAE(config), Batch({"a": torch.ones(4, 3), "b": torch.ones(4, 2)}, ids=torch.arange(4))
    with torch.no_grad():
        model.decoders["b"].body[0].weight.fill_(torch.nan)
    culprits = name_culprits(model, batch, model(batch))
    assert culprits.endswith("Modality: b")
    assert "4 rows, ids [0, 1, 2, 3]" in culprits


def test_gradients_are_added_up_by_part() -> None:
    model = DMVAE(DMVAEConfig(input_dims={"a": (3,)}, latent_dim=2))
    norms = torch.tensor([3.0 if name.startswith("_decoders") else 0.1 for name, _ in model.named_parameters()])
    number = sum(name.startswith("_decoders") for name, _ in model.named_parameters())
    assert largest_gradients(model, norms).startswith(f"decoders.a {3 * number**0.5:.2g}, encoders.a 0.2")


def test_a_modality_without_validation_rows_has_no_metrics_and_cannot_be_monitored(tmp_path: Path) -> None:
    dataset = prepared(tmp_path, 1.0, {"atac": ("train", "test")})
    config = configured(dataset)
    _, events = run(config)
    ended = [event for event in events if isinstance(event, EpochEnded)]
    assert not [name for name in ended[-1].metrics if name.startswith("val/") and "atac" in name]
    assert {"val/loss", "val/joint", "val/rna", "val/kl_shared_given/rna"} <= ended[-1].metrics.keys()
    assert ended[-1].metrics["val/loss"] == pytest.approx(ended[-1].metrics["val/joint"] + ended[-1].metrics["val/rna"])
    with pytest.raises(ValueError, match=r"training\.monitor = 'atac', but no row of split 'val' has that modality"):
        configured(dataset, training={"monitor": "atac"})


def test_what_a_modality_alone_tells_of_the_shared_latent_is_a_divergence(tmp_path: Path) -> None:
    dataset = prepared(tmp_path, 1.0, {})
    config = configured(dataset)
    state = build(config)
    with torch.no_grad():  # an expert as wide as that tells nothing beside the prior
        state.model.encoders["atac"].heads.weight.zero_()
        state.model.encoders["atac"].heads.bias.fill_(30.0)
    split = open_dataset(dataset).split("val")
    means, active = validate(state.model, [split.read(np.arange(30), torch.float64)], config, lambda tensor: tensor)
    assert means["kl_shared_given/atac"] < 1e-6
    assert means["kl_shared_given/rna"] > 0.05
    assert active.keys() == {"shared", "rna", "atac"}


def test_unused_latents_are_named_after_training() -> None:
    config = DMVAEConfig(input_dims={"rna": (3,), "atac": (2,)}, latent_dim=5, modalities_specific_dim=2)
    metrics = {
        "val/kl_shared/joint": 3.21, "val/kl_private/rna": 1.0, "val/kl_private/atac": 0.001,
        "val/active_units/shared": 4, "val/active_units/rna": 1, "val/active_units/atac": 0,
        "val/kl_shared_given/rna": 2.0, "val/kl_shared_given/atac": 0.01,
    }  # fmt: skip
    first, *warnings = describe_latents(config, metrics)
    assert first == "active units: shared 4 of 5 (KL 3.21), private rna 1 of 2 (KL 1.00), private atac 0 of 2 (KL 0.00)"
    assert [line.partition(":")[0] for line in warnings] == ["warning", "warning"]
    assert "private latent of 'atac' is not used (posterior collapse" in warnings[0]
    assert "shared latent knows nothing of 'atac'" in warnings[1]
    metrics["val/active_units/shared"] = 0
    assert "The shared latent is not used (posterior collapse: 0 of 5" in [*describe_latents(config, metrics)][1]
    assert list(describe_latents(config, {})) == []
