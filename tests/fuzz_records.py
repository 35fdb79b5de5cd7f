"""Folders of models, runs and studies, outboxes and requests made wrong by a seeded generator, and what came of it."""

import json
import random
import shutil
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from dmvae.config.errors import UserError
from dmvae.config.registry import ServeConfig
from dmvae.config.search import SearchConfig
from dmvae.config.training import TrainConfig
from dmvae.data.files import sha256_of
from dmvae.model.dmvae import DMVAE
from dmvae.model.modality_spec import ModalitySpec
from dmvae.model.predictor import Predictor
from dmvae.platform.records import read_result, read_run
from dmvae.platform.resume import ResumeRules
from dmvae.platform.serve.application import Application, BadRequestError
from dmvae.platform.tracking.delivery_log import DeliveryLog, Entry
from dmvae.platform.tracking.outbox import MetricsLine, Outbox, StatusLine
from dmvae.platform.tracking.tracked_run import TrackedRun, read_run_record
from dmvae.platform.tune import study
from dmvae.platform.tune.study import TrialResult
from dmvae.training import checkpoint
from tests.fuzz import cut_or_grow, flip, put_wrong_value
from tests.training.test_checkpoint import make_state

NOWHERE = "http://127.0.0.1:9"
ROW = {"a": [0.1, 0.2, 0.3, 0.4], "b": None}
REQUEST = {"rows": [ROW, {"b": [[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]]}], "operation": "impute", "num_draws": 20, "seed": 1}
SEARCH = SearchConfig.model_validate(
    {
        "name": "s",
        "trials": 5,
        "base": {"name": "s", "data": {"dataset": "d"}},
        "space": {"optim.learning_rate": {"low": 1e-4, "high": 1e-2, "log": True}},
        "objectives": ["imputation"],
    }
)
RULES = ResumeRules("run", TrainConfig, ("workers.*",), ("training.epochs",))


@dataclass(frozen=True)
class Kind:
    """The files that are made wrong, whether checksums are made to agree, and what reads them."""

    files: str
    use: Callable[[Path], str]
    admit: bool = False


def make_original(folder: Path) -> Path:
    """Write a checkpoint, a run with its outbox, a study of three trials, and a request."""
    run = TrainConfig.model_validate({"name": "run", "data": {"dataset": "d"}}).model_dump(mode="json")
    run["dataset"] = {"fingerprint": "f" * 64}
    checkpoint.save(make_state(), run, folder / "model", {"step": 3, "score": 1.0})
    (folder / "run").mkdir()
    (folder / "run" / "run.json").write_text(json.dumps(run))
    result = {"epochs": 3, "patience": None, "metrics": {"test/nll": 1.5}, "run_id": "abc"}
    (folder / "run" / "result.json").write_text(json.dumps(result))
    with Outbox(TrackedRun(NOWHERE, "abc", folder / "run" / "tracking"), background=False) as outbox:
        for step in range(9):
            outbox.log_metrics({"loss": step / 4, "nan": float("nan")}, step)
        outbox.end("FINISHED")
    (folder / "run" / "tracking" / "metrics.offset").write_text("0")
    for number in range(3):
        trial = study.write_params(folder / "study", number, {"optim.learning_rate": 1e-3})
        (trial / "tracking").mkdir()
        (trial / "tracking" / "mlflow.json").write_text(json.dumps({"run_id": f"run{number}", "uri": NOWHERE}))
        study.write_result(trial, TrialResult("complete", 2, {"imputation": 1.0}, "", f"run{number}", 1.0))
    (folder / "request.json").write_text(json.dumps(REQUEST))
    return folder


def load_model(folder: Path) -> str:
    """Load the model; a right one has the weights that were saved."""
    model, original = DMVAE.load(folder / "model"), make_state().model
    pairs = zip(model.state_dict().values(), original.state_dict().values(), strict=True)
    return "correct" if all(torch.equal(*pair) for pair in pairs) else "other values"


def load_checkpoint(folder: Path) -> str:
    """Resume from the checkpoint; with checksums that agree, any position that is one is right."""
    state = make_state()
    checkpoint.load(state, folder / "model")
    checkpoint.read_report(folder / "model")
    return "correct" if state.position.epoch >= 0 and state.position.step >= 0 else "other values"


def resume_run(folder: Path) -> str:
    """Read the records of the run as a resumed one does."""
    now = TrainConfig.model_validate({"name": "run", "data": {"dataset": "d"}}).model_dump(mode="json")
    RULES.check(folder / "run" / "run.json", now | {"dataset": {"fingerprint": "f" * 64}}, str(folder / "run"))
    read_run(folder / "run" / "run.json")
    read_result(folder / "run" / "result.json")
    return "correct"


def resume_study(folder: Path) -> str:
    """Read the trials as a resumed search does; five numbers, none of them twice."""
    trials = study.trials_of(folder / "study")
    study.check_trials(SEARCH, trials)
    list(study.frozen_trials(SEARCH, trials))
    free = study.free_numbers(trials)
    numbers = [trial.number for trial in trials] + [next(free) for _ in range(5 - len(trials))]
    return "correct" if len(set(numbers)) == 5 else "a number twice"


