"""All speed comparisons: a table of ratios in one run.

    python -m tests.benchmarks [FOLDER] [--only steps nll ...]

writes `speed.json` and `speed.md` into FOLDER (default build/benchmarks).
"""

import argparse
import json
from dataclasses import asdict
from importlib import import_module
from pathlib import Path

import torch

from tests.benchmarks import multivae
from tests.benchmarks.ratio import Result, machine, markdown

PARTS = ("startup", "steps", "nll", "search_overhead")


def main() -> None:
    """Run the parts asked for and write the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", nargs="?", default="build/benchmarks", type=Path)
    parser.add_argument("--only", nargs="+", choices=PARTS, default=PARTS)
    arguments = parser.parse_args()
    arguments.folder.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)
    multivae.install()
    results: list[Result] = []
    for part in arguments.only:
        found = import_module(f"tests.benchmarks.{part}").results()
        for result in found:
            print(
                f"{result.work:<48} {result.figure:6.2f}{result.unit}  ({result.low:.2f} to {result.high:.2f})",
                flush=True,
            )
        results += found
    facts = machine()
    (arguments.folder / "speed.json").write_text(
        json.dumps({"machine": facts, "results": list(map(asdict, results))}, indent=2)
    )
    (arguments.folder / "speed.md").write_text(markdown(results, facts))
    print(f"table     {arguments.folder / 'speed.md'}")


if __name__ == "__main__":
    main()
