"""The field: ours as `jobs.inspect` proposes it, four models of MultiVae, and the baselines, on three data sets.

    python -m tests.benchmarks.field FOLDER [--seeds 3] [--epochs N] [--data views digits cells]

Data: scikit-learn's digits as four views of 16 pixels, the demo's paired digits, and scikit-learn's breast cancer rows
as three tables of ten measurements of the cells (mean, standard error and largest value), which no setting was chosen
on. Training rows are complete, or half of the modalities are missing; test rows are complete. The models of MultiVae
have the networks, batches and steps of ours, a fixed likelihood scale of half the training deviation, and settings of
their own otherwise. Every model keeps the weights of its best validation. What is done is kept in FOLDER/field.jsonl,
and the same command resumes.
"""

import argparse
import copy
import json
import time
import tomllib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dmvae.config.inspect import InspectConfig
from dmvae.config.training import TrainConfig
from dmvae.data.batch import Batch, has
from dmvae.data.reading.dataset import open_dataset
from dmvae.evaluation.baselines import fit_baselines
from dmvae.evaluation.factor_analysis import fit_factor_analysis
from dmvae.evaluation.imputation import baseline_errors, held_out_errors
from dmvae.evaluation.latents import Latents, collect, fit_probes, probe_share
from dmvae.evaluation.metrics import Classifier, Proportion, classifier_accuracy, conditional_coherence, fit_classifier
from dmvae.evaluation.suite import first_rows
from dmvae.model.dmvae import DMVAE
from dmvae.report.dataset_overview import inspect
from dmvae.training.loop import EpochEnded, train
from dmvae.training.settings import resolve
from dmvae.training.setup import WorkerData, build_state
from dmvae.training.step import Collectives
from tests.benchmarks import multivae
from tests.benchmarks.quality_table import make_views, prepare_dataset

MISSING = {"complete": 0.0, "half missing": 0.5}
NAMES = ("mean", "error", "largest")  # of the tables of cells
_DRAWS, _NLL_ROWS, _NLL_DRAWS = 50, 128, 1000


@dataclass(frozen=True, eq=False)
class Arena:
    """One data set with one share of missing training rows."""

    dataset: Path
    train: Batch
    val: Batch
    test: Batch
    classifiers: dict[str, Classifier]

    @classmethod
    def open(cls, data: str, missing: float, folder: Path) -> "Arena":
        """Prepare a data set unless it is there, and read it."""
        place = folder / f"{data}-{missing:g}"
        if data == "digits":
            dataset = prepare_dataset(place, {"kind": "digits", "missing": missing})
        else:
            dataset = make_views(place, missing) if data == "views" else make_cells(place, missing)
        opened = open_dataset(dataset)
        train, val, test = (
            first_rows(opened.split(name)) for name in ("train", "val", "test_complete" if data == "digits" else "test")
        )
        return cls(dataset, train, val, test, {name: fit_classifier(train, name) for name in train.data})


def make_cells(folder: Path, missing: float) -> Path:
    """Write scikit-learn's breast cancer rows as three tables: mean, standard error and largest of ten measurements."""
    from sklearn.datasets import load_breast_cancer

    values, labels = load_breast_cancer(return_X_y=True)
    rng, rows = np.random.default_rng(0), len(labels)
    splits = rng.permutation(np.repeat(["train", "val", "test"], [rows - 250, 100, 150]))
    present = rng.random((rows, 3)) >= missing
    present[np.arange(rows), rng.integers(0, 3, rows)] = True
    tables = {}
    for number, name in enumerate(NAMES):
        tables[name] = values[:, 10 * number : 10 * (number + 1)].astype(np.float32)
        tables[f"mask.{name}"] = present[:, number] | (splits == "test")
    folder.mkdir(parents=True, exist_ok=True)
    np.savez(folder / "cells.npz", id=np.arange(rows), label=labels, split=splits, **tables)
    return prepare_dataset(
        folder / "cells", {"kind": "npz", "path": str(folder / "cells.npz")}, dict.fromkeys(NAMES, "standardise")
    )


def proposed(dataset: Path, epochs: int | None, seed: int) -> TrainConfig:
    """Return the run that `jobs.inspect` proposes, resolved."""
    run = inspect(InspectConfig(dataset=str(dataset)), progress=lambda text: None).run
    assert run is not None
    tree = tomllib.loads(run) | {"seed": seed}
    if epochs is not None:
        tree["training"] = tree["training"] | {"epochs": epochs}
    return resolve(TrainConfig.model_validate(tree), open_dataset(dataset))


def train_ours(config: TrainConfig) -> tuple[DMVAE, int]:
    """Train in this process; return the model of the best validation, and the number of steps."""
    state, best, steps = build_state(config, torch.device("cpu")), dict[str, Tensor](), 0
    for event in train(state, WorkerData(config, 0, 1, torch.float32), config, Collectives(state.model)):
        steps = max(steps, event.global_step)
        if isinstance(event, EpochEnded) and event.improved:
            best = copy.deepcopy(state.model.state_dict())
    state.model.load_state_dict(best)
    return state.model.eval(), steps


