"""The NLL's estimators against a long annealed importance sampling from the prior, which shares nothing with them.

    python -m tests.benchmarks.nll_table FOLDER [--models demo narrow] [--rows 100]

`demo` is the model that `make demo` trains; `narrow` has wider networks and a small fixed likelihood scale, and is
trained here. Writes `FOLDER/nll.md`; references are kept in FOLDER, so that the same command goes on with them.
"""

import argparse
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from dmvae import DMVAE, Batch
from dmvae.data.reading.dataset import open_dataset
from dmvae.model.nll.estimate import NLLEstimate
from tests.annealed import annealed_log_prob
from tests.benchmarks.quality_table import train_model

NARROW: dict[str, Any] = {
    "latent_dim": 10,
    "modalities_specific_dim": {"mnist": 4, "optdigits": 3},
    "decoder_dist_params": {"mnist": {"scale": 0.3}, "optdigits": {"scale": 0.3}},
    "architectures": {"mnist": {"hidden_dims": [256]}, "optdigits": {"hidden_dims": [256]}},
}
ESTIMATORS = (("encoder", 1000), ("encoder", 10000), ("refined", 1000), ("refined", 3000))
LONG = 20000
_AT_ONCE = 24  # rows whose chains run together


@dataclass(frozen=True)
class References:
    """What estimates of some rows are held against, in nats: annealing with its error, and a long refined run."""

    annealed: np.ndarray
    annealed_se: np.ndarray
    long: np.ndarray
    long_se: np.ndarray
    long_trusted: np.ndarray


def refer(model: DMVAE, batch: Batch, temperatures: int, chains: int, say: Callable[[str], None]) -> References:
    """Make both references."""
    parts = []
    for start in range(0, len(batch), _AT_ONCE):
        clock = time.perf_counter()
        parts.append(annealed_log_prob(model, batch[start : start + _AT_ONCE], temperatures, chains, seed=start))
        say(f"annealed {min(start + _AT_ONCE, len(batch))} of {len(batch)} rows, {time.perf_counter() - clock:.0f} s")
    long = model.joint_nll(batch, LONG, 500, seed=99)
    return References(
        -torch.cat([part.log_prob for part in parts]).numpy(),
        torch.cat([part.se for part in parts]).numpy(),
        long.nll.numpy(),
        long.se.numpy(),
        long.trusted.numpy(),
    )


def kept(file: Path, make: Callable[[], References]) -> References:
    """Read references, or make and write them."""
    if not file.is_file():
        np.savez(file, **vars(make()))
    with np.load(file) as arrays:
        return References(**arrays)


def lines(model: DMVAE, batch: Batch, references: References) -> Iterator[str]:
    """Yield a row of the table for each estimator."""
    for proposal, draws in ESTIMATORS:
        clock = time.perf_counter()
        estimate = model.joint_nll(batch, draws, 500, proposal=proposal)
        seconds = (time.perf_counter() - clock) / len(batch)
        yield line(f"`{proposal}`, K = {draws:,}", estimate, references, seconds)


def line(name: str, estimate: NLLEstimate, references: References, seconds: float) -> str:
    """Write how far an estimate is from both references."""
    nll, se, trusted = estimate.nll.numpy(), estimate.se.numpy(), estimate.trusted.numpy()
    error, noise = nll - references.annealed, references.annealed_se
    covered = np.abs(error) <= 2 * np.hypot(se, noise)
    rmse = np.sqrt(np.mean(error**2))
    own = np.sqrt(max(0.0, float(np.mean(error**2) - np.mean(noise**2))))
    from_long = np.sqrt(np.mean((nll - references.long) ** 2))
    cover = f"{covered[trusted].mean():.0%}" if trusted.any() else "none left"
    spent, flagged = float(estimate.decoder_rows.double().mean()), 1 - trusted.mean()
    errors = f"{rmse:.3f} | {own:.3f} | {np.median(np.abs(error)):.3f} | {error.mean():+.3f} | {from_long:.3f}"
    return f"| {name} | {spent:,.0f} | {errors} | {flagged:.0%} | {cover} | {1000 * seconds:.0f} |"


def table(name: str, model: DMVAE, batch: Batch, references: References) -> str:
    """Write one model's table."""
    noise = np.sqrt(np.mean(references.annealed_se**2))
    apart = references.long - references.annealed
    head = (
        f"\n{name}: {len(batch)} rows; errors in nats a row. Annealing has a standard error of {noise:.3f} (root mean "
        f"square); `refined` with K = {LONG:,} is {np.sqrt(np.mean(apart**2)):.3f} from it (mean {apart.mean():+.3f}, "
        f"{1 - references.long_trusted.mean():.0%} flagged).\n\n"
        "| estimator | decoder rows spent | RMSE from annealing | the same, less its noise | median error | "
        "mean error | RMSE from long `refined` | rows flagged | 2 se cover annealing, others | ms a row |\n"
        "|---|---|---|---|---|---|---|---|---|---|\n"
    )
    return head + "\n".join(lines(model, batch, references)) + "\n"


def load(name: str, chosen: argparse.Namespace) -> DMVAE:
    """Read the demo's model, or train the narrow one once."""
    if name == "demo":
        return DMVAE.load(chosen.model)
    folder = chosen.folder / "narrow"
    if not (folder / "model.json").is_file():
        train_model(Path(chosen.dataset), NARROW, chosen.epochs, seed=0).save(folder)
    return DMVAE.load(folder)


def main() -> None:
    """Run what the command line asks for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--models", nargs="+", default=["demo"], choices=["demo", "narrow"])
    parser.add_argument("--model", default="runs/digits/best")
    parser.add_argument("--dataset", default="data/digits")
    parser.add_argument("--rows", type=int, default=100)
    parser.add_argument("--temperatures", type=int, default=4000)
    parser.add_argument("--chains", type=int, default=16)
    parser.add_argument("--epochs", type=int, default=20, help="of the narrow model")
    chosen = parser.parse_args()
    torch.set_num_threads(1)
    chosen.folder.mkdir(parents=True, exist_ok=True)
    batch = open_dataset(chosen.dataset).split("test").read(np.arange(chosen.rows))
    tables = []
    for name in chosen.models:
        model = load(name, chosen)
        file = chosen.folder / f"{name}-{chosen.rows}-{chosen.temperatures}-{chosen.chains}.npz"

        def make(model: DMVAE = model) -> References:
            return refer(model, batch, chosen.temperatures, chosen.chains, lambda text: print(text, flush=True))

        tables.append(table(name, model, batch, kept(file, make)))
        print(tables[-1], flush=True)
    (chosen.folder / "nll.md").write_text("".join(tables))


if __name__ == "__main__":
    main()
