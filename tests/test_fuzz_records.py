"""Whatever is wrong with a folder or a request: one clear line, or a correct result, and soon."""

import resource
import shutil
import time
from collections import Counter
from pathlib import Path

import pytest

from tests.fuzz_records import KINDS, make_original, run_case


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_original(tmp_path_factory.mktemp("fuzz") / "original")


def fuzz(seeds: range, original: Path, folder: Path) -> Counter[tuple[str, str]]:
    """Use cases one after the other, each within 10 seconds and 2 GB."""
    outcomes: Counter[tuple[str, str]] = Counter()
    faults = []
    for seed in seeds:
        begun = time.monotonic()
        kind, outcome = run_case(seed, original, folder / str(seed))
        if outcome not in ("refused", "correct"):
            faults.append(f"seed {seed}, {kind}: {outcome}")
        if time.monotonic() - begun > 10:
            faults.append(f"seed {seed}, {kind}: took {time.monotonic() - begun:.0f} s")
        outcomes[kind, outcome] += 1
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    assert memory < 2e6, f"{memory} kB of memory"
    assert not faults, f"{len(faults)} faults\n" + "\n".join(faults)
    return outcomes


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_right_is_taken_for_right(kind: str, original: Path, tmp_path: Path) -> None:
    assert KINDS[kind].use(Path(shutil.copytree(original, tmp_path / "copy"))) == "correct"


def test_folders_and_requests_that_are_wrong_are_refused_or_read_right(original: Path, tmp_path: Path) -> None:
    outcomes = fuzz(range(4 * len(KINDS)), original, tmp_path)
    assert sum(count for (_, outcome), count in outcomes.items() if outcome == "refused") > len(KINDS)


@pytest.mark.acceptance
def test_four_hundred_wrong_folders_and_requests_are_refused_or_read_right(original: Path, tmp_path: Path) -> None:
    outcomes = fuzz(range(1000, 1000 + 45 * len(KINDS)), original, tmp_path)
    assert sum(outcomes.values()) >= 400
    for (kind, outcome), count in sorted(outcomes.items()):
        print(f"{kind:<40} {outcome:<8} {count}")