def train_peer(kind: str, arena: Arena, config: TrainConfig, steps: int) -> Any:
    """Train a model of MultiVae with our networks for as many steps; return it as it was at its best validation."""
    torch.manual_seed(config.seed)
    tree = config.model.model_dump()
    private = max(1, *config.model.private_dims.values())
    tree |= {"modalities_specific_dim": private, "modalities_specific_betas": None, "decoder_dist_params": None}
    ours = DMVAE(type(config.model).model_validate(tree))
    scales = {name: deviation / 2 for name, deviation in deviations(arena.train).items()}
    model = multivae.peer(kind, ours, scales)
    optimizer = torch.optim.Adam(model.parameters(), lr=config.optim.learning_rate)
    size, generator = config.training.batch_size, torch.Generator().manual_seed(config.seed)
    least, best, done = float("inf"), copy.deepcopy(model.state_dict()), 0
    while done < steps:
        model.train()
        for rows in torch.randperm(len(arena.train), generator=generator).tensor_split(-(-len(arena.train) // size))[
            : steps - done
        ]:
            optimizer.zero_grad()
            model(multivae.inputs(arena.train[rows])).loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 10.0)
            optimizer.step()
            done += 1
        with torch.random.fork_rng():  # with gradients, whose hooks are part of a loss of theirs
            torch.manual_seed(0)
            loss = float(model.eval()(multivae.inputs(arena.val)).loss.detach())
        if loss < least:
            least, best = loss, copy.deepcopy(model.state_dict())
    model.load_state_dict(best)
    return model.eval()


def deviations(rows: Batch) -> dict[str, float]:
    """Return the root of each modality's mean variance over features."""
    found = {}
    for name, values in rows.data.items():
        known = values[has(rows, name)].flatten(1).double()
        found[name] = float(known.var(0, unbiased=False).mean().sqrt())
    return found


def judge_ours(model: DMVAE, arena: Arena) -> dict[str, float]:
    """Return error, coherence from all others, NLL and probes of a model of ours."""
    names = model.config.modalities
    errors = [held_out_errors(model, arena.test, name, _DRAWS).rmse for name in names]
    shares = (
        conditional_coherence(model, arena.test, classifier, [other for other in names if other != name], name)
        for name, classifier in arena.classifiers.items()
    )
    train, test = (collect(model, rows, True) for rows in (arena.train, arena.test))
    probes = {name: probe_share(probe, test, name).rate for name, probe in fit_probes(train).items()}
    return {
        "error": mean(errors),
        "coherence": sum(shares, Proportion()).rate,
        "nll": float(model.joint_nll(arena.test[:_NLL_ROWS], _NLL_DRAWS).nll.mean()),
        "probe shared": probes.pop("shared"),
        "probe private": mean(probes.values()),
    }


@torch.no_grad()
def judge_peer(model: Any, arena: Arena) -> dict[str, float]:
    """Return error, coherence from all others and the probe of the shared latent of a model of MultiVae."""
    torch.manual_seed(0)
    errors, hits = [], Proportion()
    for name, classifier in arena.classifiers.items():
        others = [other for other in arena.test.data if other != name]
        draws = torch.cat([their_draws(model, part, others, name) for part in pieces(arena.test)], dim=1)
        truth = arena.test.data[name].flatten(1).double()
        errors.append(float((draws.double().mean(0).flatten(1) - truth).square().mean().sqrt()))
        hits += classifier_accuracy(classifier, Batch({name: draws[0]}, labels=arena.test.labels), name)
    train, test = (their_latents(model, rows) for rows in (arena.train, arena.test))
    probe = probe_share(fit_probes(train)["shared"], test, "shared").rate
    return {"error": mean(errors), "coherence": hits.rate, "probe shared": probe}


def their_draws(model: Any, rows: Batch, given: list[str], name: str) -> Tensor:
    """Return draws of one modality given others, `(draw, row, *shape)`."""
    output = model.predict(multivae.inputs(rows), cond_mod=given, gen_mod=name, N=_DRAWS)[name]
    draws: Tensor = output.reshape(_DRAWS, len(rows), *rows.data[name].shape[1:])
    return draws


def their_latents(model: Any, rows: Batch) -> Latents:
    """Return the posterior means of the shared latent given what each row has."""
    shared = torch.zeros(len(rows), model.latent_dim, dtype=torch.float64)
    names = list(rows.data)
    present = torch.stack([has(rows, name) for name in names], dim=1)
    for pattern in torch.unique(present, dim=0):
        chosen = (present == pattern).all(1)
        given = [name for name, here in zip(names, pattern.tolist(), strict=True) if here]
        part = Batch({name: values[chosen] for name, values in rows.data.items()})
        encoded = model.encode(multivae.inputs(part), cond_mod=given, return_mean=True)
        shared[chosen] = encoded.z.reshape(len(part), -1)[:, : model.latent_dim].double()
    return Latents(shared, {}, {"rows": torch.ones(len(rows), dtype=torch.bool)}, rows.labels)


