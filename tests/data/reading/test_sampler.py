import hashlib
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dmvae.data.reading.sampler import EpochSampler, _key, permutation
from tests.benchmarks.order_quality import mixing

quick = settings(max_examples=30, deadline=None)


@st.composite
def orders(draw: st.DrawFn) -> dict[str, Any]:
    batch_size = draw(st.integers(1, 40))
    rows = draw(st.lists(st.integers(1, 25), min_size=1, max_size=20))
    shards = sorted(draw(st.lists(st.integers(0, 4), min_size=len(rows), max_size=len(rows))))
    return {
        "record_batch_rows": rows,
        "shards": draw(st.none() | st.just(shards)),
        "seed": draw(st.integers(-5, 2**70)),
        "batch_size": batch_size,
        "streams": draw(st.none() | st.integers(1, batch_size)),
        "window_rows": draw(st.none() | st.integers(1, 60)),
    }


@quick
@given(orders(), st.integers(0, 3))
def test_an_epoch_has_every_row_exactly_once(defined: dict[str, Any], epoch: int) -> None:
    order = EpochSampler(**defined)
    rows = np.concatenate([order.rows(epoch, step) for step in range(order.num_batches)])
    assert np.array_equal(np.sort(rows), np.arange(order.num_rows))


@quick
@given(orders())
def test_all_batches_are_full_but_the_last(defined: dict[str, Any]) -> None:
    order = EpochSampler(**defined)
    sizes = [order.batch_size_of(step) for step in range(order.num_batches)]
    assert sum(sizes) == order.num_rows
    assert set(sizes[:-1]) <= {order.batch_size}
    assert 0 < sizes[-1] <= order.batch_size
    assert [len(order.rows(0, step)) for step in range(order.num_batches)] == sizes


@quick
@given(orders(), st.integers(1, 9), st.data())
def test_workers_slices_put_together_are_the_global_batch(
    defined: dict[str, Any], workers: int, data: st.DataObject
) -> None:
    order = EpochSampler(**defined)
    step = data.draw(st.integers(0, order.num_batches - 1))
    slices = [order.worker_slice(step, rank, workers) for rank in range(workers)]
    lengths = [stop - start for start, stop in slices]
    assert max(lengths) - min(lengths) <= 1
    parts = [EpochSampler(**defined).rows(2, step, *piece) for piece in slices]
    assert np.array_equal(np.concatenate(parts), order.rows(2, step))


@quick
@given(orders(), st.data())
def test_a_step_does_not_depend_on_what_was_read_before(defined: dict[str, Any], data: st.DataObject) -> None:
    order = EpochSampler(**defined)
    steps = data.draw(st.lists(st.tuples(st.integers(0, 2), st.integers(0, order.num_batches - 1)), max_size=5))
    for epoch, step in steps:
        assert np.array_equal(order.rows(epoch, step), EpochSampler(**defined).rows(epoch, step))


@quick
@given(orders())
def test_rows_of_several_slices_come_one_after_another(defined: dict[str, Any]) -> None:
    order = EpochSampler(**defined)
    slices = [(step, 0, order.batch_size_of(step)) for step in range(order.num_batches)]
    whole = EpochSampler(**defined).rows_of(1, slices)
    assert np.array_equal(whole, np.concatenate([order.rows(1, step) for step in range(order.num_batches)]))


@quick
@given(orders(), st.data())
def test_every_stream_gives_its_share_of_a_batch(defined: dict[str, Any], data: st.DataObject) -> None:
    order = EpochSampler(**defined)
    step = data.draw(st.integers(0, order.num_batches - 1))
    rows = order.batch_size_of(step)
    places = order._places(step, 0, rows)
    owner = np.searchsorted(order._cut, places, side="right") - 1
    edges = np.arange(order.streams + 1) * rows // order.streams
    assert np.array_equal(np.bincount(owner, minlength=order.streams), np.diff(edges))


@quick
@given(st.integers(0, 300), st.integers(0, 2**64 - 1))
def test_a_permutation_has_every_number_once(num: int, seed: int) -> None:
    assert np.array_equal(np.sort(permutation(num, _key(seed))), np.arange(num))


def test_epochs_and_seeds_differ() -> None:
    def first(seed: int, epoch: int) -> list[int]:
        return EpochSampler([64] * 50, seed=seed, batch_size=32).rows(epoch, 0).tolist()

    assert len({tuple(first(seed, epoch)) for seed in range(4) for epoch in range(4)}) == 16


