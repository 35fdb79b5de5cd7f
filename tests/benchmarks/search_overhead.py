"""What a search costs beyond its trainings: in-process trials, two at a time, against two bare processes.

Both sides train the same configurations for the same epochs and judge them by the same figure.
"""

import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from dmvae.cli import read_toml
from dmvae.config.search import SearchConfig
from dmvae.platform.tune.search import search
from dmvae.platform.tune.study import trials_of
from tests.benchmarks.ratio import Result

TRIALS, EPOCHS = 12, 45

_BARE = """
import json, sys
from pathlib import Path
import torch
torch.set_num_threads(1)
from dmvae.config.search import SearchConfig, lay_over
from dmvae.data.reading.dataset import open_dataset
from dmvae.training.settings import resolve
from dmvae.platform.tune.trial import RungEvaluator
from dmvae.evaluation.search_objectives import Estimate
from dmvae.training.setup import WorkerData, build_state
from dmvae.training.loop import train
from dmvae.training.step import Collectives
config = SearchConfig.model_validate_json(Path(sys.argv[1]).read_text())
dataset = open_dataset(config.base.data.dataset)
for file in sys.argv[2:]:
    chosen = json.loads(Path(file).read_text())
    resolved = resolve(lay_over(config.base, chosen, "bare", tuple(dataset.manifest.modalities)), dataset)
    state = build_state(resolved, torch.device("cpu"))
    for _ in train(state, WorkerData(resolved, 0, 1, torch.float32), resolved, Collectives(state.model)):
        pass
    RungEvaluator(config).figures(state.model, Estimate(0.0))
"""


WORK = "12 in-process trials, 2 at a time"


def results(wanted: Callable[[str], bool]) -> list[Result]:
    """Run the search, then its trials bare; Ray's own start is counted apart."""
    if not wanted(WORK):
        return []
    with tempfile.TemporaryDirectory() as folder:
        shipped = read_toml(SearchConfig, Path("jobs/configs/search.toml"))
        if not Path(shipped.base.data.dataset).exists():
            subprocess.run([sys.executable, "-m", "jobs.prepare", "jobs/configs/digits.toml"], check=True)
        base = shipped.base.model_dump(exclude_unset=True)
        base["training"]["epochs"] = EPOCHS
        base["tracking"] = {"uri": f"sqlite:///{folder}/mlflow.db"}
        config = SearchConfig.model_validate(
            shipped.model_dump(exclude={"base", "start_from", "retrain"})
            | {"base": base, "trials": TRIALS, "runs_dir": folder, "scheduler": "none", "retrain": {"how": "none"}}
        )
        # the shipped space changes how large a trial is; here all are the same, so that both sides divide them alike
        space = {"optim.learning_rate": config.space["optim.learning_rate"]}
        config = config.model_copy(update={"space": space})
        marks: list[float] = []
        search(config, lambda line: marks.append(time.monotonic()) if line.startswith(("study", "trial")) else None)
        ours = marks[-1] - marks[0]
        trials = trials_of(Path(folder) / config.name)
        file = Path(folder) / "config.json"
        file.write_text(config.model_dump_json())
        params = [str(trial.folder / "params.json") for trial in trials]
        begun = time.monotonic()
        sides = [subprocess.Popen([sys.executable, "-c", _BARE, str(file), *params[number::2]]) for number in range(2)]
        assert [side.wait() for side in sides] == [0, 0]
        theirs = time.monotonic() - begun
        seconds = [trial.result.seconds for trial in trials if trial.result]
        note = f"median trial {statistics.median(seconds):.0f} s; without the start of Ray, which a search has once"
        ratio = theirs / ours
        return [
            Result(
                WORK,
                "two bare processes",
                None,
                ratio,
                ratio,
                ratio,
                0.9,
                1.0,
                note=note,
            )
        ]
