"""The joint NLL by importance sampling from the encoders, ours against the reference implementation's; one thread.

It refuses incomplete rows and sums a batch's terms up wrongly, so its values are not compared, only its time for the
same number of decoder calls.
"""

from collections.abc import Callable

import torch

from dmvae.config.model import DMVAEConfig
from dmvae.model.dmvae import DMVAE
from tests.benchmarks.multivae import inputs, reference
from tests.benchmarks.ratio import Result, compare
from tests.benchmarks.steps import make_batch, mnist_svhn, small_mlps

DRAWS = 1000


def perceptrons() -> DMVAEConfig:
    """Two collections of digits with perceptrons of 256."""
    return DMVAEConfig.model_validate(
        {"input_dims": {"mnist": (1, 28, 28), "optdigits": (1, 8, 8)}, "latent_dim": 10, "modalities_specific_dim": 4}
    )


def results(wanted: Callable[[str], bool]) -> list[Result]:
    """Run the comparisons asked for."""
    table = [
        ("8 small MLPs", small_mlps(8), 64, 25.0, 30.0),
        ("MLP-256", perceptrons(), 32, 2.5, 4.0),
        ("MNIST-SVHN nets", mnist_svhn(), 2, 1.0, 1.25),
    ]
    found = []
    for work, config, rows, at_least, aim in table:
        if not wanted(f"joint NLL, {work}, K = {DRAWS}"):
            continue
        torch.manual_seed(0)
        model = DMVAE(config).eval()
        batch, theirs = make_batch(config, 0.0, rows), reference(model).eval()
        given = inputs(batch)
        found.append(
            compare(
                f"joint NLL, {work}, K = {DRAWS}",
                "MultiVae",
                lambda model=model, batch=batch: model.joint_nll(batch, DRAWS, proposal="encoder"),
                lambda theirs=theirs, given=given: theirs.compute_joint_nll(given, DRAWS, 100),
                repeats=3,
                at_least=at_least,
                aim=aim,
            )
        )
    return found
