"""The command line: a TOML file, laid over by flags, becomes a validated configuration, and a verb runs it.

The `dmvae` console command and the files in `jobs/` both end here. Nothing heavy is imported before a verb runs.
"""

import io
import os
import sys
import tomllib
from collections.abc import Callable, Sequence
from contextlib import redirect_stderr
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError

from dmvae.config.section import Section

S = TypeVar("S", bound=Section)


class CommandError(Exception):
    """What a person did that cannot be done, and the remedy: printed without a traceback."""


@dataclass(frozen=True)
class Verb:
    """One command: what it does in a line, its configuration, and the function that runs it.

    Its first argument is a TOML file, unless `first` names the setting that it stands for.
    """

    summary: str
    config: Callable[[], type[Section]]
    run: Callable[[Any], None]
    first: str | None = None


def main(argv: Sequence[str] | None = None) -> int:
    """Run `dmvae VERB CONFIG.toml [--flags]`; return the exit code."""
    argv = sys.argv[1:] if argv is None else list(argv)
    if not argv or argv[0] in ("-h", "--help"):
        print("usage: dmvae VERB CONFIG.toml [--flags]\n")
        for name, verb in VERBS.items():
            print(f"  {name:<10} {verb.summary}")
        print("\ndmvae VERB --help lists a verb's settings.")
        return 0 if argv else 2
    if argv[0] not in VERBS:
        print(f"error: a verb is one of {', '.join(VERBS)}; got {argv[0]!r}.", file=sys.stderr)
        return 2
    return run_verb(argv[0], argv[1:])


