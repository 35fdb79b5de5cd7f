"""All speed comparisons: a table of ratios in one run.

    python -m tests.benchmarks [NAME ...] [--folder FOLDER]

writes `speed.json` and `speed.md` into FOLDER (default build/benchmarks). A name is one of a part, such as steps, or is
part of a row's own, such as "8 small"; without any, the whole table is made.
"""

import argparse
import json
from dataclasses import asdict
from importlib import import_module
from pathlib import Path

import torch

from tests.benchmarks import multivae
from tests.benchmarks.ratio import Result, machine, markdown

PARTS = ("startup", "steps", "nll", "distribution", "search_overhead")


def main() -> None:
    """Run the rows asked for and write the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"{', '.join(PARTS)}, or part of a row's name")
    parser.add_argument("--folder", default="build/benchmarks", type=Path)
    arguments = parser.parse_args()
    arguments.folder.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)
    multivae.install()
    results: list[Result] = []
    for part in PARTS:

        def wanted(work: str, part: str = part) -> bool:
            names = arguments.names
            return not names or part in names or any(name in work for name in names if name not in PARTS)

        found = import_module(f"tests.benchmarks.{part}").results(wanted)
        for result in found:
            print(
                f"{result.work:<48} {result.figure:6.2f}{result.unit}  ({result.low:.2f} to {result.high:.2f})",
                flush=True,
            )
        results += found
    if not results:
        parser.error(f"a name is a part ({', '.join(PARTS)}) or in a row's name; got {arguments.names}.")
    facts = machine()
    (arguments.folder / "speed.json").write_text(
        json.dumps({"machine": facts, "results": list(map(asdict, results))}, indent=2)
    )
    (arguments.folder / "speed.md").write_text(markdown(results, facts))
    print(f"table     {arguments.folder / 'speed.md'}")


if __name__ == "__main__":
    main()