def pieces(rows: Batch, size: int = 250) -> Iterator[Batch]:
    """Cut complete rows into pieces, without masks."""
    for start in range(0, len(rows), size):
        part = rows[start : start + size]
        yield Batch(part.data, labels=part.labels)


def judge_baselines(arena: Arena) -> dict[str, dict[str, float]]:
    """Return the figures of each baseline, which do not depend on a seed."""
    start = time.process_time()
    factors = fit_factor_analysis(arena.train, arena.train)
    fitted = time.process_time() - start
    found = {}
    for name, imputer in fit_baselines(arena.train, min(20, factors.layout.num_features - 1), factors)[0].items():
        start = time.process_time()
        found[name] = {"error": mean(baseline_errors(imputer, arena.test, other).rmse for other in arena.test.data)}
        if name == "factor_analysis":
            found[name]["nll"] = -float(factors.log_prob(arena.test[:_NLL_ROWS]).mean())
        uses_factors = name not in ("mean", "ridge", "pca")
        found[name]["cpu_seconds"] = time.process_time() - start + uses_factors * fitted
    return found


def mean(values: Iterable[float]) -> float:
    """Return the mean."""
    return float(np.mean(list(values)))


class Records:
    """Figures of (data, missing, model, seed), kept in a file of JSON lines."""

    def __init__(self, file: Path) -> None:
        self.file = file
        lines = file.read_text().splitlines() if file.is_file() else []
        self.figures = {tuple(record["key"]): record["figures"] for record in map(json.loads, lines)}

    def add(self, key: tuple[str, str, str, int], figures: dict[str, float]) -> dict[str, float]:
        """Keep figures."""
        self.figures[key] = figures
        line = json.dumps({"key": key, "figures": figures})
        with self.file.open("a") as file:
            file.write(line + "\n")
        print(line, flush=True)
        return figures


def run(data: str, missing: str, folder: Path, seeds: int, epochs: int | None, records: Records) -> None:
    """Train and judge what is not in the records yet."""
    arena = Arena.open(data, MISSING[missing], folder)
    if (data, missing, "mean", 0) not in records.figures:
        for name, figures in judge_baselines(arena).items():
            records.add((data, missing, name, 0), figures)
    for seed in range(seeds):
        config, key = proposed(arena.dataset, epochs, seed), (data, missing, "ours, proposed", seed)
        if key not in records.figures:
            start = time.process_time()
            model, steps = train_ours(config)
            seconds = time.process_time() - start
            records.add(key, judge_ours(model, arena) | {"steps": steps, "cpu_seconds": seconds})
        for kind in multivae.PEERS:
            if (data, missing, f"MultiVae {kind}", seed) not in records.figures:
                start = time.process_time()
                peer = train_peer(kind, arena, config, int(records.figures[key]["steps"]))
                seconds = time.process_time() - start
                records.add(
                    (data, missing, f"MultiVae {kind}", seed), judge_peer(peer, arena) | {"cpu_seconds": seconds}
                )


def print_table(records: Records) -> None:
    """Print means over seeds, with standard deviations over seeds; processor time is over that of ours."""
    names = ["error", "coherence", "nll", "probe shared", "probe private", "cpu / ours"]
    for data, missing in dict.fromkeys(key[:2] for key in records.figures):
        mine = {key: figures for key, figures in records.figures.items() if key[:2] == (data, missing)}
        ours = mean(figures["cpu_seconds"] for key, figures in mine.items() if key[2].startswith("ours"))
        print(f"\n{data}, {missing}\n\n| model | {' | '.join(names)} |\n|---|{'---|' * len(names)}")
        for model in dict.fromkeys(key[2] for key in mine):
            rows = [figures | {"cpu / ours": figures["cpu_seconds"] / ours} for key, figures in mine.items()
                    if key[2] == model]  # fmt: skip
            cells = [[figures[name] for figures in rows if name in figures] for name in names]
            print(f"| {model} | {' | '.join(map(_cell, cells))} |", flush=True)


def _cell(values: list[float]) -> str:
    spread = f" ± {np.std(values):.2g}" if len(values) > 1 else ""
    return f"{np.mean(values):.4g}{spread}" if values else ""


def main() -> None:
    """Run what the command line asks for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--epochs", type=int, help="in place of the proposed number")
    parser.add_argument("--data", nargs="+", default=["views", "digits", "cells"], choices=["views", "digits", "cells"])
    chosen = parser.parse_args()
    torch.set_num_threads(1)
    multivae.install()
    chosen.folder.mkdir(parents=True, exist_ok=True)
    records = Records(chosen.folder / "field.jsonl")
    for data in chosen.data:
        for missing in MISSING:
            run(data, missing, chosen.folder, chosen.seeds, chosen.epochs, records)
    print_table(records)


if __name__ == "__main__":
    main()
