"""Which validation figure ranks configurations as their predictions, their samples and their density do?

    python -m tests.benchmarks.objective_choice FOLDER [--data views digits] [--configurations 20]

Configurations are drawn at random from the default search's space around the settings that `jobs.inspect` proposes,
which are the first one. Each is trained and judged on validation rows after a quarter of its epochs and at the end;
then, at the end, on complete test rows. The table has Spearman's rank correlation of each validation figure with the
test's imputation, coherence and NLL: 1 is the same order. `worst` is the least of them over figures and datasets.
`chosen` is the place, of all configurations, of the one that the figure would choose.

`within base NLL` is the imputation error where the joint NLL is at most that of the first configuration, and worse than
all of these where it is not. `log score` and `energy score` judge draws of the prediction. `subset NLL` is the NLL of a
row's other modalities given a random subset. `per value` means nats per observed value.
"""

import argparse
import json
import time
from pathlib import Path
from typing import Any

import numpy as np
import optuna
import torch
from scipy.stats import rankdata, spearmanr

from dmvae.config.search import DEFAULT_SPACE, SearchConfig, lay_over
from dmvae.config.training import TrainConfig
from dmvae.data.batch import Batch, has
from dmvae.data.reading.dataset import open_dataset
from dmvae.evaluation.imputation import held_out_errors
from dmvae.evaluation.masking import mask_modalities
from dmvae.evaluation.metrics import Proportion, conditional_coherence, fit_classifier
from dmvae.evaluation.search_objectives import ObjectiveEvaluator
from dmvae.evaluation.suite import first_rows
from dmvae.model.dmvae import DMVAE
from dmvae.platform.tune.study import draw
from dmvae.training.loop import EpochEnded, train
from dmvae.training.settings import resolve
from dmvae.training.setup import WorkerData, build_state
from dmvae.training.step import Collectives
from tests.benchmarks.quality_table import RUNS, make_views, prepare_dataset

EPOCHS = {"views": 40, "digits": 10}
ROWS, DRAWS, PREDICTIONS = 128, 100, 30
TARGETS = ("imputation", "coherence", "joint NLL")


