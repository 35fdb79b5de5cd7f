"""Run folders of strangers: they send no file of ours anywhere, and no line of theirs holds up ours."""

import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from mlflow import MlflowClient

from dmvae.cli import main
from dmvae.config.tracking import TrackingConfig
from dmvae.platform.tracking.delivery_log import TrackingError
from dmvae.platform.tracking.outbox import Outbox
from dmvae.platform.tracking.runs import open_run, sync
from dmvae.platform.tracking.tracked_run import TrackedRun

pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings(r"ignore:The ``noload`` loader strategy is deprecated:DeprecationWarning"),
]

SECRET = "the text of a private key"


@contextmanager
def listening() -> Iterator[tuple[str, list[str]]]:
    """Yield the URI of a server that answers every request, and what it receives."""
    received: list[str] = []

    class Server(BaseHTTPRequestHandler):
        def answer(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
            received.append(f"{self.command} {self.path} {body!r}")
            self.send_response(200)
            self.end_headers()
            self.wfile.write(b"{}")

        do_GET = do_POST = do_PUT = do_PATCH = answer  # noqa: N815

        def log_message(self, *_: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Server)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}", received
    finally:
        server.shutdown()
        server.server_close()


@pytest.fixture(scope="module")
def uri(tmp_path_factory: pytest.TempPathFactory) -> str:
    return f"sqlite:///{tmp_path_factory.mktemp('mlflow')}/mlflow.db"


@pytest.fixture
def secret(tmp_path: Path) -> Path:
    file = tmp_path / ".ssh" / "id_rsa"
    file.parent.mkdir()
    file.write_text(SECRET)
    return file


def make_run(uri: str, folder: Path) -> TrackedRun:
    """A run of ours with one metric delivered."""
    with open_run(TrackingConfig(uri=uri), folder.name, folder / "tracking", {}) as run, Outbox(run) as outbox:
        outbox.log_metrics({"loss": 1.0}, 1)
    return run


def append(log: Path, *lines: object) -> None:
    with log.open("a") as file:
        file.writelines((line if isinstance(line, str) else json.dumps(line)) + "\n" for line in lines)


def files_in_mlflow(run: TrackedRun) -> list[str]:
    return [file.path for file in MlflowClient(run.uri).list_artifacts(run.run_id)]


