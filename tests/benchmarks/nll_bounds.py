"""The estimated NLL of models with 64 shared and 6 x 8 private latents, against closed forms and two-sided bounds.

    python -m tests.benchmarks.nll_bounds FOLDER [--rows 24] [--draws 500] [--seeds 4] [--steps 1500]

`linear` is a linear model, whose evidence is exact. `trained` is a model with a linear path beside a perceptron in each
network, trained here on rows of a random model of the same kind, with its own draws as rows: a draw comes with an exact
sample of its posterior, from which annealing in reverse bounds the NLL from below, as annealing forwards bounds it from
above (means over rows; Grosse et al. 2015, bidirectional Monte Carlo). `two views` is the same with four of its views
left out, where many posteriors are far from normal. Writes `FOLDER/nll_bounds.md`; the trained model is kept in FOLDER.
"""

import argparse
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from dmvae import DMVAE, Batch, DMVAEConfig
from dmvae.model.nll import estimate as nll
from dmvae.model.nll.annealing import AnnealedSampler, AnnealingPlan
from dmvae.model.nll.mixture_proposal import fit_mixture
from dmvae.nn.networks import DecoderOutput, EncoderOutput
from tests.linear_gaussian import exact_log_prob, linear_model, sample_rows

SIZES = {"a": 76, "b": 100, "c": 64, "d": 120, "e": 47, "f": 30}
SHARED, PRIVATE, HIDDEN, SCALE = 64, 8, 128, 0.5
FEW = ("e", "f")
_FIT_BUDGET, _MOVES, _CHAINS = 8000, 128, 128
_ROWS_OF_TRAINING, _BATCH = 4000, 128


class PathEncoder(nn.Module):
    """A matrix beside a perceptron."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.sizes = [SHARED, SHARED, PRIVATE, PRIVATE]
        self.path = nn.Linear(size, sum(self.sizes))
        last = nn.Linear(HIDDEN, sum(self.sizes))
        self.body = nn.Sequential(nn.Linear(size, HIDDEN), nn.LayerNorm(HIDDEN), nn.SiLU(), last)
        with torch.no_grad():
            last.weight *= 0.3
            self.path.weight *= 0.5

    def forward(self, x: Tensor) -> EncoderOutput:
        """Map rows to the posteriors' parameters."""
        return EncoderOutput(*(self.path(x) + self.body(x)).split(self.sizes, dim=-1))


class PathDecoder(nn.Module):
    """The mirror of `PathEncoder`."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.path = nn.Linear(SHARED + PRIVATE, size)
        self.body = nn.Sequential(nn.Linear(SHARED + PRIVATE, HIDDEN), nn.SiLU(), nn.Linear(HIDDEN, size))

    def forward(self, z: Tensor) -> DecoderOutput:
        """Map latents to the likelihood's location."""
        return DecoderOutput(self.path(z) + self.body(z))


def build(seed: int) -> DMVAE:
    """Return an untrained model."""
    torch.manual_seed(seed)
    config = DMVAEConfig(
        input_dims={name: (size,) for name, size in SIZES.items()},
        latent_dim=SHARED,
        modalities_specific_dim=PRIVATE,
        decoder_dist_params={name: {"scale": SCALE} for name in SIZES},
        sources="subsets",
        num_subsets=1,
    )
    encoders = {name: PathEncoder(size) for name, size in SIZES.items()}
    return DMVAE(config, encoders=encoders, decoders={name: PathDecoder(size) for name, size in SIZES.items()})


def teacher() -> DMVAE:
    """Return a model with random decoders, about half of whose variance is not linear in the latents."""
    model = build(seed=3)
    with torch.no_grad():
        for decoder in model.decoders.values():
            first, last = decoder.body[0], decoder.body[2]
            for layer, size in ((decoder.path, 1.0), (first, 1.5)):
                nn.init.normal_(layer.weight, std=size / math.sqrt(SHARED + PRIVATE))
            nn.init.normal_(first.bias)
            nn.init.normal_(last.weight, std=2 / math.sqrt(HIDDEN))
    return model


