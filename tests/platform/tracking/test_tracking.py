import json
import os
import signal
import socket
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any
from urllib.request import urlopen

import pytest
from mlflow import MlflowClient
from mlflow.entities import Run
from pydantic import ValidationError

from dmvae.config.section import scrub
from dmvae.config.tracking import TrackingConfig
from dmvae.platform.remote_fs import RemoteFolder
from dmvae.platform.tracking.delivery_log import TrackingError
from dmvae.platform.tracking.outbox import Outbox
from dmvae.platform.tracking.runs import DatasetRecord, Waiting, format_params, open_run, sync, tracking_uri
from dmvae.platform.tracking.tracked_run import TrackedRun
from dmvae.platform.train.run_store import RunStore
from tests.kills import wait_for

pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings(r"ignore:The ``noload`` loader strategy is deprecated:DeprecationWarning"),
]

PARAMS = {"optim": {"learning_rate": 1e-3}, "model": {"sizes": [4, 2]}, "many": {str(i): i for i in range(150)}}


@pytest.fixture(scope="module")
def database(tmp_path_factory: pytest.TempPathFactory) -> TrackingConfig:
    return TrackingConfig(experiment="tests", uri=f"sqlite:///{tmp_path_factory.mktemp('mlflow')}/mlflow.db")


def stored(run: TrackedRun) -> Run:
    return MlflowClient(run.uri).get_run(run.run_id)


def history(run: TrackedRun, key: str) -> list[tuple[int, float]]:
    return [(metric.step, metric.value) for metric in MlflowClient(run.uri).get_metric_history(run.run_id, key)]


def log_steps(outbox: Outbox, steps: range) -> None:
    for step in steps:
        outbox.log_metrics({"train/loss": step / 4, "val/kl_shared/joint": float("nan")}, step)


def test_a_run_records_settings_data_metrics_and_files(database: TrackingConfig, tmp_path: Path) -> None:
    report = tmp_path / "report.html"
    report.write_text("fine")
    dataset = DatasetRecord("digits", "d" * 64, "http://me:secret@store/digits", {"rows": 12})
    tags = {"origin": "https://me:secret@host/repository"}
    with open_run(database, "first", tmp_path / "tracking", PARAMS, tags, dataset) as run:
        assert stored(run).info.status == "RUNNING"
        with Outbox(run) as outbox:
            log_steps(outbox, range(3))
            outbox.log_metrics({"val/inf": float("inf")}, 0)
            outbox.log_artifact(report, "reports")
            assert outbox.close(30)

    record = stored(run)
    assert record.info.run_name == "first"
    assert record.info.status == "FINISHED"
    assert record.data.params == format_params(PARAMS)
    assert len(record.data.tags.get("mlflow.source.git.commit", "a" * 40)) == 40  # only in a checkout
    assert record.data.tags["version.torch"]
    assert record.data.tags["origin"] == "https://host/repository"
    (data,) = record.inputs.dataset_inputs
    assert (data.dataset.name, data.dataset.digest) == ("digits", "d" * 36)
    assert "secret" not in data.dataset.source
    assert history(run, "train/loss") == [(0, 0.0), (1, 0.25), (2, 0.5)]
    assert record.data.metrics["val/inf"] > 1e308
    assert [file.path for file in MlflowClient(run.uri).list_artifacts(run.run_id, "reports")] == [
        "reports/report.html"
    ]


def test_a_resumed_run_keeps_its_id_and_repeats_no_step(database: TrackingConfig, tmp_path: Path) -> None:
    def train(steps: range, latent_dim: int) -> TrackedRun:
        with open_run(database, "resumed", tmp_path, {"latent_dim": latent_dim}) as run, Outbox(run) as outbox:
            log_steps(outbox, steps)
            if steps.stop < 15:
                raise ArithmeticError("the loss is not finite")
        return run

    with pytest.raises(ArithmeticError):
        train(range(10), 10)
    first = TrackedRun(tracking_uri(database), json.loads((tmp_path / "mlflow.json").read_text())["run_id"], tmp_path)
    assert stored(first).info.status == "FAILED"
    assert stored(first).data.tags["dmvae.reason"] == "ArithmeticError: the loss is not finite"

    second = train(range(5, 15), 20)
    assert second == first
    assert stored(second).info.status == "FINISHED"
    assert stored(second).data.params == {"latent_dim": "10"}
    assert stored(second).data.tags["changed.latent_dim"] == "20"
    assert history(second, "train/loss") == [(step, step / 4) for step in range(15)]
    assert len(history(second, "val/kl_shared/joint")) == 15


