"""Imputation, coherence and likelihood: the seed's settings beside those proposed now, the prior beside a fitted one.

    python -m tests.benchmarks.quality_table FOLDER [--seeds 3] [--epochs 60] [--data digits views]

Two datasets: the demo's paired digits, and scikit-learn's digits cut into four views of 16 pixels. Of each run the
epoch of the best validation loss is judged, on complete test rows; the table has the mean over training seeds and their
spread, and the baselines on the same rows. `latents` are from the standard-normal prior, from the one that is fitted
after training, and from one with p(z_p | z_s) fitted too where the objective has `cross = "prior"`.
`imputation` is the error of a modality from the others on the scale of the
values as they are read, `nll` that of 100 rows with 500 draws, `flagged` the share of these that are not to be trusted.
"""

import argparse
import json
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from dmvae.config.data import PrepareConfig
from dmvae.config.training import TrainConfig
from dmvae.data.batch import Batch
from dmvae.data.preparation.prepare import prepare
from dmvae.data.reading.dataset import open_dataset
from dmvae.distributions.gaussian_mixture import FittedPrior
from dmvae.evaluation.baselines import fit_baselines
from dmvae.evaluation.factor_analysis import fit_factor_analysis
from dmvae.evaluation.imputation import baseline_errors, held_out_errors
from dmvae.evaluation.latents import collect, fit_density, probe_labels
from dmvae.evaluation.metrics import (
    Classifier,
    Proportion,
    classifier_accuracy,
    conditional_coherence,
    fit_classifier,
    joint_coherence,
)
from dmvae.evaluation.suite import first_rows
from dmvae.model.dmvae import DMVAE
from dmvae.training.loop import EpochEnded, train
from dmvae.training.settings import resolve
from dmvae.training.setup import WorkerData, build_state
from dmvae.training.step import Collectives

VIEWS, DIGITS = tuple(f"view{number}" for number in range(4)), ("mnist", "optdigits")


def settings(names: tuple[str, ...], scale: str, network: dict[str, Any], **model: Any) -> dict[str, Any]:
    """Return a model's settings, with one scale and one network for all modalities."""
    params, architectures = {name: {"scale": scale} for name in names}, dict.fromkeys(names, network)
    return {"decoder_dist_params": params, "architectures": architectures, **model}


NEW: dict[str, Any] = {"sources": "subsets", "cross": "prior"}
SKIP = {"name": "skip_mlp", "hidden_dims": [256, 256]}
FAST = {"learning_rate": 3e-3, "warmup_steps": 100}
LATENTS = ("prior", "fitted", "private too")
DIMS = {"mnist": 4, "optdigits": 2}
RUNS: dict[str, dict[str, dict[str, Any]]] = {
    "digits": {
        "before": {
            "model": settings(
                DIGITS, "learned", {}, latent_dim=10, modalities_specific_dim=DIMS, modalities_specific_betas=2.0
            ),
            "optim": {"learning_rate": 3e-3},
            "training": {"batch_size": 256},
        },
        "now": {
            "model": settings(DIGITS, "learned_per_modality", SKIP, latent_dim=10, modalities_specific_dim=DIMS, **NEW),
            "optim": FAST,
            "training": {"batch_size": 256},
        },
    },
    "views": {
        "before": {
            "model": settings(VIEWS, "learned", {"hidden_dims": [128]}, latent_dim=12, modalities_specific_dim=2)
        },
        "now": {
            "model": settings(VIEWS, "learned_per_feature", SKIP, latent_dim=16, modalities_specific_dim=2, **NEW),
            "optim": FAST,
        },
    },
}


@dataclass(frozen=True)
class Judge:
    """What all models of one dataset are judged with."""

    train: Batch
    test: Batch
    classifiers: dict[str, Classifier]

    def figures(self, model: DMVAE, density: FittedPrior | None) -> dict[str, float]:
        """Return imputation error and coverage, coherence of draws and of means, joint coherence and NLL: means."""
        names = model.config.modalities
        errors = [held_out_errors(model, self.test, name, 50, density) for name in names]
        from_others, from_one, of_means = [], [], []
        for target, classifier in self.classifiers.items():
            others = [name for name in names if name != target]
            from_others.append(conditional_coherence(model, self.test, classifier, others, target, density=density))
            of_means.append(conditional_coherence(model, self.test, classifier, others, target, True, density=density))
            from_one += [
                conditional_coherence(model, self.test, classifier, n, target, density=density) for n in others
            ]
        nll = model.joint_nll(self.test[:100], 500)
        return {
            "imputation": float(np.mean([part.rmse for part in errors])),
            "cover50": float(np.mean([part.coverage[0] for part in errors])),
            "cover90": float(np.mean([part.coverage[1] for part in errors])),
            "coherence 1->1": sum(from_one, Proportion()).rate,
            "others->1": sum(from_others, Proportion()).rate,
            "means": sum(of_means, Proportion()).rate,
            "joint": joint_coherence(model, self.classifiers, density=density).rate,
            "nll": float(nll.nll.mean()),
            "flagged": 1 - float(nll.trusted.double().mean()),
        }


