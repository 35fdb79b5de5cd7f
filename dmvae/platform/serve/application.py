"""A Ray Serve application that answers for a registered model and follows its alias."""

import asyncio
import json
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from pydantic import ValidationError
from ray import serve
from starlette.requests import Request as HttpRequest
from starlette.responses import JSONResponse

from dmvae.config.registry import ServeConfig
from dmvae.model.predictor import Predictor, Request
from dmvae.platform.cluster import local_cluster, resources
from dmvae.platform.serve.registry import RegistryError, download, find
from dmvae.platform.tracking.mlflow_delivery import answers, connect
from dmvae.platform.tracking.runs import tracking_uri

APPLICATION = "dmvae"
_BATCH_REQUESTS, _WAIT_SECONDS = 16, 0.005


class BadRequestError(Exception):
    """What a caller sent cannot be answered; the message says why, `status` is HTTP's word for it."""

    def __init__(self, message: str, status: int = 400) -> None:
        super().__init__(message)
        self.status = status


class Application:
    """Answers `POST /` with `{"rows": [...], "operation": "impute", ...}`; `GET /` says what it serves.

    Every answer names the model and its version. A request that cannot be answered is a 400 with the row and the field,
    one with too many rows or bytes a 413; one too many at a time is a 503, from Ray Serve.
    """

    def __init__(self, config: ServeConfig) -> None:
        self._config, self._uri = config, tracking_uri(config.tracking)
        torch.set_num_threads(1)
        self.version, self._served = self._load()
        self._failures, self._looked = 0, time.monotonic()

    async def __call__(self, http: HttpRequest) -> JSONResponse:
        """Answer one HTTP request."""
        await self._follow_alias()
        if http.method == "GET":
            return self._reply(200, {"modalities": {n: list(u.shape) for n, u in self._served.units.items()}})
        if http.method != "POST":
            return self._reply(405, {"error": f"rows are sent by POST; got {http.method}."})
        body = await http.body()
        try:
            rows, request = self._parse(body)
        except BadRequestError as error:
            return self._reply(error.status, {"error": str(error)})
        return self._reply(200, {"answers": await self._together((rows, request))})

    def check_health(self) -> None:
        """Tell Ray Serve that this replica can answer: it replaces one that raises."""
        if not self._served.units:
            raise RuntimeError("no model is loaded")

    def _parse(self, body: bytes) -> tuple[list[dict[str, Any]], Request]:
        if len(body) > self._config.max_megabytes * 1e6:
            raise BadRequestError(f"a request has {self._config.max_megabytes:g} MB at most.", 413)
        try:
            tree = json.loads(body)
        except ValueError as error:
            raise BadRequestError(f"a request is JSON: {error}.") from None
        if not isinstance(tree, dict) or not isinstance(tree.get("rows"), list):
            raise BadRequestError('a request is {"rows": [{...}, ...], "operation": "impute"}; it has no list `rows`.')
        rows = tree.pop("rows")
        if len(rows) > self._config.max_rows:
            raise BadRequestError(f"a request has {self._config.max_rows} rows at most; got {len(rows)}.", 413)
        try:
            request = Request.model_validate(tree)
        except ValidationError as error:
            first = error.errors(include_url=False)[0]
            raise BadRequestError(f"{'.'.join(map(str, first['loc']))}: {first['msg']}") from None
        try:
            parsed = self._served.parse(rows)
            self._served.batch(parsed)  # a wrong row is its own sender's fault, not that of the requests beside it
        except ValueError as error:
            raise BadRequestError(str(error)) from None
        return parsed, request

    @serve.batch(max_batch_size=_BATCH_REQUESTS, batch_wait_timeout_s=_WAIT_SECONDS)
    async def _together(self, asked: list[tuple[list[dict[str, Any]], Request]]) -> list[list[dict[str, Any]]]:
        """Answer requests of the same kind in one pass; a row's answer does not depend on its company."""
        found: list[list[dict[str, Any]]] = [[] for _ in asked]
        for kind in {request for _, request in asked}:
            members = [place for place, (_, request) in enumerate(asked) if request == kind]
            rows = [row for place in members for row in asked[place][0]]
            answered = iter(await asyncio.to_thread(self._served.answer, rows, kind))
            for place in members:
                found[place] = [next(answered) for _ in asked[place][0]]
        return found

    async def _follow_alias(self) -> None:
        """Load the version that the alias stands for by now; while MLflow is away the one that is loaded answers."""
        if "@" not in self._config.model or time.monotonic() - self._looked < self._config.poll_seconds:
            return
        self._looked = time.monotonic()
        try:
            if await asyncio.to_thread(self._newest) != self.version:
                self.version, self._served = await asyncio.to_thread(self._load)
            self._failures = 0
        except Exception:  # noqa: BLE001  # whatever keeps MLflow from answering, this goes on with what it has
            self._failures += 1

    def _newest(self) -> str:
        with answers(self._uri):
            return str(find(connect(self._uri), self._config.model).version)

    def _load(self) -> tuple[str, Predictor]:
        version = self._newest()
        name = self._config.model.removeprefix("models:/").partition("@")[0].partition("/")[0]
        with tempfile.TemporaryDirectory() as scratch:
            served = Predictor.load(download(f"models:/{name}/{version}", Path(scratch), self._config.tracking))
        served.model.to("cuda" if torch.cuda.is_available() else "cpu")
        return version, served

    def _reply(self, status: int, content: dict[str, Any]) -> JSONResponse:
        about: dict[str, Any] = {"model": self._config.model, "version": self.version}
        if self._failures:
            about["alias_last_seen_seconds"] = round(time.monotonic() - self._looked)
        return JSONResponse({**content, **about}, status)


def run(config: ServeConfig, progress: Callable[[str], None]) -> None:
    """Serve until interrupted.

    Raises:
        RegistryError: if MLflow has no such model, or its files are gone.
    """
    uri = tracking_uri(config.tracking)
    with tempfile.TemporaryDirectory() as scratch:  # what is wrong with the model is said here, not in a replica's log
        Predictor.load(download(config.model, Path(scratch), config.tracking))
    placed = config.model_copy(update={"tracking": config.tracking.model_copy(update={"uri": uri})})
    with local_cluster(config.replicas + 1):
        start(placed)
        progress(f"serving {config.model} on http://{config.host}:{config.port}; stop with Ctrl-C")
        try:
            while True:
                time.sleep(1)
        finally:
            serve.shutdown()  # type: ignore[no-untyped-call]


def start(config: ServeConfig) -> None:
    """Start the application on the connected cluster."""
    has_gpus = resources().get("GPU", 0) >= config.replicas
    serve.start(http_options={"host": config.host, "port": config.port})
    deployment: Any = serve.deployment(
        Application,
        name=APPLICATION,
        num_replicas=config.replicas,
        ray_actor_options={"num_cpus": 1, "num_gpus": int(has_gpus)},
        max_ongoing_requests=2 * _BATCH_REQUESTS,
        max_queued_requests=config.max_waiting,
        health_check_period_s=10,
    )
    try:
        serve.run(deployment.bind(config), name=APPLICATION, route_prefix="/")
    except RuntimeError as error:
        raise RegistryError(f"the application did not start: {str(error).splitlines()[0]}") from None
