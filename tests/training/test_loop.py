"""The training loop: neither micro-batches nor interruptions change its result, and settings do what they say."""

import math
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from dmvae.config.training import OptimConfig, TrainConfig
from dmvae.data.batch import Batch
from dmvae.data.reading.dataset import open_dataset
from dmvae.model.dmvae import DMVAE
from dmvae.training import checkpoint
from dmvae.training.loop import CheckpointDue, EpochEnded, MetricsLogged, StepSkipped, train
from dmvae.training.settings import resolve
from dmvae.training.setup import WorkerData
from dmvae.training.state import TrainState, build_optimizer, learning_rate
from dmvae.training.step import Collectives, NonFiniteLossError, WorkerBatch, train_epoch
from tests.runs import make_config, make_dataset


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_dataset(tmp_path_factory.mktemp("training"))


@pytest.fixture(scope="module", params=[0.0, 0.3], ids=["whole rows", "missing cells"])
def any_dataset(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_dataset(tmp_path_factory.mktemp("any"), missing_cells=request.param)


def configure(dataset: Path, **changes: object) -> TrainConfig:
    return resolve(make_config(dataset.parent, dataset, **changes), open_dataset(dataset))


def build(config: TrainConfig) -> TrainState:
    torch.manual_seed(config.seed)
    model = DMVAE(config.model).to(torch.float64)
    return TrainState(model, build_optimizer(model, config.optim))


def read(config: TrainConfig, rank: int = 0, num: int = 1) -> WorkerData:
    return WorkerData(config, rank, num, torch.float64)


def run(config: TrainConfig) -> tuple[TrainState, list[MetricsLogged]]:
    state = build(config)
    events = list(train(state, read(config), config, Collectives(state.model)))
    return state, [event for event in events if isinstance(event, MetricsLogged)]


def weights(state: TrainState) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in state.model.state_dict().items()}


@pytest.mark.slow
def test_training_lowers_the_loss_of_rows_not_trained_on(dataset: Path) -> None:
    _, events = run(configure(dataset, training={"epochs": 15}, optim={"learning_rate": 0.03}))
    figures = [event.metrics["val/loss"] for event in events if isinstance(event, EpochEnded)]
    assert len(figures) == 15
    assert figures[-1] < 0.8 * figures[0]


def test_micro_batches_change_no_result(any_dataset: Path) -> None:
    dataset = any_dataset
    whole, parts = run(configure(dataset))[0], run(configure(dataset, training={"micro_batch_size": 5}))[0]
    for name, tensor in weights(whole).items():
        torch.testing.assert_close(weights(parts)[name], tensor, rtol=1e-9, atol=1e-11)


def test_a_run_taken_up_from_any_checkpoint_ends_with_the_same_bits(any_dataset: Path, tmp_path: Path) -> None:
    dataset = any_dataset
    config = configure(dataset, training={"checkpoint_steps": 2, "log_steps": 3}, optim={"schedule": "plateau"})
    straight, events = run(config)
    state, folders = build(config), []
    for event in train(state, read(config), config, Collectives(state.model)):
        if isinstance(event, CheckpointDue):
            folders.append(tmp_path / str(event.global_step))
            checkpoint.save(state, {}, folders[-1])
    assert len(folders) > 4
    for folder in folders:
        resumed = build(config)
        with torch.no_grad():  # nothing of the fresh state may survive
            for parameter in resumed.model.parameters():
                parameter.fill_(math.nan)
        checkpoint.load(resumed, folder)
        later = [
            e for e in train(resumed, read(config), config, Collectives(resumed.model)) if isinstance(e, MetricsLogged)
        ]
        assert all(torch.equal(tensor, weights(straight)[name]) for name, tensor in weights(resumed).items())
        mine = {(e.global_step, type(e)): e.metrics for e in events}
        for event in later:
            expected = {k: v for k, v in mine[event.global_step, type(event)].items() if "per_second" not in k}
            assert {k: v for k, v in event.metrics.items() if "per_second" not in k} == expected


def test_gradients_of_workers_add_up_to_the_global_batch_whatever_their_number(any_dataset: Path) -> None:
    config = configure(any_dataset)
    assert bool(config.model.missing_cells) == (open_dataset(any_dataset).manifest.version == 3)

    def gradient(num: int) -> dict[str, torch.Tensor]:
        """The mean over workers that DDP would make, from the shares of `num` workers in turn."""
        total: dict[str, torch.Tensor] = {}
        for rank in range(num):
            state = build(config)
            state.optimizer = _Still(state.model)
            workers = Collectives(state.model, num)
            next(train_epoch(state, read(config, rank, num).batches(0, 5), config, workers, 6))
            for name, parameter in state.model.named_parameters():
                if parameter.grad is not None:
                    total[name] = total.get(name, 0) + parameter.grad / num
        return total

    alone = gradient(1)
    for num in (2, 3, 40):  # the last batch has fewer rows than 40: some workers have none
        together = gradient(num)
        for name, expected in alone.items():
            torch.testing.assert_close(together[name], expected, rtol=1e-9, atol=1e-12)