def test_lines_that_are_sent_twice_are_stored_once(database: TrackingConfig, tmp_path: Path) -> None:
    with open_run(database, "twice", tmp_path, {}) as run, Outbox(run) as outbox:
        log_steps(outbox, range(250))
    (tmp_path / "metrics.offset").unlink()
    (again,) = sync(tmp_path, database.uri)
    assert (again.state, again.lines, again.killed) == ("delivered", 251, False)
    assert len(history(run, "train/loss")) == len(history(run, "val/kl_shared/joint")) == 250
    assert sync(tmp_path, database.uri)[0].lines == 0


def test_a_line_that_a_crash_cut_short_is_removed(database: TrackingConfig, tmp_path: Path) -> None:
    with open_run(database, "torn", tmp_path, {}) as run:
        with Outbox(run) as outbox:
            log_steps(outbox, range(3))
        with (tmp_path / "metrics.jsonl").open("a") as file:
            file.write('{"metrics": {"train/loss": 0.7')
        with Outbox(run) as outbox:
            log_steps(outbox, range(6))
    assert history(run, "train/loss") == [(step, step / 4) for step in range(6)]


def test_a_refused_value_does_not_hold_up_the_others(database: TrackingConfig, tmp_path: Path) -> None:
    with open_run(database, "refused", tmp_path, {}) as run, Outbox(run) as outbox:
        log_steps(outbox, range(3))
        outbox.log_metrics({"no#name": 1.0, "train/other": 2.0}, 3)
        log_steps(outbox, range(3, 6))
    assert len(history(run, "train/loss")) == 6
    assert history(run, "train/other") == [(3, 2.0)]
    (refused,) = (tmp_path / "metrics.rejected.jsonl").read_text().splitlines()
    assert json.loads(refused)["key"] == "no#name"


def test_a_run_deleted_meanwhile_costs_the_trainer_nothing(database: TrackingConfig, tmp_path: Path) -> None:
    with open_run(database, "deleted", tmp_path, {}) as run, Outbox(run) as outbox:
        MlflowClient(run.uri).delete_run(run.run_id)
        log_steps(outbox, range(3))
    assert len((tmp_path / "metrics.rejected.jsonl").read_text().splitlines()) == 7  # six values and the end
    with pytest.raises(TrackingError, match=r"remove .* to record a new one"), open_run(database, "", tmp_path, {}):
        pass


def test_one_process_at_a_time_works_on_a_run(database: TrackingConfig, tmp_path: Path) -> None:
    with open_run(database, "alone", tmp_path, {}) as run, Outbox(run):
        with pytest.raises(TrackingError, match=f"is in use by process {os.getpid()} on"):
            Outbox(run, wait_seconds=0)
        with pytest.raises(TrackingError, match="is in use by"), open_run(database, "", tmp_path, {}):
            pass
        assert [result.state for result in sync(tmp_path, database.uri)] == ["in use"]
    assert stored(run).info.status == "FINISHED"


def test_sync_delivers_everything_after_trainer_and_database_are_gone(database: TrackingConfig, tmp_path: Path) -> None:
    here = Path(tracking_uri(database).removeprefix("sqlite:///"))
    away = here.with_suffix(".away")
    with process(sys.executable, "-c", TRAINER, str(database.uri), str(tmp_path / "runs/killed/tracking")) as trainer:
        assert read_line(trainer) == "opened"
        here.rename(away)
        write_line(trainer, "go on")
        assert read_line(trainer) == "logged"
        assert [result.state for result in sync(tmp_path, database.uri)] == ["undelivered"]  # a database that is away
        trainer.kill()
    away.rename(here)

    (result,) = sync(tmp_path, database.uri)
    assert (result.state, result.lines, result.killed) == ("delivered", 41, True)
    run = TrackedRun(str(database.uri), result.run_id, result.outbox_dir)
    assert history(run, "train/loss") == [(step, step / 4) for step in range(40)]
    assert stored(run).info.status == "KILLED"
    assert "without recording how" in stored(run).data.tags["dmvae.reason"]
    assert [(again.lines, again.killed) for again in sync(tmp_path, database.uri)] == [(0, False)]


