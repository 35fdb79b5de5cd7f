"""`dmvae.fit` in this process: the loop of `jobs.train`, with the settings that `jobs.inspect` suggests."""

import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch

import dmvae
from dmvae import Batch
from dmvae.config.training import TrainConfig
from dmvae.data.errors import DatasetError
from dmvae.training.loop import EpochEnded, MetricsLogged
from tests.fitting.rows import SHORT, arrays, frames


def losses(fitted: dmvae.Fitted) -> list[float]:
    return fitted.history["val/loss"].dropna().tolist()


def test_frames_arrays_tensors_batches_and_their_dataset_fit_alike(tmp_path: Path) -> None:
    names = [f"row{number}" for number in range(120)]
    tensors = {name: torch.from_numpy(values) for name, values in arrays().items()}
    masks = {name: ~values.isnan().all(1) for name, values in tensors.items()}
    fitted = dmvae.fit(arrays(), ids=names, folder=tmp_path, **SHORT)
    for data in (
        {name: table.sort_index() for name, table in frames().items()},
        Batch({name: values.nan_to_num() for name, values in tensors.items()}, masks, ids=names),
    ):
        assert losses(dmvae.fit(data, **SHORT)) == losses(fitted)
    assert losses(dmvae.fit(tensors, ids=names, **SHORT)) == losses(fitted)
    assert losses(dmvae.fit(tmp_path / "data", **SHORT)) == losses(fitted)


def test_the_loss_falls_and_the_best_epoch_is_kept() -> None:
    fitted = dmvae.fit(frames(), **SHORT | {"training": SHORT["training"] | {"epochs": 8}})
    curve = losses(fitted)
    assert curve[-1] < curve[0]
    assert fitted.config.training.patience is not None
    assert not fitted.model.training
    assert repr(fitted).startswith("Fitted(left (4,), right (3,); latent_dim 2; 8 epochs, best val/loss")


def test_scaling_and_likelihoods_are_proposed_from_the_values() -> None:
    rng = np.random.default_rng(0)
    data = {
        "real": 100 + 5 * rng.normal(size=(60, 2)),
        "counts": rng.poisson(8, (60, 3)),
        "binary": rng.integers(0, 2, (60, 2)),
        "pixels": rng.integers(0, 256, (60, 1, 4, 4)).astype(np.uint8),
        "codes": rng.integers(0, 4, (60, 2)),
        "table": pd.DataFrame({"sex": rng.choice(["f", "m"], 60), "age": rng.normal(50, 9, 60)}),
    }
    fitted = dmvae.fit(data, likelihood={"codes": "categorical"}, training={"epochs": 1}, progress=False)
    assert {name: info.scaling for name, info in fitted.modalities.items()} == {
        "real": "standardise", "counts": "none", "binary": "none", "pixels": "unit", "codes": "none",
        "table": "columns",
    }  # fmt: skip
    assert fitted.config.model.distributions == {
        "real": "normal", "counts": "poisson", "binary": "bernoulli", "pixels": "normal", "codes": "categorical",
        "table": "columns",
    }  # fmt: skip


def test_callbacks_see_every_event_in_order() -> None:
    seen: list[Any] = []
    dmvae.fit(frames(), **SHORT | {"training": SHORT["training"] | {"log_steps": 1}}, callbacks=[seen.append])
    steps = [event.global_step for event in seen if type(event) is MetricsLogged]
    assert steps == list(range(1, 22))
    assert [event.epoch for event in seen if isinstance(event, EpochEnded)] == [0, 1, 2]


def test_an_interrupt_keeps_the_best_model_so_far() -> None:
    def stop(event: Any) -> None:
        if isinstance(event, EpochEnded) and event.epoch == 1:
            raise KeyboardInterrupt

    lines: list[str] = []
    settings = SHORT | {"progress": lines.append}
    fitted = dmvae.fit(frames(), **settings, callbacks=[stop])
    assert lines[-1] == "interrupted in epoch 3; keeping the best model so far"
    whole = dmvae.fit(frames(), **SHORT | {"training": SHORT["training"] | {"epochs": 3}})
    assert losses(fitted) == losses(whole)[:2]