def run_verb(name: str, argv: Sequence[str] | None = None) -> int:
    """Run one verb with the rest of a command line; return the exit code: 0, 1 for what went wrong, 2 for bad usage."""
    argv = sys.argv[1:] if argv is None else list(argv)
    try:
        try:
            verb = VERBS[name]
            if verb.first is not None and argv and not argv[0].startswith("-"):
                argv = [f"--{verb.first}", *argv]
            first = "CONFIG.toml" if verb.first is None else verb.first.upper()
            config = parse(verb.config(), f"dmvae {name}", verb.summary, argv, first)
        except CommandError as error:
            print(f"error: {error}", file=sys.stderr)
            return 2
        VERBS[name].run(config)
    except BrokenPipeError:  # the reader of our output has gone, as `| head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except ValidationError as error:
        print(f"error: {explain(error, 'settings', verb.config())}", file=sys.stderr)
        return 1
    except (CommandError, ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("interrupted; start the same command again: it goes on from what is finished, if it can", file=sys.stderr)
        return 130
    return 0


def parse(config: type[S], prog: str, summary: str, argv: Sequence[str], first: str = "CONFIG.toml") -> S:
    """Read `CONFIG.toml`, lay the flags over it and validate.

    Raises:
        CommandError: naming the file or flag, the key, the value and the law that it breaks.
        SystemExit: after `--help`, or for a flag that does not exist.
    """
    import tyro

    file = Path(argv[0]) if argv and not argv[0].startswith("-") else None
    default = None if file is None else read_toml(config, file)
    usage = f"{summary}\n\nusage: {prog} {first} [--flags]; a flag goes before the file's setting."
    rest, messages = list(argv[file is not None :]), io.StringIO()
    try:
        with redirect_stderr(messages):
            flat = tyro.conf.AvoidSubcommands[config] if default is not None else config  # type: ignore[valid-type, misc]
            parsed: Any = tyro.cli(flat, prog=prog, description=usage, args=rest, default=default)
            return config.model_validate(parsed)
    except SystemExit as stop:
        fault = stop.__context__
        while fault is not None and not isinstance(fault, ValidationError):
            fault = fault.__context__
        if fault is not None:  # tyro would print pydantic's words in a frame
            raise CommandError(explain(fault, "command line", config, _section_named(fault.title, config))) from None
        sys.stderr.write(messages.getvalue())
        raise


def read_toml(config: type[S], file: Path) -> S:
    """Read and validate one TOML file.

    Raises:
        CommandError: if it is not there, is not TOML, or breaks a law of the configuration.
    """
    try:
        return config.model_validate(config.located(tomllib.loads(file.read_text()), file.parent))
    except FileNotFoundError:
        raise CommandError(f"{file}: there is no such file.") from None
    except IsADirectoryError:
        raise CommandError(f"{file}: a configuration is a file; this is a folder.") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise CommandError(f"{file}: not TOML: {error}.") from None
    except ValidationError as error:
        raise CommandError(explain(error, str(file), config)) from None


def explain(error: ValidationError, where: str, config: type[BaseModel], section: str = "") -> str:
    """Write a validation error as one line per fault: place, key, law, value, and what was probably meant.

    Args:
        error: pydantic's.
        where: the file, or the command line.
        config: what was validated, for what was meant.
        section: the setting that holds what was validated, if it is a part of `config`.
    """
    lines = []
    for fault in error.errors(include_url=False):
        path = (*filter(None, [section]), *fault["loc"])
        key = ".".join(str(part) for part in path if not str(part).startswith(("function-", "dict[")))
        message = fault["msg"].removeprefix("Value error, ")
        if fault["type"] == "extra_forbidden":
            message = f"there is no such setting{_meant(config, path)}"
        elif fault["type"] == "missing":
            message = "this setting is required"
        elif fault["type"] != "value_error":
            message += f"; got {fault['input']!r}"
        lines.append(f"{where}: {key + ': ' if key else ''}{message}")
    return "\n".join(lines)


def _section_named(title: str, config: type[BaseModel]) -> str:
    """Return the setting of `config` whose section is of the class `title`; empty if there is none."""
    classes = {getattr(field.annotation, "__name__", ""): name for name, field in config.model_fields.items()}
    return classes.get(title, "")


def _meant(config: type[BaseModel], location: tuple[int | str, ...]) -> str:
    section: Any = config
    for part in location[:-1]:
        field = section.model_fields.get(str(part)) if hasattr(section, "model_fields") else None
        section = None if field is None else field.annotation
    fields = list(section.model_fields) if hasattr(section, "model_fields") else []
    close = get_close_matches(str(location[-1]), fields, n=1)
    return f"; did you mean {close[0]!r}?" if close else f" (known: {', '.join(fields)})" if fields else ""


def _init_config() -> type[Section]:
    from dmvae.config.init import InitConfig

    return InitConfig


def _prepare_config() -> type[Section]:
    from dmvae.config.data import PrepareConfig

    return PrepareConfig


def _inspect_config() -> type[Section]:
    from dmvae.config.inspect import InspectConfig

    return InspectConfig


def _train_config() -> type[Section]:
    from dmvae.config.training import TrainConfig

    return TrainConfig


def _search_config() -> type[Section]:
    from dmvae.config.search import SearchConfig

    return SearchConfig


def _evaluate_config() -> type[Section]:
    from dmvae.config.evaluation import EvaluateConfig

    return EvaluateConfig


def _report_config() -> type[Section]:
    from dmvae.config.report import ReportConfig

    return ReportConfig


def _register_config() -> type[Section]:
    from dmvae.config.registry import RegisterConfig

    return RegisterConfig


def _promote_config() -> type[Section]:
    from dmvae.config.registry import PromoteConfig

    return PromoteConfig


def _embed_config() -> type[Section]:
    from dmvae.config.registry import EmbedConfig

    return EmbedConfig


def _serve_config() -> type[Section]:
    from dmvae.config.registry import ServeConfig

    return ServeConfig


def _sync_config() -> type[Section]:
    from dmvae.config.tracking import SyncConfig

    return SyncConfig


def _init(config: Any) -> None:
    from importlib.resources import files

    folder = Path(config.folder)
    folder.mkdir(parents=True, exist_ok=True)
    for shipped in sorted(files("dmvae").joinpath("configs").iterdir(), key=lambda entry: entry.name):
        target = folder / shipped.name
        if target.exists():
            _say(f"kept      {target}")
        elif target.suffix == ".toml":
            target.write_bytes(shipped.read_bytes())
            _say(f"written   {target}")
    _say(f"next      {command('prepare')} {folder / 'digits.toml'}")


def _prepare(config: Any) -> None:
    from dmvae.data.preparation.prepare import prepare_and_upload
    from dmvae.data.storage.location import is_uri

    folder = prepare_and_upload(config, progress=_say)
    output = Path(folder).name if is_uri(folder) else folder
    _say(f"next      {command('inspect')} {folder} --output {output}-inspection")


def _inspect(config: Any) -> None:
    from dmvae.report.dataset_overview import inspect

    try:
        found = inspect(config, progress=_say)
    except ImportError as error:
        raise CommandError(str(error)) from None
    for line in found.lines:
        _say(line)
    _say("")
    for finding in found.findings:
        _say(f"{finding.level:<6} {finding.text}")
    if config.output is None and found.run is not None:
        _say(f"\n{found.run}")
    if found.run is not None:
        file = "CONFIG.toml" if config.output is None else Path(config.output) / "train.toml"
        _say(f"next   {command('train')} {file}")
    wrong, doubtful = found.count("wrong"), found.count("check")
    unchecked = "" if config.verify else " (checksums were not looked at: --verify)"
    if wrong:
        raise CommandError(f"{wrong} of these findings are wrong and {doubtful} to be checked{unchecked}")
    _say(f"nothing is wrong; {doubtful} findings to be checked{unchecked}")


def _train(config: Any) -> None:
    from dmvae.platform.tracking.delivery_log import TrackingError
    from dmvae.platform.train.trainer import RunError, train_run

    try:
        summary = train_run(config, progress=_say)
    except (RunError, TrackingError) as error:
        raise CommandError(str(error)) from None
    if summary.was_finished:
        _say("this run is finished; raise training.epochs to train it further, or choose another name")
    for name, value in summary.metrics.items():
        _say(f"{name:<24} {value:.4f}")
    _register_best(summary.run_dir, config.tracking)
    _say(f"best checkpoint          {summary.where}/best")
    _say(f"last checkpoint          {summary.where}/last")
    _say(f"MLflow run               {summary.run_id} of experiment {config.tracking.experiment}")
    if summary.tracking_uri.startswith("sqlite:"):
        _say(f"look at it               mlflow ui --backend-store-uri {summary.tracking_uri}")
    _say(f"next                     {command('evaluate')} --model {summary.where}/best --dataset {config.data.dataset}")


def _search(config: Any) -> None:
    from dmvae.platform.tracking.delivery_log import TrackingError
    from dmvae.platform.train.trainer import RunError
    from dmvae.platform.tune.search import search

    try:
        found = search(config, progress=_say)
    except (RunError, TrackingError) as error:
        raise CommandError(str(error)) from None
    for trial in found.best:
        figures = "  ".join(f"{name} {trial.result.figures[name]:.4g}" for name in config.objectives if trial.result)
        _say(f"{'best trial' if len(found.best) == 1 else 'of the Pareto front':<24} {trial.number}: {figures}")
        for path, value in trial.params.items():
            _say(f"  {path:<40} {value}")
    for name, value in found.retrained.metrics.items() if found.retrained else ():
        _say(f"{name:<24} {value:.4f}")
    _say(f"{'best configuration':<24} {found.study_dir / 'best.toml'}")
    _say(
        f"{'all trials':<24} {found.study_dir / 'trials.json'}; optuna-dashboard sqlite:///{found.study_dir}/optuna.db"
    )
    _say(f"{'MLflow run':<24} {found.run_id} of experiment {config.base.tracking.experiment}")
    if found.tracking_uri.startswith("sqlite:"):
        _say(f"{'look at it':<24} mlflow ui --backend-store-uri {found.tracking_uri}")
    if found.retrained:
        _register_best(found.retrained.run_dir, config.base.tracking)
        _say(f"{'best model':<24} {found.retrained.where}/best")


def _evaluate(config: Any) -> None:
    from dmvae.platform.evaluate.evaluate import evaluate

    result = evaluate(config, progress=_say)
    for name, value in result.items():
        _say(f"{name:<24} {value:.4f}")


def _report(config: Any) -> None:
    try:
        from dmvae.platform.evaluate.report import report

        file = report(config, progress=_say)
    except ImportError as error:
        raise CommandError(str(error)) from None
    _say(f"report    {file}")


def _register_best(run_dir: Path, tracking: Any) -> None:
    """Register a finished run's best model, if the configuration names a registered model."""
    from dmvae.platform.serve.registry import RegistryError, register
    from dmvae.platform.tracking.delivery_log import UnreachableError

    if tracking.register_as is None:
        return
    try:
        found = register(run_dir, tracking.register_as, tracking)
    except (RegistryError, UnreachableError) as error:
        later = f"python -m jobs.register {run_dir} --name {tracking.register_as}"
        raise CommandError(f"the run is finished, and its model is not registered: {error}. Later: {later}") from None
    _say(f"registered               {found.uri}")


def _register(config: Any) -> None:
    from dmvae.platform.serve.registry import RegistryError, register

    try:
        found = register(Path(config.run), config.name, config.tracking)
    except RegistryError as error:
        raise CommandError(str(error)) from None
    _say(f"registered {found.uri}")
    _say(f"next       python -m jobs.promote --name {found.name} --version {found.version} --dataset DATASET")


def _promote(config: Any) -> None:
    from dmvae.platform.serve.promotion import promote
    from dmvae.platform.serve.registry import RegistryError

    try:
        decision = promote(config, progress=_say)
    except RegistryError as error:
        raise CommandError(str(error)) from None
    _say(f"{'promoted' if decision.moved else 'not promoted'}: {decision.reason}")
    _say(f"champion   models:/{config.name}/{decision.champion}")


def _embed(config: Any) -> None:
    from dmvae.platform.serve.embedding import embed
    from dmvae.platform.serve.registry import RegistryError

    try:
        summary = embed(config, progress=_say)
    except RegistryError as error:
        raise CommandError(str(error)) from None
    _say(f"embedded   {summary.rows:,} rows, {summary.fresh:,} of them now, {summary.rows_per_second:,.0f} rows/s")
    _say(f"latents    {summary.output}")


def _serve(config: Any) -> None:
    try:
        from dmvae.platform.serve.application import run
    except ImportError as error:
        raise CommandError(f"serving needs the extra `serve` (pip install 'dmvae[serve]'): {error}.") from None
    from dmvae.platform.serve.registry import RegistryError

    try:
        run(config, progress=_say)
    except RegistryError as error:
        raise CommandError(str(error)) from None


def _sync(config: Any) -> None:
    from dmvae.platform.tracking.runs import sync

    results = sync(Path(config.folder))
    for result in results:
        _say(f"{result.spool_dir}: {result.state}, {result.lines} lines brought in {result.message}".rstrip())
    if not results:
        _say(f"no spool under {config.folder}")
    if any(result.state == "undelivered" for result in results):
        raise CommandError(
            "MLflow could not be reached for every run; the same command goes on where this one stopped."
        )


def command(verb: str) -> str:
    """Return how to call a verb the way that this process was called."""
    return f"dmvae {verb}" if Path(sys.argv[0]).stem == "dmvae" else f"python -m jobs.{verb}"


def _say(text: str) -> None:
    print(text, flush=True)


VERBS: dict[str, Verb] = {
    "init": Verb("Write the configurations that come with the package, to start from.", _init_config, _init, "folder"),
    "prepare": Verb("Convert incomplete multimodal data into a dataset of Arrow shards.", _prepare_config, _prepare),
    "inspect": Verb(
        "Show what a dataset holds and what may be wrong with it, and propose a run.",
        _inspect_config,
        _inspect,
        "dataset",
    ),
    "train": Verb("Train a DMVAE with Ray Train workers; the same command resumes.", _train_config, _train),
    "search": Verb(
        "Search for the best configuration with Ray Tune and Optuna; the same command resumes.",
        _search_config,
        _search,
    ),
    "evaluate": Verb("Estimate the negative log-likelihood of a split under a model.", _evaluate_config, _evaluate),
    "report": Verb("Show a trained model in pictures: PNG files and one HTML page.", _report_config, _report),
    "register": Verb("Register a finished run's best model with MLflow.", _register_config, _register, "run"),
    "promote": Verb("Make a better version of a registered model the champion.", _promote_config, _promote, "name"),
    "embed": Verb("Write a model's latents of every row of a dataset; resumes.", _embed_config, _embed, "model"),
    "serve": Verb("Answer requests for a registered model with Ray Serve.", _serve_config, _serve, "model"),
    "sync": Verb("Bring records into MLflow that it missed while it was away.", _sync_config, _sync, "folder"),
}