def deliver(folder: Path) -> str:
    """Open the outbox, and deliver its metrics to a list; each whole line arrives or is set aside."""
    place = folder / "run" / "tracking"
    record = read_run_record(place)
    if record is None:  # a folder without one belongs to no run
        return "correct"
    with Outbox(TrackedRun(NOWHERE, record.run_id, place), background=False, wait_seconds=0):
        pass
    arrived: list[Entry] = []
    log = DeliveryLog(place / "metrics.jsonl", MetricsLine | StatusLine, lambda e: arrived.extend(e) or [], 4)
    lines = (place / "metrics.jsonl").read_bytes()[log._offset :].count(b"\n")
    log.drain()
    log.close(0)
    return "correct" if len(arrived) + log.num_rejected == lines else f"{len(arrived)} of {lines} lines"


def answer(folder: Path) -> str:
    """Answer the request with the model, as the application does; a right answer can be written as JSON."""
    application = object.__new__(Application)
    application._config = ServeConfig(model="models:/m/1", max_rows=8)
    specs = {"a": ModalitySpec(shape=(4,), dtype="float32"), "b": ModalitySpec(shape=(2, 3), dtype="float32")}
    application._predictor = Predictor(make_state().model, specs)
    rows, request = application._parse((folder / "request.json").read_bytes())
    (answers,) = application._answer([rows], request)
    if isinstance(answers, BadRequestError):
        raise answers
    json.dumps(answers, allow_nan=False)
    return "correct"


KINDS = {
    "model": Kind("model/model.*", load_model),
    "checkpoint": Kind("model/*", load_checkpoint),
    "checkpoint with checksums that agree": Kind("model/[mos]*.*", load_checkpoint, admit=True),
    "records of a run": Kind("run/*.json", resume_run),
    "record of an outbox": Kind("run/tracking/mlflow.json", deliver),
    "lines and offset of an outbox": Kind("run/tracking/metrics.*", deliver),
    "trials of a study": Kind("study/trials/*/*.json", resume_study),
    "folders of a study": Kind("study/trials/*", resume_study),
    "request": Kind("request.json", answer),
}


def damage(file: Path, draw: random.Random) -> None:
    """Make a file wrong in one of many ways; a folder is removed, copied, renamed or replaced."""
    if file.is_dir():
        match draw.randrange(4):
            case 0:
                shutil.rmtree(file)
            case 1:
                shutil.copytree(file, file.with_name(draw.choice((f"{file.name}-copy", "0007", "00001", "9"))))
            case 2:
                file.rename(file.with_name(draw.choice(("0004", "4", "12345", "0-x"))))
            case _:
                shutil.rmtree(file)
                draw.choice((lambda: file.write_text(""), lambda: file.symlink_to(file), file.mkdir))()
        return
    is_text = file.suffix in (".json", ".jsonl", ".offset")
    way = draw.randrange(10 if is_text else 3)
    match 3 if way == 4 and file.name == "request.json" else way:
        case 0 | 1:
            flip(file, draw)
        case 2:
            cut_or_grow(file, draw)
        case 3:
            nested = ("[" * 20_000, '{"a":' * 20_000)
            file.write_text(draw.choice(("", "{}", "[]", "null", "9" * 5000, "\0" * 64, *nested)))
        case 4:
            file.unlink()
            draw.choice((file.mkdir, lambda: file.symlink_to(file), lambda: None))()
        case 5:
            file.write_bytes(file.read_text().encode(draw.choice(("utf-16", "utf-32"))))
        case _:
            lines = file.read_text().splitlines()
            number = draw.randrange(len(lines)) if file.suffix == ".jsonl" else 0
            tree = json.loads(lines[number] if file.suffix == ".jsonl" else "\n".join(lines))
            if not isinstance(tree, dict | list):
                file.write_text("-3")
                return
            if draw.random() < 0.2 and isinstance(tree, dict):
                tree |= draw.choice(({"version": 2}, {"newer": 1}))
            else:
                put_wrong_value(tree, draw)
            if file.suffix == ".jsonl":
                lines[number] = json.dumps(tree)
                file.write_text("\n".join(lines) + "\n")
            else:
                file.write_text(json.dumps(tree))


def run_case(seed: int, original: Path, folder: Path) -> tuple[str, str]:
    """Make case `seed` and use it; return its kind and `refused`, `correct`, or what is the matter."""
    draw, name = random.Random(seed), list(KINDS)[seed % len(KINDS)]
    kind = KINDS[name]
    shutil.copytree(original, folder)
    file = draw.choice(sorted(folder.glob(kind.files)))
    damage(file, draw)
    if kind.admit:
        files = [file for file in (folder / "model").iterdir() if file.name != "checksums.json" and file.is_file()]
        (folder / "model" / "checksums.json").write_text(json.dumps({file.name: sha256_of(file) for file in files}))
    try:
        outcome = kind.use(folder)
    except (UserError, ValueError, OSError, BadRequestError) as error:
        ours = "/dmvae/" in traceback.extract_tb(error.__traceback__)[-1].filename
        outcome = "refused" if ours and _is_clear(str(error), name) else "".join(traceback.format_exception(error))
    except Exception as error:  # noqa: BLE001  # any other type is what is looked for
        outcome = "".join(traceback.format_exception(error))
    shutil.rmtree(folder)
    return name, outcome


def _is_clear(message: str, name: str) -> bool:
    """Return whether a message is one line, or a list of settings, of moderate length that names a file."""
    is_list = message.startswith("Cannot resume the run")
    names_file = name == "request" or any(part in message for part in ("model", "run", "study", "trials"))
    return bool(message) and len(message) < 3000 and names_file and ("\n" not in message or is_list)