def test_the_order_is_the_same_in_every_release() -> None:
    order = EpochSampler([64] * 50 + [7], seed=11, batch_size=48)
    rows = np.concatenate([order.rows(3, step) for step in range(order.num_batches)])
    assert hashlib.sha256(rows.astype("<i8").tobytes()).hexdigest()[:16] == "b830d3f060bbb65a"


def test_the_fingerprint_names_everything_that_defines_the_order() -> None:
    defined: dict[str, Any] = {
        "record_batch_rows": [10] * 9,
        "seed": 1,
        "batch_size": 8,
        "streams": 4,
        "window_rows": 40,
    }
    changes: list[dict[str, Any]] = [
        {},
        {"record_batch_rows": [10] * 8 + [9]},
        {"seed": 2},
        {"batch_size": 9},
        {"streams": 5},
        {"window_rows": 41},
    ]
    orders = [EpochSampler(**(defined | change)) for change in changes]
    assert len({order.fingerprint for order in orders}) == len(changes)
    assert EpochSampler(**defined).fingerprint == orders[0].fingerprint


def test_rows_written_sorted_are_mixed_almost_as_by_a_full_shuffle() -> None:
    num, classes, batch_size = 200_000, 100, 256
    order = EpochSampler([256] * (num // 256) + [num % 256], seed=0, batch_size=batch_size)
    labels = np.arange(num) * classes // num
    steps = [(step, 0, batch_size) for step in range(order.num_batches - 1)]
    batches = labels[order.rows_of(0, steps)].reshape(len(steps), batch_size)
    counts = np.stack([(batches == label).sum(axis=1) for label in range(classes)])
    expected = batch_size / classes * (1 - 1 / classes)
    assert counts.var() / expected < 1.6


def test_by_shards_a_stream_reads_one_after_another_in_an_order_of_each_epoch() -> None:
    shards = np.repeat(np.arange(40), 10)
    order = EpochSampler([16] * 400, seed=0, batch_size=64, streams=4, window_rows=64, shards=shards)
    orders = []
    for epoch in range(2):
        rows = order.rows_of(epoch, [(step, 0, order.batch_size_of(step)) for step in range(order.num_batches)])
        read = rows.reshape(order.num_batches, 64) // 160
        wanted = [set(read[step : step + 8].ravel()) for step in range(0, order.num_batches, 8)]
        assert max(map(len, wanted)) <= 3 * 4
        last = {shard: np.flatnonzero((read == shard).any(1))[-1] for shard in range(40)}
        first = {shard: np.flatnonzero((read == shard).any(1))[0] for shard in range(40)}
        assert np.mean([last[shard] - first[shard] for shard in range(40)]) < order.num_batches / 5
        orders.append(first)
        assert sorted(rows.tolist()) == list(range(6400))
    assert orders[0] != orders[1]


def test_over_20_epochs_rows_travel_and_change_company_as_by_full_shuffles() -> None:
    order = EpochSampler([32] * 250, seed=0, batch_size=64, streams=16)
    steps = [(step, 0, order.batch_size_of(step)) for step in range(order.num_batches)]
    found = mixing(lambda epoch: order.rows_of(epoch, steps), 8000, epochs=20, batch=64, classes=10)
    assert found["travel"] == pytest.approx(1 / 3, abs=0.02)
    assert found["range"] == pytest.approx(19 / 21, abs=0.02)
    assert found["company"] == pytest.approx(1, abs=0.1)
    assert found["correlation"] < 0.2
    nothing = mixing(lambda epoch: np.arange(8000), 8000, epochs=3, batch=64, classes=10)
    assert nothing["travel"] == nothing["range"] == 0, "the measures can fail"
    assert nothing["company"] > 50
    assert nothing["labels"] > 10


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"record_batch_rows": []}, "empty split"),
        ({"record_batch_rows": [0, 0]}, "empty split"),
        ({"batch_size": 0}, "batch_size must be at least 1, but got 0"),
        ({"streams": 9}, "streams=9"),
        ({"streams": 0}, "streams=0"),
        ({"window_rows": 0}, "window_rows must be at least 1, but got 0"),
    ],
)
def test_settings_out_of_range_are_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        EpochSampler(**({"record_batch_rows": [5, 5], "seed": 0, "batch_size": 8} | change))


def test_steps_ranks_and_positions_out_of_range_are_refused() -> None:
    order = EpochSampler([5, 5], seed=0, batch_size=8)
    with pytest.raises(ValueError, match="step must be between 0 and 1, but got 2"):
        order.batch_size_of(2)
    with pytest.raises(ValueError, match="rank must be between 0 and 2, but got 3"):
        order.worker_slice(0, 3, 3)
    with pytest.raises(ValueError, match="Positions 0:3 are out of range: the batch of step 1"):
        order.rows(0, 1, 0, 3)
