"""What a search finds: TPE from the shipped configuration, random search of the same budget, the shipped one alone.

    python -m tests.benchmarks.search_quality FOLDER [--dataset data/digits] [--trials 10] [--seeds 3]

Every seed is of the proposals and of the weights. The study's own objective is a validation figure; beside it are the
best models' figures on complete test rows. Differences are paired by seed.
"""

import argparse
import json
from pathlib import Path

import numpy as np

from dmvae.cli import read_toml
from dmvae.config.search import SearchConfig
from dmvae.data.reading.dataset import open_dataset
from dmvae.evaluation.search_objectives import ObjectiveEvaluator
from dmvae.model.dmvae import DMVAE
from dmvae.platform.tune.search import search

SIDES = ("search", "random", "shipped")


def main() -> None:
    """Run the searches and write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--dataset", default="data/digits")
    parser.add_argument("--trials", type=int, default=10)
    parser.add_argument("--seeds", type=int, default=3)
    arguments = parser.parse_args()
    shipped = read_toml(SearchConfig, Path("jobs/configs/search.toml"))
    dataset = open_dataset(arguments.dataset)
    judge = ObjectiveEvaluator(dataset.split("train"), dataset.split("test_complete"), 1000, 200)
    rows = []
    for seed in range(arguments.seeds):
        base = shipped.base.model_dump(exclude_unset=True) | {"seed": seed}
        base["data"] = {"dataset": str(Path(arguments.dataset).absolute())}
        base["tracking"] = {"uri": f"sqlite:///{arguments.folder.absolute()}/mlflow.db"}
        for side in SIDES:
            changes = {
                "search": {"trials": arguments.trials},
                "random": {"trials": arguments.trials, "sampler": "random", "start_from": ()},
                "shipped": {"trials": 1},
            }[side]
            tree = shipped.model_dump(exclude={"base"}) | {"name": f"{side}-{seed}", "seed": seed, "base": base}
            tree |= {"runs_dir": str(arguments.folder), "retrain": {"how": "none"}, **changes}
            found = search(SearchConfig.model_validate(tree), print)
            best = found.best[0]
            assert best.result is not None
            merits = judge.evaluate(DMVAE.load(best.folder / "best"), ("joint_nll", "coherence", "imputation"))
            names = ("joint_nll", "coherence", "imputation")
            rows.append(
                {"side": side, "seed": seed, "objective": best.result.figures["imputation"]}
                | {f"test {name}": merits[name].value for name in names}
            )
            print(rows[-1], flush=True)
    (arguments.folder / "search_quality.json").write_text(json.dumps(rows, indent=2) + "\n")
    text = markdown(rows)
    (arguments.folder / "search_quality.md").write_text(text)
    print(text)


def markdown(rows: list[dict[str, float]]) -> str:
    keys = [key for key in rows[0] if key not in ("side", "seed")]
    lines = [f"| best of | {' | '.join(keys)} |", "|---" * (len(keys) + 1) + "|"]
    table = {side: {key: np.array([row[key] for row in rows if row["side"] == side]) for key in keys} for side in SIDES}
    lines += [f"| {side} | {' | '.join(f'{table[side][key].mean():.4g}' for key in keys)} |" for side in SIDES]
    for other in SIDES[1:]:
        differences = [table["search"][key] - table[other][key] for key in keys]
        cells = [f"{d.mean():+.3g} ± {d.std(ddof=1) / len(d) ** 0.5:.2g}" for d in differences]
        lines.append(f"| search less {other}, paired | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
