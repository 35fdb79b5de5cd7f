"""Serve a registered model over HTTP with Ray Serve, and load the new version when its alias moves."""

import asyncio
import json
import os
import time
from collections.abc import Callable
from typing import Any

import torch
from pydantic import ValidationError
from ray import serve
from starlette.requests import Request as HttpRequest
from starlette.responses import JSONResponse

from dmvae.config.registry import ServeConfig
from dmvae.model.predictor import Predictor, Request, is_finite
from dmvae.platform.cluster import local_cluster, resources
from dmvae.platform.evaluate.worker_pool import torch_device
from dmvae.platform.serve.body_limit import LIMITS_VARIABLE, BodyError, read_body
from dmvae.platform.serve.registry import RegistryError, downloaded, find_version, mlflow_client
from dmvae.platform.tracking.runs import tracking_uri

APPLICATION = "dmvae"
_BATCH_REQUESTS, _WAIT_SECONDS = 16, 0.005


class BadRequestError(Exception):
    """A request cannot be answered; the message says why, `status` is the HTTP status."""

    def __init__(self, message: str, status: int = 400) -> None:
        super().__init__(message)
        self.status = status


Answer = list[dict[str, Any]] | BadRequestError
"""The answers of a request's rows, or why there are none."""


class Application:
    """Answers `POST /` with `{"rows": [...], "operation": "impute", ...}`; `GET /` describes the model.

    Every answer names the model and its version. An invalid request gets a 400 that names the row and the field, one
    with too many rows or bytes a 413. Ray Serve answers 503 if too many requests are waiting.
    """

    def __init__(self, config: ServeConfig) -> None:
        self._config, self._uri = config, tracking_uri(config.tracking)
        torch.set_num_threads(1)
        self.version, self._predictor = self._load()
        self._failures, self._last_check = 0, time.monotonic()

    async def __call__(self, http: HttpRequest) -> JSONResponse:
        """Answer one HTTP request."""
        await self._follow_alias()
        if http.method == "GET":
            shapes = {name: list(spec.shape) for name, spec in self._predictor.units.items()}
            units = self._predictor.units.items()
            features = {name: list(spec.features) for name, spec in units if spec.features is not None}
            columns = {
                name: [column.model_dump(exclude_defaults=True) for column in spec.columns]
                for name, spec in units
                if spec.columns is not None
            }
            return self._reply(200, {"modalities": shapes, "features": features, "columns": columns})
        if http.method != "POST":
            return self._reply(405, {"error": f"Method {http.method} is not allowed. Send rows by POST."})
        try:
            body = await read_body(http.receive, self._config.max_megabytes, self._config.body_seconds)
            rows, request = self._parse(body)
            answers = await self._answer_together((rows, request))
            if isinstance(answers, BadRequestError):
                raise answers
            return self._reply(200, {"answers": answers})
        except (BadRequestError, BodyError) as error:
            return self._reply(error.status, {"error": str(error)})

    def _parse(self, body: bytes) -> tuple[list[dict[str, Any]], Request]:
        try:
            tree = json.loads(body.decode("utf-8"), object_pairs_hook=_without_duplicates, parse_constant=_no_number)
        except (ValueError, RecursionError) as error:
            raise BadRequestError(f"Request is not valid JSON in UTF-8: {error}.") from None
        if not isinstance(tree, dict) or not isinstance(tree.get("rows"), list):
            raise BadRequestError('Request has no list "rows". Expected {"rows": [{...}, ...], "operation": "impute"}.')
        rows = tree.pop("rows")
        if len(rows) > self._config.max_rows:
            raise BadRequestError(f"Too many rows: got {len(rows)}, at most {self._config.max_rows} allowed.", 413)
        try:
            request = Request.model_validate(tree)
        except ValidationError as error:
            first = error.errors(include_url=False)[0]
            raise BadRequestError(f"{'.'.join(map(str, first['loc']))}: {first['msg']}") from None
        try:
            parsed = self._predictor.parse(rows)
            self._predictor.batch(parsed)  # an invalid row must fail here, not the requests answered together with it
        except ValueError as error:
            raise BadRequestError(str(error)) from None
        return parsed, request

    @serve.batch(max_batch_size=_BATCH_REQUESTS, batch_wait_timeout_s=_WAIT_SECONDS)
    async def _answer_together(self, waiting: list[tuple[list[dict[str, Any]], Request]]) -> list[Answer]:
        """Answer requests of the same kind in one pass; a row's answer does not depend on the other rows."""
        answers: list[Answer] = [[] for _ in waiting]
        for kind in {request for _, request in waiting}:
            members = [index for index, (_, request) in enumerate(waiting) if request == kind]
            found = await asyncio.to_thread(self._answer, [waiting[index][0] for index in members], kind)
            for index, answer in zip(members, found, strict=True):
                answers[index] = answer
        return answers

    def _answer(self, requests: list[list[dict[str, Any]]], kind: Request) -> list[Answer]:
        """Answer requests in one pass, or one by one if the pass fails: only the one at fault is refused."""
        try:
            answered = iter(self._predictor.answer([row for rows in requests for row in rows], kind))
        except (ValueError, RuntimeError) as error:
            if len(requests) > 1:
                return [self._answer([rows], kind)[0] for rows in requests]
            return [BadRequestError(f"Cannot answer {kind.operation!r}: {error}", 422)]
        answers: list[Answer] = []
        for rows in requests:
            mine = [next(answered) for _ in rows]
            wrong = next((number for number, answer in enumerate(mine) if not is_finite(answer)), None)
            answers.append(mine if wrong is None else _not_finite(wrong))
        return answers

    async def _follow_alias(self) -> None:
        """Load the version that the alias points to now; if MLflow is down, keep answering with the loaded one."""
        if "@" not in self._config.model or time.monotonic() - self._last_check < self._config.poll_seconds:
            return
        self._last_check = time.monotonic()
        try:
            if await asyncio.to_thread(self._current_version) != self.version:
                self.version, self._predictor = await asyncio.to_thread(self._load)
            self._failures = 0
        except Exception:  # noqa: BLE001  # no failure of MLflow may stop the answers
            self._failures += 1

    def _current_version(self) -> str:
        with mlflow_client(self._uri, f"look up {self._config.model}") as client:
            return str(find_version(client, self._config.model).version)

    def _load(self) -> tuple[str, Predictor]:
        version = self._current_version()
        name = self._config.model.removeprefix("models:/").partition("@")[0].partition("/")[0]
        with downloaded(f"models:/{name}/{version}", self._config.tracking) as folder:
            predictor = Predictor.load(folder, self._config.trust)
        predictor.model.to(torch_device())
        return version, predictor

    def _reply(self, status: int, content: dict[str, Any]) -> JSONResponse:
        about: dict[str, Any] = {"model": self._config.model, "version": self.version}
        if self._failures:
            about["alias_last_seen_seconds"] = round(time.monotonic() - self._last_check)
        return JSONResponse({**content, **about}, status)


def _not_finite(row: int) -> BadRequestError:
    return BadRequestError(
        f"Row {row}: the answer is not finite, because values are far outside of those in training. Correct the row.",
        422,
    )


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"field {next(name for name in names if names.count(name) > 1)!r} is there twice")
    return found


def _no_number(constant: str) -> float:
    raise ValueError(f"{constant} is no number in JSON; leave out what is missing")


def run(config: ServeConfig, progress: Callable[[str], None]) -> None:
    """Serve until interrupted.

    Raises:
        RegistryError: if MLflow cannot be reached, has no such model, or lacks its files.
    """
    with downloaded(config.model, config.tracking) as folder:
        Predictor.load(folder, config.trust)  # an error is shown here, not in the log of a replica
    tracking = config.tracking.model_copy(update={"uri": tracking_uri(config.tracking)})
    os.environ[LIMITS_VARIABLE] = f"{config.max_megabytes},{config.body_seconds}"
    with local_cluster(config.replicas + 1):
        start(config.model_copy(update={"tracking": tracking}))
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
        raise RegistryError(f"Ray Serve could not start the application: {str(error).splitlines()[0]}") from None
