import math

import numpy as np
import pytest
import torch

from dmvae.distributions.noise import chain, row_keys, standard_normal


def test_the_noise_is_standard_normal() -> None:
    values = standard_normal(chain(1, torch.arange(1000)), 200, dtype=torch.float64).flatten()
    n = len(values)
    normal = torch.distributions.Normal(0.0, 1.0)
    for power, expected, variance in ((1, 0, 1), (2, 1, 2), (3, 0, 15), (4, 3, 96)):
        assert abs(float(values.pow(power).mean()) - expected) < 5 * math.sqrt(variance / n)
    # Kolmogorov-Smirnov at level 1e-6
    uniform = normal.cdf(values.sort().values)
    steps = torch.arange(n, dtype=torch.float64) / n
    assert float(torch.maximum(uniform - steps, steps + 1 / n - uniform).max()) < math.sqrt(math.log(2e6) / 2 / n)


def test_neighbouring_rows_places_and_seeds_are_uncorrelated() -> None:
    values = standard_normal(chain(0, torch.arange(1000)), 200, dtype=torch.float64)
    other = standard_normal(chain(1, torch.arange(1000)), 200, dtype=torch.float64)
    pairs = {
        "rows": values[1:] * values[:-1],
        "places": values[:, 1:] * values[:, :-1],
        "halves of a Box-Muller pair, squared": (values[:, ::2] ** 2 - 1) * (values[:, 1::2] ** 2 - 1) / 2,
        "seeds": values * other,
    }
    for name, product in pairs.items():
        assert abs(float(product.mean())) < 5 / math.sqrt(product.numel()), name


@pytest.mark.parametrize("start", [0, 1, 2, 7])
@pytest.mark.parametrize("num", [1, 2, 5, 6, 37])
def test_any_cut_of_places_gives_the_same_noise(start: int, num: int) -> None:
    keys = chain(3, torch.arange(4))
    whole = standard_normal(keys, 50)
    assert torch.equal(standard_normal(keys, num, start=start), whole[:, start : start + num])


def test_a_row_has_its_noise_in_whatever_batch_it_is_drawn() -> None:
    ids = torch.tensor([5, -1, 2**62, 17, 0])
    whole = standard_normal(chain(3, row_keys(ids)), 8)
    order = torch.tensor([3, 0])
    assert torch.equal(standard_normal(chain(3, row_keys(ids[order])), 8), whole[order])


def test_the_key_of_a_string_does_not_depend_on_longer_strings_beside_it() -> None:
    short = np.array(["a", "cell-17", "exactly8", "é" * 5])
    beside = np.append(short, "a much longer name than all of the others are")
    assert torch.equal(row_keys(beside)[:4], row_keys(short))
    assert torch.equal(row_keys(short[2:3]), row_keys(short)[2:3])


def test_different_names_have_different_keys() -> None:
    names = np.array([f"{left}-{right}" for left in range(60) for right in range(60)] + ["", "ab", "ba", "0" * 16])
    assert len(row_keys(names).unique()) == len(names)


def test_no_rows_have_no_keys() -> None:
    assert row_keys(np.array([], dtype=str)).shape == (0,)
    assert standard_normal(row_keys(torch.arange(0)), 3).shape == (0, 3)


def test_chained_keys_depend_on_every_part_and_on_their_order() -> None:
    keys = [chain(*parts) for parts in [(), (0,), (0, 0), (1, 2), (2, 1), (1,), (-1,), (1, 2, 0)]]
    assert len({int(key) for key in keys}) == len(keys)
    rows = torch.arange(5)
    assert torch.equal(chain(7, rows)[3], chain(7, 3))


def test_no_draw_is_infinite() -> None:
    values = standard_normal(chain(0, torch.arange(5000)), 400, dtype=torch.float64)
    assert values.abs().max() < math.sqrt(2 * 33 * math.log(2)) + 1e-9