def test_sync_sends_nothing_to_the_server_that_a_folder_names(
    uri: str, secret: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    make_run(uri, tmp_path / "runs" / "ours")
    theirs = tmp_path / "runs" / "theirs" / "tracking"
    theirs.mkdir(parents=True)
    with listening() as (server, received):
        (theirs / "mlflow.json").write_text(json.dumps({"run_id": "abc", "uri": server}))
        append(theirs / "metrics.jsonl", {"metrics": {"loss": 1.0}, "step": 1, "timestamp": 1})
        append(theirs / "artifacts.jsonl", {"artifact": "../../../.ssh/id_rsa", "artifact_path": None, "timestamp": 1})
        assert main(["sync", str(tmp_path / "runs")]) == 1
        assert received == []
        said = capfd.readouterr()
        assert f"{theirs / 'mlflow.json'} names the MLflow server {server}" in said.out
        assert f"--tracking.uri {server}" in said.out
        assert main(["sync", str(tmp_path / "runs" / "ours")]) == 0
        # named by the person, their server is used, and still gets no file from outside the folder of the run
        sync(theirs.parent, server)
        assert received
        assert not [request for request in received if "private key" in request]


def test_a_search_delivers_its_trials_to_its_own_server(uri: str, secret: Path, tmp_path: Path) -> None:
    """What `jobs.search` does at its end, with a trial's folder that names another server."""
    run = make_run(uri, tmp_path / "study" / "trials" / "0000")
    with listening() as (server, received):
        record = run.outbox_dir / "mlflow.json"
        record.write_text(json.dumps({"run_id": run.run_id, "uri": server}))
        append(run.outbox_dir / "artifacts.jsonl", {"artifact": str(secret), "artifact_path": None, "timestamp": 1})
        (result,) = sync(tmp_path / "study" / "trials", uri)
        assert received == []
    assert (result.state, result.lines, result.rejected) == ("delivered", 1, 1)
    assert files_in_mlflow(run) == []


@pytest.mark.parametrize("way", ["above", "absolute", "link", "link in a folder", "linked folder"])
def test_no_path_leads_out_of_the_folder_of_a_run(way: str, uri: str, secret: Path, tmp_path: Path) -> None:
    run = make_run(uri, tmp_path / "runs" / "run")
    best = run.outbox_dir.parent / "best"
    best.mkdir()
    (best / "model.json").write_text("{}")
    named = {"above": "../../../.ssh/id_rsa", "absolute": str(secret), "link": "../key"}.get(way, "../best")
    if way == "link":
        (run.outbox_dir.parent / "key").symlink_to(secret)
    elif way == "link in a folder":
        (best / "key").symlink_to(secret)
    elif way == "linked folder":
        (best / "keys").symlink_to(secret.parent)
    append(run.outbox_dir / "artifacts.jsonl", {"artifact": named, "artifact_path": None, "timestamp": 1})
    (result,) = sync(tmp_path, uri)
    assert (result.state, result.rejected) == ("delivered", 1)
    assert files_in_mlflow(run) == []
    (kept,) = (run.outbox_dir / "artifacts.rejected.jsonl").read_text().splitlines()
    assert "outside the folder of the run" in json.loads(kept)["error"]


def test_lines_that_can_never_be_delivered_hold_up_no_other(uri: str, tmp_path: Path) -> None:
    run = make_run(uri, tmp_path / "runs" / "run")
    other = make_run(uri, tmp_path / "runs" / "xother")
    whole = {"metrics": {"late": 2.0}, "step": 7, "timestamp": 7}
    bad = [
        "",
        "no JSON",
        "[" * 20_000,
        {"metrics": {"a": 1.0}, "step": 2**70, "timestamp": 1},
        {"metrics": {"a": "x"}, "step": 1, "timestamp": 1},
        {"metrics": {"a": 1.0}, "step": 1},
        {"status": "PERHAPS", "reason": "", "timestamp": 1},
        {"stauts": 1},
        '{"metrics": {"a": ' + "9" * 5000 + '}, "step": 1, "timestamp": 1}',
    ]
    append(run.outbox_dir / "metrics.jsonl", *bad, whole)
    (run.outbox_dir.parent / "fine.txt").write_text("fine")
    unreadable = run.outbox_dir.parent / "unreadable"
    unreadable.mkdir()
    (unreadable / "link").symlink_to("link")
    append(
        run.outbox_dir / "artifacts.jsonl",
        *({"artifact": name, "artifact_path": None, "timestamp": 1} for name in ("../gone", "../unreadable", "\0")),
        {"artifact": "../fine.txt", "artifact_path": "../../up", "timestamp": 1},
        {"artifact": "../fine.txt", "artifact_path": None, "timestamp": 1},
    )
    append(other.outbox_dir / "metrics.jsonl", whole)
    ours, theirs = sync(tmp_path, uri)
    assert (ours.state, ours.rejected) == ("delivered", len(bad) + 4), ours
    assert (theirs.state, theirs.rejected) == ("delivered", 0)
    for each in (run, other):
        assert [m.step for m in MlflowClient(uri).get_metric_history(each.run_id, "late")] == [7]
    assert files_in_mlflow(run) == ["fine.txt"]
    kept = [json.loads(line) for line in (run.outbox_dir / "metrics.rejected.jsonl").read_text().splitlines()]
    assert all(entry["error"] for entry in kept)


@pytest.mark.parametrize("content", ["", "{}", "[" * 20_000, '{"run_id": "../../up", "uri": "x"}', "[]", "null"])
def test_a_damaged_record_is_named_and_holds_up_no_other_run(content: str, uri: str, tmp_path: Path) -> None:
    make_run(uri, tmp_path / "runs" / "run")
    damaged = tmp_path / "runs" / "damaged" / "tracking" / "mlflow.json"
    damaged.parent.mkdir(parents=True)
    damaged.write_text(content)
    first, second = sync(tmp_path, uri)
    assert (first.state, second.state) == ("undelivered", "delivered")
    assert str(damaged) in first.message
    with pytest.raises(ValueError, match=r"mlflow\.json"), open_run(TrackingConfig(uri=uri), "", damaged.parent, {}):
        pass


@pytest.mark.parametrize("name", ["driver.lock", "spool.lock", "metrics.jsonl", "artifacts.jsonl"])
def test_an_outbox_with_links_changes_no_file_elsewhere(name: str, uri: str, secret: Path, tmp_path: Path) -> None:
    run = make_run(uri, tmp_path / "runs" / "run")
    file = run.outbox_dir / name
    file.unlink(missing_ok=True)
    file.symlink_to(secret)
    (result,) = sync(tmp_path, uri)
    assert result.state == "undelivered"
    assert f"{file} must be a regular file" in result.message
    with (
        pytest.raises(TrackingError, match="must be a regular file"),
        open_run(TrackingConfig(uri=uri), "", run.outbox_dir, {}),
        Outbox(run),
    ):
        pass
    assert secret.read_text() == SECRET


@pytest.mark.parametrize("content", ["", "x", "-5", "3", "9" * 5000])
def test_a_damaged_offset_sends_every_line_again(content: str, uri: str, tmp_path: Path) -> None:
    run = make_run(uri, tmp_path / "runs" / "run")
    (run.outbox_dir / "metrics.offset").write_text(content)
    (result,) = sync(tmp_path, uri)
    assert (result.state, result.lines) == ("delivered", 2)
    assert len(MlflowClient(uri).get_metric_history(run.run_id, "loss")) == 1


def test_what_lies_outside_the_folder_of_a_run_is_copied_to_be_recorded(uri: str, tmp_path: Path) -> None:
    run = make_run(uri, tmp_path / "runs" / "run")
    report = tmp_path / "elsewhere" / "report"
    report.mkdir(parents=True)
    (report / "page.html").write_text("fine")
    with Outbox(run) as outbox:
        outbox.log_artifact(report)
    assert files_in_mlflow(run) == ["report"] or files_in_mlflow(run) == ["page.html"]
