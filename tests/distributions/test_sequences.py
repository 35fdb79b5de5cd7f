"""Sequences of classes: padding counts nowhere, and the networks for them."""

import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from dmvae import DMVAE, Batch, DMVAEConfig
from dmvae.distributions.likelihoods.categorical import Categorical
from dmvae.evaluation.elbo import negative_elbo
from dmvae.evaluation.metrics import predicted_class_share

LENGTH, CLASSES, PAD = 7, 5, 2


def padded(num: int = 12, length: int = LENGTH, seed: int = 0) -> Tensor:
    """Rows of 0 to LENGTH tokens, then padding up to `length`."""
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(0, CLASSES - 1, (num, LENGTH), generator=generator)
    tokens += tokens >= PAD  # every class but the padding's
    sizes = torch.randint(0, LENGTH + 1, (num, 1), generator=generator)
    tokens[torch.arange(LENGTH) >= sizes] = PAD
    return torch.nn.functional.pad(tokens, (0, length - LENGTH), value=PAD)


def model_of(length: int, architecture: str) -> DMVAE:
    config = DMVAEConfig.model_validate(
        {
            "input_dims": {"text": (length,), "other": (3,)},
            "latent_dim": 2,
            "decoders_dist": {"text": "categorical"},
            "decoder_dist_params": {"text": {"classes": CLASSES, "pad": PAD}},
            "architectures": {"text": {"name": architecture}},
        }
    )
    torch.manual_seed(0)
    return DMVAE(config).double()


def fill(longer: DMVAE, shorter: DMVAE) -> None:
    """Give a model for longer rows the weights of one for shorter rows, and anything in the places beyond."""
    own = longer.state_dict()
    for name, weight in shorter.state_dict().items():
        if own[name].shape == weight.shape:
            own[name].copy_(weight)
            continue
        # what belongs to the first places: of the encoder's first layer columns, else rows
        axis = next(axis for axis in range(weight.dim()) if own[name].shape[axis] != weight.shape[axis])
        own[name].narrow(axis, 0, weight.shape[axis]).copy_(weight)


@pytest.mark.parametrize("architecture", ["sequence", "transformer", "mlp"])
def test_more_padding_changes_neither_loss_nor_gradient_nor_posterior_nor_nll(architecture: str) -> None:
    shorter, longer = model_of(LENGTH, architecture), model_of(LENGTH + 6, architecture)
    fill(longer, shorter)
    other, mask = torch.randn(12, 3, dtype=torch.float64), torch.arange(12) % 3 > 0
    gradients = []
    for model, length in ((shorter, LENGTH), (longer, LENGTH + 6)):
        batch = Batch({"text": padded(length=length), "other": other}, {"text": mask})
        torch.manual_seed(1)
        model(batch).loss.backward()
        gradients.append({name: p.grad for name, p in model.named_parameters()})
    for name, gradient in gradients[0].items():
        found = gradients[1][name]
        for axis in range(gradient.dim()):
            rest = found.narrow(axis, gradient.shape[axis], found.shape[axis] - gradient.shape[axis])
            assert not rest.any(), name  # the places beyond have no gradient
            found = found.narrow(axis, 0, gradient.shape[axis])
        torch.testing.assert_close(found, gradient, msg=name)
    rows = {length: Batch({"text": padded(length=length), "other": other}, {"text": mask})
            for length in (LENGTH, LENGTH + 6)}  # fmt: skip
    torch.testing.assert_close(negative_elbo(shorter, rows[LENGTH]), negative_elbo(longer, rows[LENGTH + 6]))
    left, right = shorter.encode(rows[LENGTH], return_mean=True), longer.encode(rows[LENGTH + 6], return_mean=True)
    torch.testing.assert_close(left.z, right.z)
    torch.testing.assert_close(shorter.joint_nll(rows[LENGTH], 128).nll, longer.joint_nll(rows[LENGTH + 6], 128).nll)


