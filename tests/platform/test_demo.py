"""The demo reproduces the claims of the README from its own configuration files; its model runs elsewhere too."""

import json
import os
import statistics
import subprocess
import time
import urllib.error
import urllib.request
import venv
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import mlflow
import numpy as np
import pytest
from mlflow import MlflowClient
from ray import serve

from dmvae.config.data import PrepareConfig
from dmvae.config.parsing import read_toml
from dmvae.config.registry import ServeConfig
from dmvae.config.search import SearchConfig
from dmvae.config.tracking import TrackingConfig
from dmvae.data.batch import Batch
from dmvae.data.preparation.prepare import prepare
from dmvae.data.reading.dataset import open_dataset
from dmvae.evaluation.metrics import fit_classifier
from dmvae.evaluation.suite import first_rows
from dmvae.model.dmvae import DMVAE
from dmvae.platform.serve.application import start
from dmvae.platform.serve.registry import register
from dmvae.platform.tune.search import SearchSummary, search
from tests.kills import wait_for
from tests.platform.tracking.test_tracking import free_port

CONFIGS = Path(__file__).parents[2] / "jobs" / "configs"
ROWS = 300

pytestmark = [pytest.mark.usefixtures("cluster"), pytest.mark.acceptance, pytest.mark.timeout(1800)]


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, SearchSummary]:
    """Do what `make demo` does, in a new folder."""
    folder = tmp_path_factory.mktemp("demo")
    data = read_toml(PrepareConfig, CONFIGS / "digits.toml").model_dump() | {"dataset": str(folder / "digits")}
    prepare(PrepareConfig.model_validate(data), progress=print)
    shipped = read_toml(SearchConfig, CONFIGS / "search.toml").model_dump(exclude_unset=True)
    shipped["base"] |= {"runs_dir": str(folder / "runs"), "tracking": {"uri": f"sqlite:///{folder}/mlflow.db"}}
    shipped["base"]["data"] |= {"dataset": str(folder / "digits")}
    return folder, search(SearchConfig.model_validate(shipped | {"runs_dir": str(folder / "runs")}), print)


def test_the_demo_beats_pca_and_predicts_the_right_digit(demo: tuple[Path, SearchSummary]) -> None:
    _, found = demo
    assert len(found.trials) == 6
    first, best = found.trials[0].result, found.best[0].result
    assert first is not None
    assert best is not None
    assert best.figures["imputation"] <= first.figures["imputation"], "the shipped configuration is tried first"
    assert found.retrained is not None
    metrics = found.retrained.metrics
    assert metrics["test/pca/nll_minus_ours"] > 4 * metrics["test/pca/nll_minus_ours_se"]
    for pair in ("mnist/optdigits", "optdigits/mnist"):
        assert metrics[f"test/coherence/{pair}"] > 0.7


