"""Whatever is wrong with data or settings: one clear error, or a correct result."""

import time
from collections import Counter
from pathlib import Path

import pytest

from tests.fuzz import KINDS, Content, contents, contents_by_pyarrow, make_original, run_case


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_original(tmp_path_factory.mktemp("fuzz") / "original")


@pytest.fixture(scope="module")
def expected(original: Path) -> dict[str, Content]:
    return contents(original)


def fuzz(seeds: range, original: Path, expected: dict[str, Content], folder: Path) -> Counter[tuple[str, str]]:
    """Use cases one after the other; every one ends in an error that says so or in the right values, and soon."""
    outcomes: Counter[tuple[str, str]] = Counter()
    faults = []
    for seed in seeds:
        begun = time.monotonic()
        kind, outcome = run_case(seed, original, expected, folder / str(seed))
        if outcome not in ("refused", "correct"):
            faults.append(f"seed {seed}, {kind}: {outcome}")
        if time.monotonic() - begun > 30:
            faults.append(f"seed {seed}, {kind}: took {time.monotonic() - begun:.0f} s")
        outcomes[kind, outcome] += 1
    assert not faults, f"{len(faults)} faults\n" + "\n".join(faults)
    return outcomes


def test_pyarrow_reads_what_the_reader_reads(original: Path, expected: dict[str, Content]) -> None:
    found = contents_by_pyarrow(original)
    for split, content in expected.items():
        for key, values in content.items():
            assert (found[split][key] == values).all(), (split, key)


def test_what_is_wrong_is_refused_or_read_right(original: Path, expected: dict[str, Content], tmp_path: Path) -> None:
    outcomes = fuzz(range(3 * len(KINDS)), original, expected, tmp_path)
    assert sum(count for (_, outcome), count in outcomes.items() if outcome == "refused") > len(KINDS)


@pytest.mark.acceptance
def test_three_hundred_wrong_inputs_are_refused_or_read_right(
    original: Path, expected: dict[str, Content], tmp_path: Path
) -> None:
    outcomes = fuzz(range(1000, 1000 + 24 * len(KINDS)), original, expected, tmp_path)
    assert sum(outcomes.values()) >= 300
    for (kind, outcome), count in sorted(outcomes.items()):
        print(f"{kind:<28} {outcome:<8} {count}")