def make_views(folder: Path, missing: float = 0.3) -> Path:
    """Write scikit-learn's digits as four standardised quadrants of 16 pixels, a share of them removed but in test."""
    from sklearn.datasets import load_digits

    digits, rng = load_digits(), np.random.default_rng(0)
    images, rows = digits.images, len(digits.target)
    splits = rng.permutation(np.repeat(["train", "val", "test"], [rows - 500, 200, 300]))
    views, present = {}, rng.random((rows, 4)) >= missing
    present[np.arange(rows), rng.integers(0, 4, rows)] = True
    for number in range(4):
        top, left = 4 * (number // 2), 4 * (number % 2)
        view = images[:, top : top + 4, left : left + 4].reshape(rows, 16)
        mean, std = view[splits == "train"].mean(0), view[splits == "train"].std(0)
        views[f"view{number}"] = ((view - mean) / np.where(std > 0.5, std, 1)).astype(np.float32)
        views[f"mask.view{number}"] = present[:, number] | (splits == "test")
    folder.mkdir(parents=True, exist_ok=True)
    np.savez(folder / "views.npz", id=np.arange(rows), label=digits.target, split=splits, **views)
    source = {"kind": "npz", "path": str(folder / "views.npz")}
    return prepare_dataset(folder / "views", source)


def prepare_dataset(folder: Path, source: dict[str, Any], scaling: dict[str, str] | None = None) -> Path:
    """Prepare a dataset unless it is there."""
    if not (folder / "dataset.json").is_file():
        config = PrepareConfig.model_validate({"dataset": str(folder), "source": source, "scaling": scaling or {}})
        prepare(config, progress=lambda text: None)
    return folder


def train_model(dataset: Path, settings: dict[str, Any], epochs: int, seed: int) -> DMVAE:
    """Train in this process and return the model as it was at the best validation loss."""
    training = {**settings.get("training", {}), "epochs": epochs}
    tree = {**settings, "name": "run", "seed": seed, "data": {"dataset": str(dataset)}, "training": training}
    config = resolve(TrainConfig.model_validate(tree), open_dataset(dataset))
    state, best = build_state(config, torch.device("cpu")), dict[str, torch.Tensor]()
    for event in train(state, WorkerData(config, 0, 1, torch.float32), config, Collectives(state.model)):
        if isinstance(event, EpochEnded) and event.improved:
            best = {name: tensor.clone() for name, tensor in state.model.state_dict().items()}
    state.model.load_state_dict(best)
    return state.model.eval()


def fit_prior(model: DMVAE, rows: Batch, with_private: bool) -> FittedPrior:
    """Fit the prior that the model's objective asks for, or one with every p(z_p | z_s) fitted."""
    config = model.config
    model.config = config.model_copy(update={"cross": "posterior"}) if with_private else config
    try:
        return fit_density(model, rows)
    finally:
        model.config = config


def run(data: str, folder: Path, seeds: int, epochs: int) -> list[dict[str, Any]]:
    """Train and judge all models of one dataset; print a line for each, then the table."""
    dataset = make_views(folder) if data == "views" else prepare_dataset(folder / "digits", {"kind": "digits"})
    opened = open_dataset(dataset)
    train_rows, test = (
        first_rows(opened.split(name)) for name in ("train", "test" if data == "views" else "test_complete")
    )
    classifiers = {name: fit_classifier(train_rows, name) for name in train_rows.data}
    judge, records, dims = Judge(train_rows, test, classifiers), [], 0
    for name, settings in RUNS[data].items():
        for seed in range(seeds):
            start = time.process_time()
            model = train_model(dataset, settings, epochs, seed)
            seconds = time.process_time() - start
            dims = model.config.latent_dim + sum(model.config.private_dims.values())
            probes = probe_labels(collect(model, train_rows, True), collect(model, test, True))
            private = [share.rate for block, share in probes.items() if block != "shared"]
            for latents in LATENTS:
                density = None if latents == "prior" else fit_prior(model, train_rows, latents == "private too")
                figures = judge.figures(model, density)
                figures["probe z_s"], figures["probe z_p"] = probes["shared"].rate, float(np.mean(private))
                records.append({"settings": name, "latents": latents, "seed": seed, **figures})
                print(data, json.dumps(records[-1] | {"cpu_seconds": round(seconds, 1)}), flush=True)
    print_table(data, records, judge, dims)
    return records


def print_table(data: str, records: list[dict[str, Any]], judge: Judge, latent_dim: int) -> None:
    """Print means over seeds, the spread behind, and the baselines."""
    names = [name for name in records[0] if name not in ("settings", "latents", "seed")]
    print(f"\n{data}: mean over {1 + max(r['seed'] for r in records)} seeds (standard deviation over seeds)")
    print(f"| {'settings':<8} | {'latents':<11} | " + " | ".join(f"{name:>14}" for name in names) + " |")
    print("|---|---|" + "---|" * len(names))
    for settings in RUNS[data]:
        for latents in LATENTS:
            mine = [r for r in records if (r["settings"], r["latents"]) == (settings, latents)]
            cells = [f"{np.mean([r[n] for r in mine]):>6.3f} ({np.std([r[n] for r in mine]):.3f})" for n in names]
            print(f"| {settings:<8} | {latents:<11} | " + " | ".join(f"{cell:>14}" for cell in cells) + " |")
    baselines, left_out = fit_baselines(judge.train, latent_dim, fit_factor_analysis([judge.train], judge.train))
    for baseline, imputer in baselines.items():
        errors = [baseline_errors(imputer, judge.test, name).rmse for name in judge.test.data]
        print(f"baseline {baseline:<18} imputation {np.mean(errors):.3f}")
    for baseline, reason in left_out.items():
        print(f"baseline {baseline:<18} left out: {reason}")
    ceilings = {name: round(classifier_accuracy(c, judge.test, name).rate, 3) for name, c in judge.classifiers.items()}
    print(f"classifiers on real rows (the ceiling of coherence): {ceilings}\n", flush=True)


def main() -> None:
    """Run what the command line asks for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--epochs", type=int, default=60)
    parser.add_argument("--data", nargs="+", default=["views", "digits"], choices=sorted(RUNS))
    chosen = parser.parse_args()
    torch.set_num_threads(1)
    for data in chosen.data:
        run(data, chosen.folder, chosen.seeds, chosen.epochs)


if __name__ == "__main__":
    main()