def test_its_model_gives_the_same_answers_in_a_fresh_environment(
    demo: tuple[Path, SearchSummary], tmp_path: Path
) -> None:
    """Install the model's own requirements, serve it with MLflow there, and with Ray Serve here."""
    folder, found = demo
    tracking = TrackingConfig(uri=f"sqlite:///{folder}/mlflow.db")
    assert found.retrained is not None
    version = register(found.retrained.run_dir, "digits", tracking).version
    client = MlflowClient(tracking.uri)
    client.set_registered_model_alias("digits", "champion", version)
    source = client.get_model_version("digits", version).source
    local = mlflow.artifacts.download_artifacts(
        artifact_uri=source, dst_path=str(tmp_path / "model"), tracking_uri=tracking.uri
    )
    venv.create(tmp_path / "venv", with_pip=True)
    pip = [str(tmp_path / "venv" / "bin" / "pip"), "install", "--quiet", "-r", str(Path(local) / "requirements.txt")]
    subprocess.run(pip, check=True)

    dataset = open_dataset(folder / "digits")
    rows = first_rows(dataset.split("test_complete"), ROWS)
    classifier = fit_classifier(first_rows(dataset.split("train")), "optdigits")
    images = (rows.data["mnist"] * 255).round().int()
    questions = [{"mnist": image.tolist()} for image in images]
    (tmp_path / "rows.json").write_text(json.dumps(questions))
    program = (
        "import json, sys, mlflow\n"
        f"model = mlflow.pyfunc.load_model({str(local)!r})\n"
        "answers = model.predict(json.load(open('rows.json')), params={'operation': 'impute', 'num_draws': 2})\n"
        "assert 'ray' not in sys.modules\n"
        "json.dump([a['imputed']['optdigits']['best'] for a in answers], open('answers.json', 'w'))\n"
    )
    environment = {"PATH": f"{tmp_path}/venv/bin:{os.environ['PATH']}", "HOME": str(tmp_path)}
    python = str(tmp_path / "venv" / "bin" / "python")
    subprocess.run([python, "-c", program], check=True, cwd=tmp_path, env=environment)
    answered = np.array(json.loads((tmp_path / "answers.json").read_text())) / 255
    model = DMVAE.load(found.retrained.run_dir / "best")
    output = model.predict(Batch({"mnist": rows.data["mnist"]}), "mnist", "optdigits", return_mean=True).optdigits
    predicted = output.numpy()
    np.testing.assert_allclose(answered, predicted, atol=1e-4)
    truth = np.asarray(rows.labels)
    right = [(classifier.predict(values.reshape(ROWS, -1)) == truth).sum() for values in (answered, predicted)]
    print(f"the right digit: {right[0]} of {ROWS} there, {right[1]} by predict")
    assert right[0] == right[1] > 0.7 * ROWS

    with served_by_mlflow(local, tmp_path, environment) as address:
        status, answer = ask(address, {"inputs": [{"mnist": None, "optdigits": None}, questions[0]]})
        assert status == 200
        assert [row["observed"] for row in answer["predictions"]] == [[], ["mnist"]]
        status, answer = ask(address, {"inputs": [{"mnits": questions[0]["mnist"]}]})
        assert status == 400
        assert "mnits" in json.dumps(answer)
        theirs = latencies(address, [{"inputs": [row], "params": {"num_draws": 10}} for row in questions[:200]])
    port = free_port()
    start(ServeConfig(model="models:/digits@champion", port=port, tracking=tracking))
    try:
        ours = latencies(f"http://127.0.0.1:{port}/", [{"rows": [row], "num_draws": 10} for row in questions[:200]])
    finally:
        serve.shutdown()
    for name, times in (("Ray Serve", ours), ("mlflow models serve", theirs)):
        p95 = statistics.quantiles(times, n=20)[-1]
        print(f"{name}: p50 {statistics.median(times):.3f} s, p95 {p95:.3f} s, 8 clients, 200 requests")


@contextmanager
def served_by_mlflow(model: str, folder: Path, environment: dict[str, str]) -> Iterator[str]:
    port = free_port()
    command = [f"{folder}/venv/bin/mlflow", "models", "serve", "-m", model, "--env-manager", "local", "-p", str(port)]
    with (folder / "serve.log").open("wb") as log:
        server = subprocess.Popen(command, env=environment, stdout=log, stderr=log, cwd=folder, start_new_session=True)
        try:
            wait_for(lambda: answers(f"http://127.0.0.1:{port}/ping"), 200)
            yield f"http://127.0.0.1:{port}/invocations"
        finally:
            os.killpg(server.pid, 15)
            server.wait()


def answers(address: str) -> bool:
    try:
        with urllib.request.urlopen(address, timeout=5):
            return True
    except OSError:
        time.sleep(0.2)
        return False


def ask(address: str, body: dict[str, Any]) -> tuple[int, Any]:
    request = urllib.request.Request(address, json.dumps(body).encode(), {"Content-Type": "application/json"})
    try:
        with urllib.request.urlopen(request, timeout=120) as answer:
            return answer.status, json.load(answer)
    except urllib.error.HTTPError as error:
        return error.code, json.loads(error.read())


def latencies(address: str, bodies: list[dict[str, Any]]) -> list[float]:
    """Return the seconds that each request takes, eight at a time, after a few to warm up."""

    def timed(body: dict[str, Any]) -> float:
        begun = time.perf_counter()
        status, _ = ask(address, body)
        assert status == 200
        return time.perf_counter() - begun

    with ThreadPoolExecutor(8) as clients:
        list(clients.map(timed, bodies[:16]))
        return list(clients.map(timed, bodies))
