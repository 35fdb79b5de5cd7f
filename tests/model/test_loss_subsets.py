"""The objective whose sources are random subsets of what a row has."""

import math
from pathlib import Path

import pytest
import torch

from dmvae import Batch, DMVAEConfig
from dmvae.data.reading.dataset import open_dataset
from dmvae.model.dmvae import DMVAE
from dmvae.model.loss import Noise, choose_subsets
from dmvae.training.loop import train
from dmvae.training.settings import resolve
from dmvae.training.setup import WorkerData
from dmvae.training.state import TrainState, build_optimizer
from dmvae.training.step import Collectives
from tests.linear_gaussian import exact_log_prob, linear_model, sample_rows
from tests.model.test_loss import SHAPES, draw, every_pattern, rows_of, small_model
from tests.runs import make_config, make_dataset


def subsets_model(num_subsets: int = 2) -> DMVAE:
    return small_model(sources="subsets", num_subsets=num_subsets)


def test_the_sources_are_the_joint_and_the_subsets() -> None:
    out = subsets_model(3)(every_pattern(math.nan))
    names = ("joint", "subset_1", "subset_2", "subset_3")
    torch.testing.assert_close(sum(out.metrics[name] for name in names), out.loss.detach())
    assert not set(SHAPES) & out.metrics.keys()
    assert out.row_loss[0] == 0


def test_subsets_are_of_what_a_row_has_and_every_size_below_is_as_likely() -> None:
    present = torch.tensor([[True, True, True, True], [True, False, True, True], [False, True, False, False]]).T
    present = torch.cat((present, torch.zeros(4, 1, dtype=torch.bool)), dim=1)
    chosen = choose_subsets(torch.randn(20000, 4, 5, dtype=torch.float64), present)
    assert not bool((chosen & ~present).any())
    sizes = chosen.sum(1)
    for row, largest in ((0, 3), (1, 2)):
        counts = torch.bincount(sizes[:, row], minlength=4)[1:] / len(sizes)
        expected = (torch.arange(1, 4) <= largest) / largest
        torch.testing.assert_close(counts, expected, atol=0.02, rtol=0)
    assert set(sizes[:, 2].tolist()) == {1}
    assert set(sizes[:, 3].tolist()) == {0}
    members = chosen[:, :, 0].double().mean(0)
    torch.testing.assert_close(members, torch.full_like(members, 0.5), atol=0.02, rtol=0)


def test_extreme_normals_choose_a_subset_all_the_same() -> None:
    normals = torch.tensor([[[0.0, 0.0, 0.0, 30.0], [0.0, 0.0, 0.0, -30.0]]])
    assert choose_subsets(normals, torch.ones(3, 2, dtype=torch.bool)).sum(1).tolist() == [[2, 1]]


def test_a_row_s_loss_belongs_to_the_row() -> None:
    model, batch, order = subsets_model(), every_pattern(math.nan), torch.randperm(8)
    noise = draw(model, 8)

    def pick(rows: torch.Tensor) -> Noise:
        assert noise.subsets is not None
        part = rows_of(noise, rows)
        return Noise(part.shared, part.private, noise.subsets[:, rows])

    whole = model(batch, noise).row_loss
    torch.testing.assert_close(model(batch[order], pick(order)).row_loss, whole[order])
    part = torch.tensor([3, 5])
    torch.testing.assert_close(model(batch[part], pick(part)).row_loss, whole[part])


def test_what_is_missing_is_neither_encoded_nor_decoded() -> None:
    model, batch, seen = subsets_model(), every_pattern(math.nan), dict.fromkeys(SHAPES, 0)
    for name in SHAPES:

        def count(_: object, inputs: tuple[torch.Tensor, ...], name: str = name) -> None:
            seen[name] += len(inputs[0])

        model.decoders[name].register_forward_pre_hook(count)
    model(batch)
    assert batch.masks is not None
    assert seen == {name: 3 * int(batch.masks[name].sum()) for name in SHAPES}


def test_every_bound_is_below_the_exact_evidence() -> None:
    base = linear_model(SHAPES, 2, {"a": 1, "b": 2, "c": 1})
    model = DMVAE(base.config.model_copy(update={"sources": "subsets"})).double().eval()
    model.load_state_dict(base.state_dict())
    patterns = Batch(sample_rows(base, 8).data, every_pattern().masks)
    for row in range(1, 8):
        with torch.no_grad():
            metrics = model(patterns[torch.full((1000,), row)]).metrics
        for source in model.config.source_names:
            assert float(exact_log_prob(base, patterns[row])) + float(metrics[source]) > 0


def test_the_gradient_reaches_every_parameter() -> None:
    model = subsets_model()
    model(every_pattern(math.nan), draw(model, 8)).loss.backward()
    assert all(p.grad is not None and bool((p.grad != 0).any()) for p in model.parameters())


def test_two_workers_have_the_gradient_of_one(tmp_path: Path) -> None:
    dataset = make_dataset(tmp_path)
    config = resolve(make_config(tmp_path, dataset, model={"sources": "subsets"}), open_dataset(dataset))
    gradients = []
    for num in (1, 2):
        total: dict[str, torch.Tensor] = {}
        for rank in range(num):
            torch.manual_seed(0)
            model = DMVAE(config.model).double()
            state = TrainState(model, build_optimizer(model, config.optim))
            next(iter(train(state, WorkerData(config, rank, num, torch.float64), config, Collectives(model, num))))
            for name, parameter in model.named_parameters():
                assert parameter.grad is not None
                total[name] = total.get(name, 0) + parameter.grad / num
        gradients.append(total)
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, rtol=1e-9, atol=1e-12)


def test_a_number_of_subsets_without_subsets_is_refused() -> None:
    with pytest.raises(ValueError, match="num_subsets has no effect with sources"):
        DMVAEConfig(input_dims={"a": (1,)}, num_subsets=3)
