"""A fitted model with its data's units and names: latents, imputations, predictions, densities, pictures."""

import json
import math
import shutil
import weakref
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import nn

from dmvae.config.training import TrainConfig
from dmvae.data.errors import DatasetError
from dmvae.data.files import write_atomically
from dmvae.data.format.manifest import Manifest, ModalityInfo
from dmvae.data.preparation.object_rows import ObjectRows
from dmvae.data.reading.dataset import Dataset, open_dataset
from dmvae.data.reading.loader import read_rows
from dmvae.evaluation.suite import EvaluationSuite
from dmvae.fitting.imputation import Imputed, impute
from dmvae.fitting.units import ROWS_AT_ONCE, Units
from dmvae.model.dmvae import DMVAE
from dmvae.model.encoding import Modalities
from dmvae.model.predictor import UNITS

if TYPE_CHECKING:
    from dmvae.fitting.plots import Plots

FITTED = "fitted.json"
_HISTORY, _VERSION = "history.json", 1
QUANTILES = (0.05, 0.95)
MEASURES = ("imputation", "probes", "baselines")


class Fitted:
    """A model that was fitted by `dmvae.fit`. Its methods take data of the same forms, and answer in its units.

    Attributes:
        model: the `DMVAE`, with the weights of the best epoch, in eval mode.
        config: the settings of the run, resolved.
        history: a data frame of the metrics by step, with names such as `train/loss` and `val/loss`.
        modalities: what is known of each modality: shape, scaling, likelihood, names of features.
    """

    def __init__(
        self,
        model: DMVAE,
        config: TrainConfig,
        manifest: Manifest,
        history: Any,
        dataset: Dataset | None = None,
        scratch: Path | None = None,
    ) -> None:
        self.model, self.config, self.history = model, config, history
        self._units, self._dataset, self._scratch = Units(manifest), dataset, scratch
        if scratch is not None:
            weakref.finalize(self, shutil.rmtree, scratch, ignore_errors=True)

    def __repr__(self) -> str:
        sizes = ", ".join(f"{name} {info.shape}" for name, info in self.modalities.items())
        monitor = f"val/{self.config.training.monitor}"
        best = f", best {monitor} {self.history[monitor].min():.4g}" if monitor in self.history else ""
        return f"Fitted({sizes}; latent_dim {self.model.latent_dim}; {self._num_epochs} epochs{best})"

    @property
    def modalities(self) -> dict[str, ModalityInfo]:
        """What is known of each modality."""
        return self._units.modalities

    @property
    def _num_epochs(self) -> int:
        monitor = f"val/{self.config.training.monitor}"
        return int(self.history[monitor].notna().sum()) if monitor in self.history else 0

    def latents(self, data: Any, private: bool = False, ids: Any = None) -> Any:
        """Return the posterior mean of the shared latent, and on request of the private ones.

        Returns:
            A data frame with the rows' ids as its index and columns such as `shared_0` and `rna_0`. Private latents of
            a modality that a row lacks are NaN.
        """
        rows, parts = self.read(data, ids), []
        for batch in self._units.batches(rows, self.model):
            with torch.no_grad():
                shared, privates = self.model.posteriors(batch)
            block = [shared.mean]
            if private:
                for name, gaussian in privates.items():
                    here = (batch.masks or {})[name].to(gaussian.mean.device)
                    block.append(gaussian.mean.masked_fill(~here[:, None], math.nan))
            parts.append(torch.cat(block, 1).cpu())
        dims = {"shared": self.model.latent_dim} | (self.model.style_dims if private else {})
        columns = [f"{name}_{number}" for name, dim in dims.items() for number in range(dim)]
        return self._units.frame(rows, torch.cat(parts), columns)

    def impute(
        self,
        data: Any,
        num_draws: int = 100,
        quantiles: Sequence[float] = QUANTILES,
        seed: int = 0,
        ids: Any = None,
    ) -> dict[str, Imputed]:
        """Fill in what rows lack, with predictive standard deviations and quantiles.

        Latents are drawn from each row's posterior, and values from the likelihood, whose noise is part of the spread.

        Returns:
            One `Imputed` for each modality, in the units of the data.
        """
        return impute(self.model, self._units, self.read(data, ids), num_draws, quantiles, seed)

    def predict(self, data: Any, target: str, given: Modalities = "all", ids: Any = None) -> Any:
        """Predict a modality of every row, whether the row has it or not, from others.

        Args:
            data: the rows.
            target: the modality.
            given: what the prediction may use; "all": every other modality.
            ids: as in `fit`.

        Returns:
            A data frame, or an array `(rows, *shape)` if a row is no vector, in the units of the data.
        """
        if target not in self.modalities:
            raise ValueError(f"Unknown modality {target!r} for target. Available: {', '.join(self.modalities)}.")
        sources = [name for name in self.modalities if name != target] if given == "all" else given
        rows, parts = self.read(data, ids), []
        for batch in self._units.batches(rows, self.model):
            output = self.model.predict(batch, sources, target, return_mean=True)[target]
            parts.append(self._units.scales[target].show(self.model.means(output, target).double().cpu()))
        return self._units.table(rows, target, torch.cat(parts))

    def sample(self, num: int, seed: int = 0) -> dict[str, Any]:
        """Draw new rows from the model: the means of each modality given latents from the prior."""
        generator = torch.Generator(self.model.device).manual_seed(seed)
        outputs = self.model.decode(self.model.generate_from_prior(num, generator))
        shown = {}
        for name, scale in self._units.scales.items():
            values = scale.show(self.model.means(outputs[name], name).double().cpu())
            shown[name] = self._units.table(None, name, values)
        return shown

    def nll(self, data: Any, num_draws: int = 1000, seed: int = 0, ids: Any = None) -> Any:
        """Estimate -log p of what each row has, in nats and in the units of the data.

        Returns:
            A data frame with `nll`, its Monte Carlo standard error `se`, and `trusted`, whether that is reliable.
        """
        rows, parts = self.read(data, ids), []
        for batch in self._units.batches(rows, self.model):
            found = self.model.joint_nll(batch, num_draws, seed=seed)
            jacobian = torch.zeros(len(batch), dtype=torch.float64)
            for name, scale in self._units.scales.items():
                there, cells = (batch.masks or {})[name], (batch.cells or {}).get(name)
                known = None if cells is None else cells[there]
                jacobian[there] += scale.log_jacobian(batch.data[name][there], known).cpu()
            parts.append(torch.stack((found.nll.cpu() + jacobian, found.se.cpu(), found.trusted.cpu().double()), 1))
        frame = self._units.frame(rows, torch.cat(parts), ["nll", "se", "trusted"])
        return frame.astype({"trusted": bool})

    def evaluate(self, measures: Sequence[str] = ("imputation",), num_draws: int = 1000) -> dict[str, float]:
        """Evaluate the model on the validation rows that it was fitted with, as `jobs.evaluate` does.

        Args:
            measures: any of `imputation`, `probes` (needs labels) and `baselines`.
            num_draws: draws per row of the NLL.

        Returns:
            `nll` (mean per row in nats, of the values as scaled for the model), its standard error `nll_se`, and the
            metrics of each measure; docs/evaluation.md explains them.
        """
        unknown = sorted(set(measures) - set(MEASURES))
        if unknown:
            raise ValueError(f"Unknown measures {unknown}. Available: {', '.join(MEASURES)}.")
        dataset = self._need_dataset("evaluate")
        train, split = dataset.split(self.config.data.train_split), dataset.split(self.config.data.val_split)
        suite = EvaluationSuite(self.model, train, split)
        nll = np.concatenate(
            [self.model.joint_nll(batch, num_draws).nll.cpu().numpy() for _, batch in read_rows(split, ROWS_AT_ONCE)]
        )
        error = float(nll.std(ddof=1) / math.sqrt(len(nll))) if len(nll) > 1 else math.nan
        metrics = {"nll": float(nll.mean()), "nll_se": error}
        for measure in measures:
            metrics |= suite.baselines(nll) if measure == "baselines" else getattr(suite, measure)()
        return metrics

    def report(self, folder: str | Path) -> Path:
        """Write the HTML report of `jobs.report` on the validation rows, and return its file.

        Raises:
            ImportError: if matplotlib or scikit-learn is not installed.
        """
        from dmvae.config.report import ReportConfig
        from dmvae.platform.evaluate.report import report

        dataset, target = self._need_dataset("report"), Path(folder)
        self.model.save(target / "model")
        data = self.config.data
        settings = {"split": data.val_split, "train_split": data.train_split, "output": str(target)}
        return report(ReportConfig(model=str(target / "model"), dataset=dataset.where, **settings), lambda line: None)

    @property
    def plot(self) -> "Plots":
        """Pictures: `plot.curves()`, `plot.map(data, color)`, `plot.missingness(data)`, `plot.imputed(data)`."""
        from dmvae.fitting.plots import Plots

        return Plots(self)

    def annotate(self, data: Any) -> None:
        """Write latents and imputations into an AnnData or a MuData: `obsm["X_dmvae"]` and the layer `imputed`."""
        if not hasattr(data, "obsm"):
            raise TypeError(f"data must be an AnnData or a MuData, but got {type(data).__name__}.")
        latents, imputed = self.latents(data), self.impute(data)
        data.obsm["X_dmvae"] = latents.loc[list(map(str, data.obs_names))].to_numpy()
        for name, single in (data.mod if hasattr(data, "mod") else {"X": data}).items():
            single.layers["imputed"] = imputed[name].values.loc[list(map(str, single.obs_names))].to_numpy()

    def to_config(self, path: str | Path | None = None) -> str:
        """Return the run as TOML that `jobs.train` takes, and write it to `path`."""
        import tomli_w

        text = tomli_w.dumps(self.config.model_dump(mode="json", exclude_defaults=True, exclude_none=True))
        if self._scratch is not None:
            text = (
                f"# The dataset is temporary: it lasts as long as this process. Keep it with fit(folder=...).\n{text}"
            )
        if path is not None:
            write_atomically(Path(path), text)
        return text

    def save(self, folder: str | Path) -> None:
        """Write the model, the units and names of its data, and the history, into a folder; nothing is a pickle.

        The rows are not saved: `evaluate` and `report` need the dataset's folder, which `fit(folder=...)` keeps.
        """
        target = Path(folder)
        self.model.save(target)
        units = {name: info.model_dump(mode="json") for name, info in self.modalities.items()}
        write_atomically(target / UNITS, json.dumps(units, indent=2) + "\n")
        frame = json.loads(self.history.to_json(orient="split", double_precision=15))
        write_atomically(target / _HISTORY, json.dumps(frame) + "\n")
        record = {
            "version": _VERSION,
            "config": self.config.model_dump(mode="json"),
            "manifest": self._units.manifest.model_dump(mode="json"),
            "dataset": None if self._dataset is None or self._scratch is not None else self._dataset.where,
        }
        write_atomically(target / FITTED, json.dumps(record, indent=2) + "\n")

    @classmethod
    def load(
        cls,
        folder: str | Path,
        encoders: Mapping[str, nn.Module] | None = None,
        decoders: Mapping[str, nn.Module] | None = None,
        trust: Collection[str] = (),
    ) -> "Fitted":
        """Load what `save` wrote; networks of your own are passed again, or their import paths trusted.

        Raises:
            FileNotFoundError: if the folder holds no fitted model.
            ValueError: if it was written by a newer version.
        """
        import pandas as pd

        source = Path(folder)
        if not (source / FITTED).is_file():
            raise FileNotFoundError(f"Fitted model not found: {source} has no {FITTED}. Load a model with DMVAE.load.")
        record = json.loads((source / FITTED).read_text())
        if record.get("version") != _VERSION:
            raise ValueError(f"{source / FITTED} has version {record.get('version')}, not {_VERSION}. Upgrade dmvae.")
        frame = json.loads((source / _HISTORY).read_text())
        history = pd.DataFrame(frame["data"], index=pd.Index(frame["index"], name="step"), columns=frame["columns"])
        dataset = None if record["dataset"] is None else open_dataset(record["dataset"])
        config, manifest = TrainConfig.model_validate(record["config"]), Manifest.model_validate(record["manifest"])
        return cls(DMVAE.load(source, encoders, decoders, trust), config, manifest, history.astype(float), dataset)

    def _need_dataset(self, method: str) -> Dataset:
        if self._dataset is None:
            raise DatasetError(
                f"{method} needs the prepared rows, which were not kept. Fit with folder=... to keep them."
            )
        return self._dataset

    def read(self, data: Any, ids: Any = None) -> ObjectRows:
        """Read data of the forms that `fit` takes, in the order of the modalities and features of the model."""
        return self._units.read(data, ids)


def load(source: str | Path, trust: Collection[str] = ()) -> Any:
    """Return the model at a folder, a URI (`s3://BUCKET/RUN/best`) or in the registry (`models:/NAME@ALIAS`).

    A folder that `Fitted.save` wrote is returned as a `Fitted`, any other model as a `DMVAE`.

    Args:
        source: see above.
        trust: own code that the folder may name, as in `DMVAE.load`.

    Raises:
        FileNotFoundError: if the folder holds no model.
        RegistryError: if MLflow cannot be reached, has no such model, or lacks its files.
    """
    if (Path(source) / FITTED).is_file():
        return Fitted.load(source, trust=trust)
    from dmvae.platform.serve.registry import load as load_registered

    return load_registered(str(source), trust)