def test_a_server_killed_and_started_again_loses_and_doubles_nothing(tmp_path: Path) -> None:
    port = free_port()
    config = TrackingConfig(experiment="tests", uri=f"http://127.0.0.1:{port}")
    (tmp_path / "note.txt").write_text("kept")
    with server(tmp_path, port):
        driver = open_run(config, "outage", tmp_path / "runs/outage/tracking", PARAMS)
        run = driver.__enter__()
        outbox = Outbox(run)
        for step in range(100):
            outbox.log_metrics({"train/loss": step / 4, "nan": float("nan"), "inf": float("inf")}, step)
            time.sleep(0.01)
    seconds = []
    for step in range(100, 300):
        begun = time.perf_counter()
        outbox.log_metrics({"train/loss": step / 4, "nan": float("nan"), "inf": float("inf")}, step)
        seconds.append(time.perf_counter() - begun)
        time.sleep(0.01)
    outbox.log_artifact(tmp_path / "note.txt")
    assert statistics.median(seconds) < 5e-3
    with server(tmp_path, port):
        assert outbox.close(60)
        driver.__exit__(None, None, None)
        assert history(run, "train/loss") == [(step, step / 4) for step in range(300)]
        (run.outbox_dir / "metrics.offset").unlink()
        assert sync(tmp_path, run.uri)[0].lines == 301
        for key in ("train/loss", "nan", "inf"):
            assert len(history(run, key)) == 300
        assert stored(run).info.status == "FINISHED"
        assert [file.path for file in MlflowClient(run.uri).list_artifacts(run.run_id)] == ["note.txt"]


def test_an_unreachable_server_at_the_start_is_one_error_without_secrets(tmp_path: Path) -> None:
    os.environ["MLFLOW_TRACKING_URI"] = f"http://me:secret@127.0.0.1:{free_port()}"
    begun = time.monotonic()
    try:
        with pytest.raises(TrackingError, match=r"127.0.0.1:\d+'.* Start the server") as raised:
            enter(TrackingConfig(), tmp_path)
    finally:
        del os.environ["MLFLOW_TRACKING_URI"]
    assert time.monotonic() - begun < 20
    assert "secret" not in str(raised.value)
    assert raised.value.__suppress_context__