def draws(model: DMVAE, rows: int, seed: int) -> tuple[Batch, Tensor]:
    """Return draws of the model and the latents that they come from, one modality's after the other's."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        shared, *private = (torch.randn(rows, dim, generator=generator) for dim in (SHARED, *([PRIVATE] * len(SIZES))))
        data = {}
        for (name, size), own in zip(SIZES.items(), private, strict=True):
            location = model.decode_functions[name](torch.cat((shared, own), dim=1).to(model.dtype))
            data[name] = location + SCALE * torch.randn(rows, size, generator=generator).to(location)
    return Batch(data), torch.cat((shared, *private), dim=1).double()


def trained(folder: Path, steps: int) -> DMVAE:
    """Train the model on rows of the teacher, or read it."""
    file, model = folder / f"trained-{steps}.pt", build(seed=1)
    if file.is_file():
        model.load_state_dict(torch.load(file, weights_only=True))
        return model.eval()
    batch, _ = draws(teacher(), _ROWS_OF_TRAINING, seed=0)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for step in range(steps):
        loss = model(batch[torch.randint(_ROWS_OF_TRAINING, (_BATCH,))]).loss
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 100.0)
        optimizer.step()
        schedule.step()
        if step % 250 == 0:
            print(f"step {step} of {steps}: loss {loss.item():.1f}", flush=True)
    torch.save(model.state_dict(), file)
    return model.eval()


def active_units(model: DMVAE, batch: Batch) -> int:
    """Count shared latents whose posterior mean has a variance above .01 over rows."""
    mean = model.encode(batch, return_mean=True).z
    return int((mean.var(0) > 0.01).sum())


@dataclass(frozen=True)
class Bounds:
    """Estimates of log p(x_A) in nats, `(row,)`, whose means over rows are below and above the truth."""

    low: np.ndarray
    high: np.ndarray


def bounds(model: DMVAE, batch: Batch, latents: Tensor, names: tuple[str, ...]) -> Bounds:
    """Anneal from a fit to the posterior, and back from an exact sample of it."""
    known = list(SIZES)
    places = [*range(SHARED)]
    for name in names:
        start = SHARED + PRIVATE * known.index(name)
        places += range(start, start + PRIVATE)
    with torch.no_grad():
        keys = torch.arange(len(batch)) + 10**6
        modes = nll._forward_mode(model, names)
        rows = nll._gather(model, batch, keys, names, torch.arange(len(batch)), modes)
        components, _ = fit_mixture(rows, keys, _FIT_BUDGET, 500)
        sampler = AnnealedSampler(rows, components)
        plan = sampler.plan(keys, _CHAINS, 10**9)
        forwards = sampler.log_weights(plan, _MOVES, keys + 10**6, 0, _CHAINS)
        backwards = reverse_log_weights(sampler, plan, keys + 2 * 10**6, latents[:, places])
    log_num = math.log(_CHAINS)
    return Bounds((torch.logsumexp(forwards, 1) - log_num).numpy(), (log_num - torch.logsumexp(-backwards, 1)).numpy())


def reverse_log_weights(sampler: AnnealedSampler, plan: AnnealingPlan, keys: Tensor, exact: Tensor) -> Tensor:
    """Return log w of chains that go from exact samples of the posterior to the fit: E[1 / w] = 1 / p(x_A)."""
    chains = sampler._at(exact.unsqueeze(1).repeat(1, _CHAINS, 1))
    betas = plan.schedule(_MOVES)
    log_w = torch.zeros_like(chains.log_p)
    for number in reversed(range(_MOVES)):
        if number + 1 < _MOVES:
            chains, _ = sampler._move(chains, betas[number], plan.step_size, keys, 1 + number, 0)
        before = betas[number - 1] if number else torch.zeros_like(betas[0])
        log_w = log_w + (betas[number] - before).unsqueeze(1) * chains.log_ratio
    return log_w


def line(name: str, estimates: list[nll.NLLEstimate], truth: np.ndarray, doubt: str) -> str:
    """Write what the estimates of all seeds are worth."""
    values, se, trusted = (
        torch.stack([getattr(estimate, field) for estimate in estimates]).numpy() for field in ("nll", "se", "trusted")
    )
    error = values - truth
    rows = np.mean([estimate.decoder_rows.double().mean() for estimate in estimates])
    covered = np.mean(np.abs(error[trusted]) <= 2 * se[trusted]) if trusted.any() else math.nan
    rmse = np.sqrt(np.mean(error[trusted] ** 2)) if trusted.any() else math.nan
    return (
        f"| {name} | {rows:,.0f} | {1 - trusted.mean():.1%} | {rmse:.3f} | {error.mean():+.3f} | "
        f"{np.sqrt(np.mean(se[trusted] ** 2)):.3f} | {covered:.0%} | {doubt} |"
    )


def lines(folder: Path, chosen: argparse.Namespace) -> Iterator[str]:
    """Yield the rows of the table."""
    linear = linear_model({name: (size,) for name, size in SIZES.items()}, SHARED, PRIVATE, SCALE)
    batch = sample_rows(linear, chosen.rows)

    def estimates(model: DMVAE, batch: Batch, names: tuple[str, ...]) -> list[nll.NLLEstimate]:
        return [model.joint_nll(batch, chosen.draws, 500, seed, names) for seed in range(chosen.seeds)]

    yield line("linear", estimates(linear, batch, tuple(SIZES)), -exact_log_prob(linear, batch).numpy(), "exact")
    model = trained(folder, chosen.steps)
    batch, latents = draws(model, chosen.rows, seed=5)
    print(f"{active_units(model, draws(model, 500, seed=6)[0])} of {SHARED} shared units active", flush=True)
    for name, names in (("trained", tuple(SIZES)), ("two views", FEW)):
        found = bounds(model, batch, latents, names)
        gap = found.high - found.low
        doubt = f"{gap.mean():.3f} ± {gap.std() / math.sqrt(len(gap)):.3f}"
        yield line(name, estimates(model, batch, names), -0.5 * (found.low + found.high), doubt)


def main() -> None:
    """Run what the command line asks for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--rows", type=int, default=24)
    parser.add_argument("--draws", type=int, default=500, help="K")
    parser.add_argument("--seeds", type=int, default=4)
    parser.add_argument("--steps", type=int, default=1500)
    chosen = parser.parse_args()
    torch.set_num_threads(1)
    chosen.folder.mkdir(parents=True, exist_ok=True)
    head = (
        f"K = {chosen.draws}, {chosen.rows} rows, {chosen.seeds} seeds; nats a row.\n\n"
        "| model | decoder rows spent | flagged | RMSE, others | mean error | standard error, others | 2 se cover | "
        "upper less lower bound |\n|---|---|---|---|---|---|---|---|"
    )
    table = [head]
    print(head, flush=True)
    for text in lines(chosen.folder, chosen):
        print(text, flush=True)
        table.append(text)
    (chosen.folder / "nll_bounds.md").write_text("\n".join(table) + "\n")


if __name__ == "__main__":
    main()