class _Still(torch.optim.SGD):
    """An optimiser that keeps gradients to be looked at."""

    def __init__(self, model: torch.nn.Module) -> None:
        super().__init__(model.parameters(), lr=0.0)


def test_clipping_bounds_the_update_and_reports_the_norm_before_it(dataset: Path) -> None:
    config = configure(dataset, optim={"clip_norm": 0.01})
    state = build(config)
    state.optimizer = _Still(state.model)
    shares = read(config).batches(0, 0)
    report = next(train_epoch(state, shares, config, Collectives(state.model), 6))
    clipped = torch.sqrt(sum((p.grad**2).sum() for p in state.model.parameters() if p.grad is not None))
    assert report.gradient_norm > 1
    assert float(clipped) == pytest.approx(0.01, rel=1e-4)


def test_learning_rate_warms_up_and_follows_its_schedule() -> None:
    cosine = OptimConfig(learning_rate=1.0, warmup_steps=10, schedule="cosine")
    assert learning_rate(cosine, 0, 100, 0) == pytest.approx(0.1)
    assert learning_rate(cosine, 50, 100, 0) == pytest.approx(0.5)
    assert learning_rate(cosine, 99, 100, 0) < 0.01
    constant = OptimConfig(learning_rate=1.0, schedule="constant")
    assert {learning_rate(constant, step, 100, 0) for step in range(100)} == {1.0}
    plateau = OptimConfig(learning_rate=1.0, schedule="plateau")
    assert learning_rate(plateau, 7, 100, 3) == 0.125


def test_plateau_halves_after_epochs_without_a_better_figure(dataset: Path) -> None:
    state = build(configure(dataset))
    optim = OptimConfig(schedule="plateau", plateau_epochs=2)
    assert [state.record_validation(figure, optim) for figure in (3.0, 4.0, 5.0, 2.0, 2.5, 2.4)] == [
        True, False, False, True, False, False,
    ]  # fmt: skip
    assert (state.halvings, state.best) == (2, 2.0)


def test_a_figure_that_is_no_number_is_never_the_best(dataset: Path) -> None:
    state = build(configure(dataset))
    figures = [math.nan, 3.0, math.nan, 1.0]
    assert [state.record_validation(figure, OptimConfig()) for figure in figures] == [False, True, False, True]
    assert state.best == 1.0


def test_patience_ends_a_run_that_does_not_get_better(dataset: Path) -> None:
    config = configure(dataset, training={"epochs": 30, "patience": 2}, optim={"learning_rate": 1e-30})
    _, events = run(config)
    ended = [event for event in events if isinstance(event, EpochEnded)]
    assert len(ended) < 30
    assert [event.improved for event in ended[-2:]] == [False, False]


def test_divergences_warm_up(dataset: Path) -> None:
    _, slow = run(configure(dataset, training={"divergence_warmup_steps": 10_000}))
    _, plain = run(configure(dataset))
    slow_kl = [e.metrics["val/kl_shared/joint"] for e in slow if isinstance(e, EpochEnded)][-1]
    plain_kl = [e.metrics["val/kl_shared/joint"] for e in plain if isinstance(e, EpochEnded)][-1]
    assert slow_kl > 1.2 * plain_kl


def test_a_loss_that_is_not_finite_names_epoch_step_terms_and_rows_and_leaves_the_weights(dataset: Path) -> None:
    config = configure(dataset)
    state = build(config)
    before = weights(state)

    def spoil() -> Iterator[WorkerBatch]:
        for share in read(config).batches(0, 0):
            left = share.batch.data["left"].clone()
            left[share.batch.masks["left"].nonzero()[0]] = 1e300
            yield replace(share, batch=replace(share.batch, data={**share.batch.data, "left": left}))

    with pytest.raises(NonFiniteLossError, match=r"step 1 \(terms: .*log_likelihood/joint/left.*1 rows, ids \["):
        next(train_epoch(state, spoil(), config, Collectives(state.model), 6))
    assert all(torch.equal(tensor, before[name]) for name, tensor in weights(state).items())