@pytest.mark.parametrize(
    "uri", ["sqlite:///{}/file/mlflow.db", "sqlite:///{}", "sqlite:///{}/file", "no://where", "./runs"]
)
def test_a_wrong_uri_is_one_error(uri: str, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("no database")
    begun = time.monotonic()
    with pytest.raises(TrackingError, match="Cannot reach MLflow at"):
        enter(TrackingConfig(uri=uri.format(tmp_path)), tmp_path / "tracking")
    assert time.monotonic() - begun < 5


@pytest.mark.acceptance
def test_a_server_that_never_answers_is_one_error(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        begun = time.monotonic()
        with pytest.raises(TrackingError, match="no answer within 12 seconds"):
            enter(TrackingConfig(uri=f"http://127.0.0.1:{silent.getsockname()[1]}"), tmp_path)
        assert time.monotonic() - begun < 20


@pytest.mark.acceptance
def test_drivers_that_start_together_share_a_fresh_database(tmp_path: Path) -> None:
    uri = f"sqlite:///{tmp_path}/mlflow.db"
    with ExitStack() as stack:
        trainers = [
            stack.enter_context(process(sys.executable, "-c", TRAINER, uri, str(tmp_path / f"runs/{i}/tracking")))
            for i in range(3)
        ]
        assert [read_line(trainer) for trainer in trainers] == ["opened"] * 3


def test_the_environment_is_as_it_was_after_an_outbox_is_closed(database: TrackingConfig, tmp_path: Path) -> None:
    before = dict(os.environ)
    with open_run(database, "environment", tmp_path, {}) as run, Outbox(run):
        assert os.environ["MLFLOW_HTTP_REQUEST_MAX_RETRIES"] == "0"
    assert dict(os.environ) == before


def test_a_worker_does_not_import_mlflow() -> None:
    code = "import sys, dmvae.platform.tracking.outbox; sys.exit('mlflow' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_a_configuration_with_a_password_is_refused_without_repeating_it() -> None:
    with pytest.raises(ValidationError, match="contains a password") as raised:
        TrackingConfig(uri="postgresql://me:secret@host/mlflow")
    assert "secret" not in str(raised.value)


def test_an_outbox_of_an_earlier_run_at_the_same_uri_is_archived(tmp_path: Path) -> None:
    nowhere, place = "http://127.0.0.1:9", tmp_path / "tracking"
    with Outbox(TrackedRun(nowhere, "old", place), background=False) as outbox:
        outbox.log_metrics({"loss": 9.0}, 100)
    with Outbox(TrackedRun(nowhere, "new", place), background=False) as outbox:
        outbox.log_metrics({"loss": 1.0}, 3)
    assert json.loads((place / "mlflow.json").read_text())["run_id"] == "new"
    (line,) = (place / "metrics.jsonl").read_text().splitlines()
    assert json.loads(line)["metrics"] == {"loss": 1.0}
    assert json.loads((tmp_path / "tracking-old" / "mlflow.json").read_text())["run_id"] == "old"

    store = RemoteFolder.at("memory://bucket/kept")
    (store / "run.json").write("{}")
    (store / "mlflow.json").write(json.dumps({"run_id": "newest", "uri": nowhere}))
    RunStore(store, tmp_path).download()
    assert not (place / "metrics.jsonl").exists()
    assert (tmp_path / "tracking-new" / "metrics.jsonl").exists()


def test_urls_lose_their_secrets() -> None:
    assert scrub("get https://me:p@ss@host:1/x?a=1&token=abc&b=2 now") == "get https://host:1/x?a=1&token=***&b=2 now"
    assert scrub("postgresql://me:pa/ss@host/db") == "postgresql://host/db"
    assert scrub("mysql://me:p/a@s/s@host:3306/db now") == "mysql://host:3306/db now"
    assert scrub("http://host:5000/x@champion") == "http://host:5000/x@champion"


def test_settings_become_parameters() -> None:
    assert format_params({"optim": {"learning_rate": 1e-3}}) == {"optim.learning_rate": "0.001"}
    assert format_params({"a": {"b": None, "c": {}}, "d": (1, 2)}) == {"a.b": "None", "a.c": "{}", "d": "[1, 2]"}
    assert len(format_params({"long": "x" * 7000})["long"]) == 6000


TRAINER = """
import sys
from pathlib import Path
from dmvae.config.tracking import TrackingConfig
from dmvae.platform.tracking.outbox import Outbox
from dmvae.platform.tracking.runs import open_run

config = TrackingConfig(experiment="tests", uri=sys.argv[1])
with open_run(config, "killed", Path(sys.argv[2]), {}) as run, Outbox(run) as outbox:
    print("opened", flush=True)
    input()
    for step in range(40):
        outbox.log_metrics({"train/loss": step / 4}, step)
    print("logged", flush=True)
    input()
"""


def enter(config: TrackingConfig, outbox_dir: Path) -> None:
    with open_run(config, "never", outbox_dir, {}):
        pytest.fail("opened")


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as probe:
        return int(probe.getsockname()[1])


@contextmanager
def process(*command: str, **settings: Any) -> Iterator[subprocess.Popen[str]]:
    """Run a command; kill it and its children at the end."""
    pipe = subprocess.PIPE
    with subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True, start_new_session=True, **settings) as child:
        try:
            yield child
        finally:
            os.killpg(child.pid, signal.SIGKILL)


@contextmanager
def server(folder: Path, port: int, artifacts: str | None = None) -> Iterator[None]:
    store = f"sqlite:///{folder}/server.db"
    command = [sys.executable, "-m", "mlflow", "server", "--backend-store-uri", store, "--workers", "1"]
    address = [
        "--host",
        "127.0.0.1",
        "--port",
        str(port),
        "--artifacts-destination",
        artifacts or str(folder / "artifacts"),
    ]
    environment = {**os.environ, "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}
    with (folder / "server.log").open("a") as log, process(*command, *address, env=environment, stderr=log):
        deadline = time.monotonic() + 120
        while time.monotonic() < deadline:
            try:
                with urlopen(f"http://127.0.0.1:{port}/health", timeout=1):
                    break
            except OSError:
                time.sleep(0.2)
        yield


def read_line(child: subprocess.Popen[str]) -> str:
    assert child.stdout is not None
    return child.stdout.readline().strip()


def write_line(child: subprocess.Popen[str], line: str) -> None:
    assert child.stdin is not None
    child.stdin.write(line + "\n")
    child.stdin.flush()


def test_who_waits_for_mlflow_gets_its_run_when_the_server_is_back(tmp_path: Path) -> None:
    port, told, opened = free_port(), list[str](), list[str]()
    config = TrackingConfig(uri=f"http://127.0.0.1:{port}")

    def trial() -> None:
        with open_run(config, "patient", tmp_path / "tracking", {}, waiting=Waiting(120.0, told.append)) as run:
            opened.append(run.run_id)

    thread = threading.Thread(target=trial)
    thread.start()
    wait_for(lambda: bool(told), 60)
    with server(tmp_path, port):
        thread.join(120)
        assert MlflowClient(config.uri).get_run(opened[0]).info.status == "FINISHED"
    assert len(told) == 1
    assert told[0].startswith("warning: MLflow does not answer")


def test_waiting_for_mlflow_ends(tmp_path: Path) -> None:
    config = TrackingConfig(uri=f"http://127.0.0.1:{free_port()}")
    waiting = Waiting(0.0, lambda line: None)
    with pytest.raises(TrackingError, match="Cannot reach MLflow"), open_run(config, "", tmp_path, {}, waiting=waiting):
        pass
