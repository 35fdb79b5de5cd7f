"""A served model: right answers to parallel requests, a 4xx that names the field, the alias followed."""

import json
import socket
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from mlflow import MlflowClient
from ray import serve

from dmvae.config.registry import ServeConfig
from dmvae.config.tracking import TrackingConfig
from dmvae.model.predictor import Predictor, Request
from dmvae.platform.serve.application import start
from dmvae.platform.serve.registry import download, register
from tests.platform.tracking.test_tracking import free_port
from tests.runs import finish_here, make_config, make_dataset

pytestmark = pytest.mark.usefixtures("cluster")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two registered versions, the first of which is the champion."""
    place = tmp_path_factory.mktemp("serving")
    dataset = make_dataset(place)
    for name, seed in (("one", 0), ("two", 1)):
        register(finish_here(make_config(place, dataset, name, seed=seed)), "served", tracking(place))
    MlflowClient(tracking(place).uri).set_registered_model_alias("served", "champion", "1")
    return place


def tracking(folder: Path) -> TrackingConfig:
    return TrackingConfig(uri=f"sqlite:///{folder}/mlflow.db")


@pytest.fixture(scope="module")
def address(folder: Path) -> Iterator[str]:
    port = free_port()
    limits: dict[str, Any] = {"max_rows": 4, "max_megabytes": 0.1, "poll_seconds": 0.5}
    start(ServeConfig(model="models:/served@champion", port=port, tracking=tracking(folder), **limits))
    yield f"http://127.0.0.1:{port}/"
    serve.shutdown()


def ask(address: str, body: bytes | None) -> tuple[int, dict[str, Any]]:
    request = urllib.request.Request(address, body, {"Content-Type": "application/json"})
    try:
        with urllib.request.urlopen(request, timeout=60) as answer:
            return answer.status, json.load(answer)
    except urllib.error.HTTPError as error:
        return error.code, json.loads(error.read() or b"{}")


WRONG: tuple[tuple[bytes, int, str], ...] = (
    (b"{", 400, "not valid JSON"),
    (b"[]", 400, 'no list "rows"'),
    (b'{"rows": [{"lfet": [1]}]}', 400, "lfet"),
    (b'{"rows": [{"left": [1, 2]}]}', 400, "left"),
    (b'{"rows": [{"left": "x"}]}', 400, "left"),
    (b'{"rows": [{}], "operation": "guess"}', 400, "operation"),
    (b'{"rows": [{}], "seed": -1}', 400, "seed"),
    (b'{"rows": [{}, {}, {}, {}, {}]}', 413, "at most 4"),
    (b'{"rows": [{"left": [1, 2, 3, 4, "5"]}]}', 400, "left"),
    (b'{"rows": [{"left": [1, 2, 3, 4, true]}]}', 400, "left"),
    (b'{"rows": [{"left": [1, 2, 3, 4, 1e20]}]}', 400, "left"),
    (b'{"rows": [{"right": [1e308, 2, 3]}], "operation": "nll"}', 400, "right"),
    (b'{"rows": [{"right": [1, 2, NaN]}]}', 400, "no number"),
    (b'{"rows": [{"left": null, "left": null}]}', 400, "'left' is there twice"),
    (b'{"rows": [{}], "num_draws": "20"}', 400, "num_draws"),
    (b'{"rows": [{}], "seed": true}', 400, "seed"),
    ('{"rows": [{}]}'.encode("utf-16"), 400, "UTF-8"),
    (b'{"rows": ' + b"[" * 20_000, 400, "not valid JSON"),
    (b'{"rows": [{"left": [' + b"9" * 5000 + b", 1, 1, 1, 1]}]}", 400, "not valid JSON"),
    (b'{"rows": [], "x": "' + b"y" * 200_000 + b'"}', 413, "MB"),
)


def questions(number: int) -> dict[str, Any]:
    """Return a request with missing modalities, of one operation after the other."""
    left, right = [number / 10, 1.0, -2.0, 0.5, 3.0], [1.0, number / 20, 0.0]
    rows = [{"left": left}, {"right": right, "left": None}, {"left": left, "right": right}, {}][: 1 + number % 4]
    operation = ("encode", "reconstruct", "impute", "nll")[number % 4]
    return {"rows": rows, "operation": operation, "num_draws": 20, "seed": number % 3}


def converse(folder: Path, address: str, right: int, wrong: int) -> None:
    """Send requests from eight clients; every valid one gets the answer of the model in this process."""
    scratch = folder / "downloaded"
    alone = Predictor.load(download("models:/served/1", scratch, tracking(folder)))
    jobs: list[tuple[bytes, int, Any]] = []
    for number in range(right):
        question = questions(number)
        rows = question.pop("rows")
        expected = alone.answer(rows, Request.model_validate(question))
        jobs.append((json.dumps({"rows": rows, **question}).encode(), 200, expected))
    jobs += [WRONG[number % len(WRONG)] for number in range(wrong)]
    order = sorted(range(len(jobs)), key=lambda place: (place * 7919) % 10007)
    with ThreadPoolExecutor(8) as clients:
        answers = list(clients.map(lambda place: ask(address, jobs[place][0]), order))
    for place, (status, answer) in zip(order, answers, strict=True):
        _, wanted, expected = jobs[place]
        assert status == wanted, answer
        assert answer["model"] == "models:/served@champion"
        assert answer["version"] == "1"
        if status == 200:
            assert_close(answer["answers"], expected)
        else:
            assert expected in answer["error"]


def assert_close(found: Any, expected: Any) -> None:
    if isinstance(expected, dict):
        assert found.keys() == expected.keys()
        for key, value in expected.items():
            assert_close(found[key], value)
    elif isinstance(expected, list):
        assert len(found) == len(expected)
        for a, b in zip(found, expected, strict=True):
            assert_close(a, b)
    elif isinstance(expected, float):
        assert found == pytest.approx(expected, rel=1e-4, abs=1e-5)
    else:
        assert found == expected


def test_parallel_requests_get_right_answers_and_invalid_ones_name_the_field(folder: Path, address: str) -> None:
    status, about = ask(address, None)
    assert (status, about["modalities"]) == (200, {"left": [5], "right": [3]})
    converse(folder, address, right=40, wrong=18)


@pytest.mark.acceptance
def test_a_thousand_valid_and_a_hundred_invalid_requests(folder: Path, address: str) -> None:
    converse(folder, address, right=1000, wrong=100)


@contextmanager
def stalled_clients(address: str, number: int) -> Iterator[list[socket.socket]]:
    """Clients that announce a body, send the half of it and stop."""
    port = int(address.rsplit(":", 1)[1].strip("/"))
    body = json.dumps(questions(0)).encode()
    head = f"POST / HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
    clients = [socket.create_connection(("127.0.0.1", port)) for _ in range(number)]
    try:
        for client in clients:
            client.sendall(head.encode() + body[: len(body) // 2])
        yield clients
    finally:
        for client in clients:
            client.close()


def test_stalled_clients_hold_up_nobody_and_are_told_so(folder: Path, address: str) -> None:
    ask(address, None)
    with stalled_clients(address, 40) as clients:
        begun = time.monotonic()
        converse(folder, address, right=40, wrong=10)
        assert time.monotonic() - begun < 60
        clients[0].settimeout(30)
        assert b" 408 " in clients[0].recv(1000)


@pytest.mark.acceptance
def test_three_hundred_requests_beside_forty_stalled_clients(folder: Path, address: str) -> None:
    def p95() -> float:
        seconds = []
        for number in range(200):
            begun = time.monotonic()
            assert ask(address, json.dumps(questions(number)).encode())[0] == 200
            seconds.append(time.monotonic() - begun)
        return sorted(seconds)[189]

    quiet = p95()
    with stalled_clients(address, 40):
        converse(folder, address, right=200, wrong=100)
    with stalled_clients(address, 40):
        busy = p95()
    print(f"p95 {quiet * 1000:.1f} ms alone, {busy * 1000:.1f} ms beside 40 stalled clients")
    assert busy < 2 * quiet


def test_the_application_follows_its_alias_without_a_gap(folder: Path, address: str) -> None:
    body, seen, stop = json.dumps(questions(0)).encode(), [], threading.Event()

    def keep_asking() -> None:
        while not stop.is_set():
            seen.append(ask(address, body))

    asking = threading.Thread(target=keep_asking)
    asking.start()
    MlflowClient(tracking(folder).uri).set_registered_model_alias("served", "champion", "2")
    deadline = time.monotonic() + 60
    while not (seen and seen[-1][1].get("version") == "2"):
        assert time.monotonic() < deadline, seen[-1:]
        time.sleep(0.1)
    stop.set()
    asking.join()
    assert {status for status, _ in seen} == {200}
    versions = [answer["version"] for _, answer in seen]
    assert versions == sorted(versions)
    MlflowClient(tracking(folder).uri).set_registered_model_alias("served", "champion", "1")