def spoilt(data: WorkerData, steps: set[int]) -> WorkerData:
    """Data in which one row of some steps of every epoch has a value that makes the loss infinite."""
    original = data.batches

    def batches(epoch: int, first_step: int) -> Iterator[WorkerBatch]:
        for share in original(epoch, first_step):
            left = share.batch.data["left"].clone()
            if share.step in steps:
                left[share.batch.masks["left"].nonzero()[0]] = 1e300
            yield replace(share, batch=replace(share.batch, data={**share.batch.data, "left": left}))

    data.batches = batches  # type: ignore[method-assign]
    return data


def test_steps_without_a_finite_loss_are_left_out_and_counted_up_to_the_limit(dataset: Path, tmp_path: Path) -> None:
    config = configure(dataset, training={"skip_nonfinite": 3})
    state = build(config)
    events, before = [], weights(state)

    def go() -> None:
        for event in train(state, spoilt(read(config), {0, 3}), config, Collectives(state.model)):
            events.append(event)
            if isinstance(event, StepSkipped) and event.global_step == 1:
                assert all(torch.equal(tensor, before[name]) for name, tensor in weights(state).items())
                checkpoint.save(state, {}, tmp_path / "c")

    with pytest.raises(NonFiniteLossError, match=r"epoch 2, step 4 \(.*training.skip_nonfinite \(now 3\)"):
        go()
    skipped = [event for event in events if isinstance(event, StepSkipped)]
    assert [event.global_step for event in skipped] == [1, 4, 7]
    assert "log_likelihood/joint/left" in skipped[0].fault
    assert "1 rows, ids [" in skipped[0].fault
    logged = [event for event in events if type(event) is MetricsLogged]
    assert [event.metrics["train/skipped_steps"] for event in logged] == [1, 1, 1, 2, 2, 2, 3, 3, 3]
    finite = [event.metrics["train/loss"] for event in logged if event.global_step not in (1, 4, 7)]
    assert all(map(math.isfinite, finite))
    resumed = build(config)
    checkpoint.load(resumed, tmp_path / "c")
    assert resumed.skipped == 1, "the limit is of the run, not of the process"


def with_log_variances(config: TrainConfig, value: float) -> TrainState:
    """A model in float32 whose encoders begin with one log-variance, shared and private."""
    torch.manual_seed(0)
    model = DMVAE(config.model)
    with torch.no_grad():
        for name, encoder in model.encoders.items():
            shared, private = config.model.latent_dim, config.model.private_dims[name]
            for part in encoder.heads.bias.split([shared, shared, private, private])[1::2]:
                part.fill_(value)
    return TrainState(model, build_optimizer(model, config.optim))


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize("log_var", [-120.0, 30.0])
def test_extreme_log_variances_train(log_var: float, precision: str, dataset: Path) -> None:
    config = configure(dataset, training={"precision": precision, "epochs": 1}, optim={"clip_norm": 1.0})
    state = with_log_variances(config, log_var)
    events = list(train(state, WorkerData(config, 0, 1, torch.float32), config, Collectives(state.model)))
    assert all(torch.isfinite(parameter).all() for parameter in state.model.parameters())
    assert all(math.isfinite(e.metrics["train/gradient_norm"]) for e in events if type(e) is MetricsLogged)


def test_a_divergence_beyond_the_numbers_is_named_as_the_culprit(dataset: Path) -> None:
    """No bound makes room for this log-variance: its variance is more than float32 holds."""
    config = configure(dataset, training={"precision": "float32"})
    state = with_log_variances(config, 1e38)
    with pytest.raises(NonFiniteLossError, match=r"terms: .*kl_shared/left.*kl_private/left.* rows, ids \["):
        list(train(state, WorkerData(config, 0, 1, torch.float32), config, Collectives(state.model)))


def test_bfloat16_trains(dataset: Path) -> None:
    config = configure(dataset, training={"precision": "bfloat16"})
    torch.manual_seed(0)
    model = DMVAE(config.model)
    state = TrainState(model, build_optimizer(model, config.optim))
    events = list(train(state, WorkerData(config, 0, 1, torch.float32), config, Collectives(model)))
    assert all(math.isfinite(v) for event in events if isinstance(event, MetricsLogged) for v in event.metrics.values())
    assert next(model.parameters()).dtype == torch.float32


def test_a_modality_that_a_batch_lacks_gets_no_update(dataset: Path) -> None:
    config = configure(dataset, optim={"schedule": "constant"})
    state = build(config)
    before = weights(state)

    def only_left() -> Iterator[WorkerBatch]:
        for share in read(config).batches(0, 0):
            yield replace(share, batch=Batch({"left": share.batch.data["left"]}, ids=share.batch.ids))

    list(train_epoch(state, only_left(), config, Collectives(state.model), 6))
    for name, tensor in weights(state).items():
        assert torch.equal(tensor, before[name]) == ("modality_right" in name), name