def test_a_row_of_nothing_but_padding_says_nothing() -> None:
    module = Categorical((4,), classes=3, pad=0)
    value, output = torch.zeros(2, 4, dtype=torch.int64), torch.randn(2, 4, 3, requires_grad=True)
    log_p = module.log_prob(output, value)
    assert log_p.tolist() == [0, 0]
    log_p.sum().backward()
    assert not output.grad.any()
    assert not module.score(output.detach(), value).any()
    assert not module.information(torch.randn(2, 5, 4, 3), output.detach(), value).any()


def test_probabilities_of_rows_of_one_length_add_up_to_one() -> None:
    module = Categorical((4,), classes=4, pad=1)
    every = torch.tensor(list(itertools.product([0, 2, 3], repeat=3)))
    every = torch.nn.functional.pad(every, (0, 1), value=1)
    output = torch.randn(1, 4, 4, dtype=torch.float64)
    assert float(module.log_prob(output, every).exp().sum()) == pytest.approx(1, abs=1e-12)
    assert not module.mean(output)[..., 1].any()
    assert not (module.likeliest(output + 50 * torch.eye(4)[1]) == 1).any()
    assert module.likeliest(output, every[:1])[0, -1] == 1


def test_the_score_and_the_information_are_derivatives() -> None:
    module, value = Categorical((LENGTH,), classes=CLASSES, pad=PAD), padded()
    output = torch.randn(12, LENGTH, CLASSES, dtype=torch.float64, requires_grad=True)
    (slope,) = torch.autograd.grad(module.log_prob(output, value).sum(), output)
    torch.testing.assert_close(module.score(output.detach(), value), slope)
    tangents = torch.randn(12, 3, LENGTH, CLASSES, dtype=torch.float64)
    expected = super(Categorical, module).information(tangents, output.detach(), value)  # by differentiating twice
    torch.testing.assert_close(module.information(tangents, output.detach(), value), expected)


def test_the_sequence_networks_read_and_write_every_place_in_its_order() -> None:
    model = model_of(LENGTH, "sequence")
    tokens = torch.tensor([[0, 1, 3, 4, 0, 1, 3], [3, 1, 0, 4, 0, 1, 3]])
    first, second = model.encode(Batch({"text": tokens}), return_mean=True).z
    assert not torch.allclose(first, second)
    output = model.decode_functions["text"](torch.randn(9, 4, dtype=torch.float64))
    assert output.shape == (9, LENGTH, CLASSES)
    assert bool((output.std(0) > 0).all())


@pytest.mark.parametrize(
    ("params", "architecture", "message"),
    [
        ({"classes": 4, "pad": 4}, "mlp", "pad must be one of the classes, 0 to 3, but got 4"),
        ({"classes": 4, "pad": 0.5}, "mlp", "pad must be a whole number"),
        ({"classes": 0}, "mlp", "classes must be a whole number of 2 or more, but got 0"),
        ({"classes": 4}, "sequence", "categorical sequences"),
    ],
)
def test_what_is_no_padding_or_no_sequence_is_refused(params: Any, architecture: str, message: str) -> None:
    shape = (2, 3) if architecture == "sequence" else (3,)
    with pytest.raises(ValueError, match=message):
        DMVAE(
            DMVAEConfig.model_validate(
                {
                    "input_dims": {"text": shape},
                    "decoders_dist": {"text": "categorical"},
                    "decoder_dist_params": {"text": params},
                    "architectures": {"text": {"name": architecture}},
                }
            )
        )


def test_padding_is_shown_to_a_classifier_where_the_row_has_it() -> None:
    model, seen = model_of(LENGTH, "sequence"), []

    class Classifier:
        def predict(self, values: Any, /) -> Any:
            seen.append(values)
            return values[:, 0] * 0

    text = padded()
    rows = Batch({"text": text, "other": torch.randn(12, 3)}, labels=torch.zeros(12, dtype=torch.int64))
    predicted_class_share(model, rows, Batch({"other": rows.data["other"]}), Classifier(), "text")
    assert ((torch.tensor(seen[0]) == PAD) == (text == PAD)).all()


def test_a_model_of_sequences_is_saved_and_loaded(tmp_path: Path) -> None:
    model = model_of(LENGTH, "sequence")
    model.save(tmp_path)
    batch = Batch({"text": padded()})
    assert torch.equal(negative_elbo(DMVAE.load(tmp_path), batch), negative_elbo(model.eval(), batch))