def main() -> None:
    """Train, judge and write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--data", nargs="+", default=["views", "digits"], choices=sorted(EPOCHS))
    parser.add_argument("--configurations", type=int, default=20)
    arguments = parser.parse_args()
    arguments.folder.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)
    tables = {}
    for data in arguments.data:
        tables[data] = run(data, arguments.folder, arguments.configurations)
        (arguments.folder / f"objective_choice-{data}.json").write_text(json.dumps(tables[data], indent=2) + "\n")
    print(markdown(tables))


def run(data: str, folder: Path, num: int) -> list[dict[str, Any]]:
    """Train and judge the configurations of one dataset."""
    where = make_views(folder) if data == "views" else prepare_dataset(folder / "digits", {"kind": "digits"})
    dataset, epochs = open_dataset(where), EPOCHS[data]
    tree = {**RUNS[data]["now"], "name": "run", "data": {"dataset": str(where)}}
    tree["training"] = {**tree.get("training", {}), "epochs": epochs}
    space = {path: domain for path, domain in DEFAULT_SPACE.items() if path != "model.cross"}
    config = SearchConfig(name="choice", base=TrainConfig.model_validate(tree), trials=num, space=space)
    validation = ObjectiveEvaluator(dataset.split("train"), dataset.split("val"), ROWS, DRAWS)
    test = first_rows(dataset.split("test" if data == "views" else "test_complete"), 300)
    classifiers = {name: fit_classifier(first_rows(dataset.split("train"), 4096), name) for name in test.data}
    sampler, table = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=1)), []
    for number in range(num):
        chosen = draw(sampler.ask(), config) if number else {}
        resolved = resolve(lay_over(config.base, chosen, "trial", tuple(dataset.manifest.modalities)), dataset)
        state, record = build_state(resolved, torch.device("cpu")), {"chosen": chosen}
        start = time.process_time()
        for event in train(state, WorkerData(resolved, 0, 1, torch.float32), resolved, Collectives(state.model)):
            moment = (
                {epochs // 4: "early", epochs: "end"}.get(event.epoch + 1) if isinstance(event, EpochEnded) else None
            )
            if moment:
                state.model.eval()
                record[moment] = {"loss": event.metrics["val/loss"], **judge(state.model, validation)}
                state.model.train()
        state.model.eval()
        record["test"] = tested(state.model, test, validation, classifiers)
        record["cpu_seconds"] = time.process_time() - start
        table.append(record)
        print(data, number, json.dumps(record), flush=True)
    return table


def judge(model: DMVAE, evaluator: ObjectiveEvaluator) -> dict[str, float]:
    """Return the candidates."""
    rows = evaluator.rows
    sizes = {name: int(np.prod(shape)) for name, shape in model.config.shapes.items()}
    values = sum(has(rows, name).double() * size for name, size in sizes.items())
    errors, log_scores, energies = [], [], []
    for name in model.config.modalities:
        here = rows[evaluator.is_predictable(name).nonzero().squeeze(1)]
        errors.append(held_out_errors(model, here, name, PREDICTIONS).rmse / evaluator.deviations[name])
        log_score, energy = scores(model, here, name, evaluator.deviations[name])
        log_scores.append(log_score)
        energies.append(energy)
    joint = model.joint_nll(rows, DRAWS).nll
    several = torch.stack([has(rows, name) for name in sizes]).sum(0) > 1
    conditional = joint[several] - model.joint_nll(subset_of(rows[several]), DRAWS).nll
    error, per_value = float(np.mean(errors)), float(joint.sum() / values.sum())
    return {
        "imputation": error,
        "joint NLL": float(joint.mean()),
        "subset NLL": float(conditional.mean()),
        "log score": float(np.mean(log_scores)),
        "energy score": float(np.mean(energies)),
        "log imputation + joint NLL per value": float(np.log(errors).mean()) + per_value,
        "log imputation + 1/2 joint NLL per value": float(np.log(errors).mean()) + 0.5 * per_value,
        "log imputation + 1/4 joint NLL per value": float(np.log(errors).mean()) + 0.25 * per_value,
    }


def subset_of(rows: Batch) -> Batch:
    """Return rows of several modalities with a random subset of them each, neither none nor all."""
    names = list(rows.data)
    there = torch.stack([has(rows, name) for name in names], dim=1)
    rng = np.random.default_rng(0)
    order = torch.from_numpy(rng.random(there.shape)).masked_fill(~there, 2.0).argsort(1).argsort(1)
    size = torch.from_numpy(rng.integers(1, there.sum(1).numpy())).unsqueeze(1)
    kept = dict(zip(names, (order < size).unbind(1), strict=True))
    return Batch(rows.data, kept, ids=rows.ids)


def scores(model: DMVAE, rows: Batch, name: str, deviation: float) -> tuple[float, float]:
    """Return the log score in nats per row, and the energy score, of draws of one modality given the others."""
    generator = torch.Generator().manual_seed(0)
    others = [other for other in model.config.modalities if other != name]
    given = mask_modalities(rows, name)
    output = model.predict(given, others, name, PREDICTIONS, generator=generator)[name]
    truth, likelihood = rows.data[name].to(output), model.likelihoods[name]
    with torch.no_grad():
        log_p = torch.stack(
            [likelihood.log_prob(one, truth) for one in output.reshape(PREDICTIONS, len(rows), *likelihood.shape)]
        )
        drawn = likelihood.sample(output, generator).reshape(PREDICTIONS, len(rows), -1) / deviation
    far = (drawn - truth.flatten(1) / deviation).square().mean(-1).sqrt().mean(0)
    half = PREDICTIONS // 2
    apart = (drawn[:half] - drawn[half : 2 * half]).square().mean(-1).sqrt().mean(0)
    log_score = np.log(PREDICTIONS) - torch.logsumexp(log_p, dim=0)
    return float(log_score.mean()), float((far - 0.5 * apart).mean())


def tested(model: DMVAE, rows: Batch, evaluator: ObjectiveEvaluator, classifiers: dict[str, Any]) -> dict[str, float]:
    """Return what a configuration is worth."""
    names = model.config.modalities
    errors = [held_out_errors(model, rows, name, 50).rmse / evaluator.deviations[name] for name in names]
    shown = [
        conditional_coherence(model, rows, classifier, [other for other in names if other != name], name)
        for name, classifier in classifiers.items()
    ]
    return {
        "imputation": float(np.mean(errors)),
        "coherence": sum(shown, Proportion()).rate,
        "joint NLL": float(model.joint_nll(rows[:150], 200).nll.mean()),
    }


def candidates(table: list[dict[str, Any]], moment: str) -> dict[str, np.ndarray]:
    """Return each candidate's value of every configuration; less is better."""
    found = {name: np.array([row[moment][name] for row in table]) for name in table[0][moment]}
    nll, error = found["joint NLL"], found["imputation"]
    return found | {"within base NLL": np.where(nll <= nll[0] + 1e-9, error - 1e6, nll)}


def markdown(tables: dict[str, list[dict[str, Any]]]) -> str:
    """Return the table of rank correlations."""
    head = [f"{data}: {target}" for data in tables for target in TARGETS]
    lines = [f"| validation figure | worst | {' | '.join(head)} | chosen: places |", "|---" * (len(head) + 3) + "|"]
    for moment in ("early", "end"):
        for name in candidates(next(iter(tables.values())), moment):
            cells, places = [], []
            for table in tables.values():
                values = candidates(table, moment)[name]
                for target in TARGETS:
                    worth = np.array([row["test"][target] for row in table]) * (-1 if "coherence" in target else 1)
                    cells.append(float(spearmanr(values, worth).statistic))
                    places.append(int(rankdata(worth)[values.argmin()]))
            when = "a quarter of the epochs" if moment == "early" else "the end"
            shown = " | ".join(f"{cell:.2f}" for cell in cells)
            lines.append(f"| {name}, {when} | {min(cells):.2f} | {shown} | {' '.join(map(str, places))} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