def test_own_networks_are_trained() -> None:
    class Encoder(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.heads = torch.nn.Linear(4, 2 * 2 + 2 * 1)

        def forward(self, x: torch.Tensor) -> dmvae.EncoderOutput:
            return dmvae.EncoderOutput(*self.heads(x).split([2, 2, 1, 1], dim=-1))

    encoder = Encoder().double()
    before = encoder.heads.weight.detach().clone()
    settings = SHORT | {"model": SHORT["model"] | {"modalities_specific_dim": 1}}
    fitted = dmvae.fit(frames(), **settings, encoders={"left": encoder})
    assert fitted.model.encoders["left"] is encoder
    assert not torch.equal(encoder.heads.weight, before)


def test_the_same_settings_are_a_run_of_the_training_job(tmp_path: Path) -> None:
    fitted = dmvae.fit(frames(), folder=tmp_path, **SHORT)
    text = fitted.to_config(tmp_path / "train.toml")
    assert tomllib.loads((tmp_path / "train.toml").read_text()) == tomllib.loads(text)
    again = TrainConfig.model_validate(tomllib.loads(text))
    assert again == fitted.config
    assert again.data.dataset == str(tmp_path / "data")


@pytest.mark.slow
def test_a_run_is_recorded_in_mlflow_when_asked_for(tmp_path: Path) -> None:
    from mlflow import MlflowClient

    uri = f"sqlite:///{tmp_path}/mlflow.db"
    fitted = dmvae.fit(frames(), folder=tmp_path, track=uri, **SHORT)
    client = MlflowClient(uri)
    (run,) = client.search_runs([client.get_experiment_by_name("dmvae").experiment_id])
    logged = [metric.value for metric in client.get_metric_history(run.info.run_id, "val/loss")]
    assert logged == losses(fitted)


FAULTS: dict[str, tuple[dict[str, Any], str]] = {
    "likelihood": ({"likelihood": {"lefd": "normal"}}, r"Unknown modalities \['lefd'\] in likelihood"),
    "scaling": ({"scaling": {"lefd": "none"}}, r"Unknown modalities \['lefd'\] in scaling"),
    "a setting": ({"training": {"epoch": 3}}, "training.epoch"),
    "validation": ({"validation": 1.5}, "validation must be a share between 0 and 1, but got 1.5"),
    "networks for workers": (
        {"workers": 2, "encoders": {"left": torch.nn.Identity()}},
        "cannot be sent to the workers",
    ),
    "callbacks of workers": ({"workers": 2, "callbacks": [print]}, "callbacks are called in this process only"),
    "an unknown likelihood": ({"likelihood": {"left": "gauss"}}, "gauss"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_wrong_argument_has_a_message_that_names_it(fault: str) -> None:
    arguments, message = FAULTS[fault]
    with pytest.raises(ValueError, match=message):
        dmvae.fit(frames(40), progress=False, **arguments)


def test_a_prepared_dataset_takes_no_settings_of_its_preparation(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="labels, scaling cannot be set for a prepared dataset"):
        dmvae.fit(tmp_path, labels=[1], scaling={"left": "none"})


def test_partly_missing_rows_keep_their_values_or_are_refused_with_the_ways_out() -> None:
    data = arrays()
    data["left"][20, 1] = np.nan
    assert dmvae.fit(data, **SHORT).config.model.missing_cells == ("left",)
    with pytest.raises(DatasetError, match=r"'left'.*partial = 'drop'"):
        dmvae.fit(data, partial="refuse", **SHORT)
    assert dmvae.fit(data, partial="drop", **SHORT).config.model.missing_cells == ()


@pytest.mark.slow
def test_training_here_loads_no_platform() -> None:
    program = (
        "import sys, numpy as np, dmvae\n"
        "x = np.random.default_rng(0).normal(size=(40, 2))\n"
        "dmvae.fit({'a': x, 'b': x}, training={'epochs': 1}, progress=False)\n"
        "print(*{name.partition('.')[0] for name in sys.modules})\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert {"ray", "mlflow", "optuna"}.isdisjoint(done.stdout.split())
