"""Which cheap validation figure ranks configurations as their final coherence and imputation do?

    python -m tests.benchmarks.objective_choice FOLDER [--dataset data/digits] [--configurations 12] [--epochs 60]

Configurations are drawn at random from the shipped search's space. Each is trained and judged on validation rows after
a quarter of its epochs and at the end; then, at the end, on complete test rows. The table has Spearman's rank
correlation of each validation figure, and of the loss, with the test's coherence and imputation: 1 is the same order.
"""

import argparse
import json
from pathlib import Path

import optuna
import torch
from scipy.stats import spearmanr

from dmvae.cli import read_toml
from dmvae.config.search import SearchConfig, lay_over
from dmvae.data.reading.dataset import open_dataset
from dmvae.evaluation.search_objectives import ObjectiveEvaluator
from dmvae.model.dmvae import DMVAE
from dmvae.platform.tune.study import draw
from dmvae.training.loop import EpochEnded, train
from dmvae.training.settings import resolve
from dmvae.training.setup import WorkerData, build_state
from dmvae.training.step import Collectives

FIGURES = ("imputation", "conditional_nll", "joint_nll", "coherence")


def main() -> None:
    """Train, judge and write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--dataset", default="data/digits")
    parser.add_argument("--configurations", type=int, default=12)
    parser.add_argument("--epochs", type=int, default=60)
    arguments = parser.parse_args()
    arguments.folder.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)
    config = read_toml(SearchConfig, Path("jobs/configs/search.toml"))
    dataset = open_dataset(arguments.dataset)
    cheap = ObjectiveEvaluator(dataset.split("train"), dataset.split("val"), 512, 200)
    final = ObjectiveEvaluator(dataset.split("train"), dataset.split("test_complete"), 1000, 200)
    sampler = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=1))
    table = []
    for number in range(arguments.configurations):
        chosen = draw(sampler.ask(), config)
        laid = lay_over(config.base, chosen, "trial", tuple(dataset.manifest.modalities))
        resolved = resolve(laid, dataset)
        resolved = resolved.model_copy(
            update={"training": resolved.training.model_copy(update={"epochs": arguments.epochs})}
        )
        state, figures = build_state(resolved, torch.device("cpu")), {}
        data = WorkerData(resolved, 0, 1, torch.float32)
        for event in train(state, data, resolved, Collectives(state.model)):
            if isinstance(event, EpochEnded):
                moment = {arguments.epochs // 4: "early", arguments.epochs: "end"}.get(event.epoch + 1)
                if moment:
                    figures |= {f"{moment}/loss": event.metrics["val/loss"], **judged(cheap, state.model, moment)}
        table.append({**chosen, **figures, **judged(final, state.model, "test")})
        print(number, {key: round(value, 4) for key, value in table[-1].items()}, flush=True)
    (arguments.folder / "objective_choice.json").write_text(json.dumps(table, indent=2) + "\n")
    text = markdown(table)
    (arguments.folder / "objective_choice.md").write_text(text)
    print(text)


def judged(judge: ObjectiveEvaluator, model: DMVAE, moment: str) -> dict[str, float]:
    model.eval()
    merits = judge.evaluate(model, FIGURES)
    model.train()
    return {f"{moment}/{name}": merits[name].value for name in FIGURES}


def markdown(table: list[dict[str, float]]) -> str:
    lines = ["| validation figure | test coherence | test imputation |", "|---|---|---|"]
    for moment in ("early", "end"):
        for name in ("loss", *FIGURES):
            cells = []
            for target in ("coherence", "imputation"):
                ours, theirs = ([row[key] for row in table] for key in (f"{moment}/{name}", f"test/{target}"))
                # coherence is better where it is larger, everything else where it is smaller
                sign = -1 if (name == "coherence") != (target == "coherence") else 1
                cells.append(f"{sign * spearmanr(ours, theirs).statistic:.2f}")
            lines.append(
                f"| {name}, {'a quarter of the epochs' if moment == 'early' else 'the end'} | {' | '.join(cells)} |"
            )
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
