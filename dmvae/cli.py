"""The command line: `dmvae VERB CONFIG.toml [--flags]` reads a configuration and runs one verb.

The `dmvae` console command and the scripts in `jobs/` both end here. Nothing heavy is imported before a verb runs.
"""

import os
import signal
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from importlib import import_module
from importlib.metadata import version
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from dmvae.config.errors import Stopped, UserError
from dmvae.config.parsing import explain, parse
from dmvae.config.section import Section
from dmvae.platform.stopping import handle_sigterm


@dataclass(frozen=True)
class Verb:
    """One command: its summary, its configuration (a module of `dmvae.config` and a class), and what runs it.

    The first argument is a TOML file, unless `first` names the setting that it sets.
    """

    summary: str
    settings: str
    run: Callable[[Any], None]
    first: str | None = None

    def config(self) -> type[Section]:
        """Import and return the class of the configuration."""
        module, _, name = self.settings.partition(":")
        section: type[Section] = getattr(import_module(f"dmvae.config.{module}"), name)
        return section


def main(argv: Sequence[str] | None = None) -> int:
    """Run `dmvae VERB CONFIG.toml [--flags]`; return the exit code."""
    argv = sys.argv[1:] if argv is None else list(argv)
    if not argv or argv[0] in ("-h", "--help"):
        print("usage: dmvae VERB CONFIG.toml [--flags]\n")
        for name, verb in VERBS.items():
            print(f"  {name:<10} {verb.summary}")
        print("\nRun `dmvae VERB --help` to list the settings of a verb.")
        return 0 if argv else 2
    if argv[0] == "--version":
        print(f"dmvae {version('dmvae')}")
        return 0
    if argv[0] not in VERBS:
        close = get_close_matches(argv[0], VERBS, n=1)
        hint = f"Did you mean {close[0]!r}?" if close else f"Known verbs: {', '.join(VERBS)}."
        print(f"error: Unknown verb {argv[0]!r}. {hint}", file=sys.stderr)
        return 2
    return run_verb(argv[0], argv[1:])


def run_verb(name: str, argv: Sequence[str] | None = None) -> int:
    """Run one verb with the rest of a command line.

    Returns:
        The exit code: 0, 1 for a failure, 2 for bad usage, 75 at the end of a time budget, 130 after SIGINT and 143
        after SIGTERM.
    """
    argv, verb = sys.argv[1:] if argv is None else list(argv), VERBS[name]
    sigterms = list[int]()

    def interrupt(number: int, frame: object) -> None:
        sigterms.append(number)
        signal.raise_signal(signal.SIGINT)  # which Ray, Tune and every verb answer by an orderly end

    try:
        try:
            if verb.first is not None and argv and not argv[0].startswith("-"):
                argv = [f"--{verb.first}", *argv]
            first = "CONFIG.toml" if verb.first is None else verb.first.upper()
            config = parse(verb.config(), f"dmvae {name}", verb.summary, argv, first)
        except UserError as error:
            print(f"error: {error}", file=sys.stderr)
            return 2
        with handle_sigterm(interrupt):
            verb.run(config)
    except BrokenPipeError:  # the reader of our output has gone, as `| head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except ValidationError as error:
        print(f"error: {explain(error, 'settings', verb.config())}", file=sys.stderr)
        return 1
    except (UserError, ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except Stopped as stop:
        print(stop, file=sys.stderr)
        return stop.exit_code
    except KeyboardInterrupt:
        what = "Stopped by SIGTERM" if sigterms else "Interrupted"
        print(f"{what}. Run the same command again to resume from what is finished.", file=sys.stderr)
        return 143 if sigterms else 130
    return 0


def _init(config: Any) -> None:
    from importlib.resources import files

    folder = Path(config.folder)
    folder.mkdir(parents=True, exist_ok=True)
    for shipped in sorted(files("dmvae.config").joinpath("examples").iterdir(), key=lambda entry: entry.name):
        target = folder / shipped.name
        if target.exists():
            _print(f"kept      {target}")
        elif target.suffix == ".toml":
            target.write_bytes(shipped.read_bytes())
            _print(f"written   {target}")
    _print(f"next      {command('prepare')} {folder / 'digits.toml'}")


def _prepare(config: Any) -> None:
    from dmvae.data.preparation.prepare import prepare_and_upload
    from dmvae.data.storage.location import is_uri

    folder = prepare_and_upload(config, progress=_print)
    output = Path(folder).name if is_uri(folder) else folder
    _print(f"next      {command('inspect')} {folder} --output {output}-inspection")


def _inspect(config: Any) -> None:
    from dmvae.report.dataset_overview import inspect

    try:
        found = inspect(config, progress=_print)
    except ImportError as error:
        raise UserError(str(error)) from None
    for line in found.lines:
        _print(line)
    _print("")
    for finding in found.findings:
        _print(f"{finding.level:<8} {finding.text}")
    if config.output is None and found.run is not None:
        _print(f"\n{found.run}")
    if found.run is not None:
        file = "CONFIG.toml" if config.output is None else Path(config.output) / "train.toml"
        _print(f"next   {command('train')} {file}")
    errors, warnings = found.count("error"), found.count("warning")
    unchecked = "" if config.verify else " (checksums not verified: add --verify)"
    if errors:
        raise UserError(f"The dataset has {errors} error(s) and {warnings} warning(s){unchecked}.")
    _print(f"No errors; {warnings} warning(s){unchecked}.")


def _train(config: Any) -> None:
    from dmvae.platform.evaluate.evaluate import metric_lines
    from dmvae.platform.train.trainer import train_run

    summary = train_run(config, progress=_print)
    if summary.was_finished:
        _print("This run is already finished. Raise training.epochs to train it further, or choose another name.")
    for line in metric_lines(summary.metrics):
        _print(line)
    _register_best(summary.run_dir, config)
    _print_row("best checkpoint", f"{summary.where}/best")
    _print_row("last checkpoint", f"{summary.where}/last")
    _print_tracking(summary.run_id, summary.tracking_uri, config.tracking)
    arguments = f"--model {summary.where}/best --dataset {config.data.dataset}{_trust(config)}"
    _print_row("next", f"{command('evaluate')} {arguments}")


def _search(config: Any) -> None:
    from dmvae.platform.evaluate.evaluate import metric_lines
    from dmvae.platform.tune.search import best_so_far, search

    found = best_so_far(config) if config.best_so_far else search(config, progress=_print)
    for trial in found.best:
        values = "  ".join(f"{name} {trial.result.figures[name]:.4g}" for name in found.objectives if trial.result)
        _print_row("best trial" if len(found.best) == 1 else "on the Pareto front", f"{trial.number}: {values}")
        for path, value in trial.params.items():
            _print(f"  {path:<40} {value}")
    for line in metric_lines(found.retrained.metrics) if found.retrained else ():
        _print(line)
    _print_row("best configuration", found.study_dir / "best.toml")
    dashboard = f"optuna-dashboard sqlite:///{found.study_dir}/optuna.db"
    _print_row("all trials", f"{found.study_dir / 'trials.json'}; {dashboard}")
    _print_tracking(found.run_id, found.tracking_uri, config.base.tracking)
    if found.retrained:
        _register_best(found.retrained.run_dir, found.config)
        _print_row("best model", f"{found.retrained.where}/best")


def _print_tracking(run_id: str, uri: str, tracking: Any) -> None:
    _print_row("MLflow run", f"{run_id} of experiment {tracking.experiment}")
    if uri.startswith("sqlite:"):
        _print_row("look at it", f"mlflow ui --backend-store-uri {uri}")


def _evaluate(config: Any) -> None:
    from dmvae.platform.evaluate.evaluate import evaluate

    evaluate(config, progress=_print)


def _report(config: Any) -> None:
    try:
        from dmvae.platform.evaluate.report import report

        file = report(config, progress=_print)
    except ImportError as error:
        raise UserError(str(error)) from None
    _print(f"report    {file}")


def _trust(config: Any) -> str:
    """Return the flag that a command needs to load the model of a run with own code."""
    from dmvae.config.own_code import packages_of
    from dmvae.training.settings import trusted

    paths = trusted(config.model)
    return f" --trust {' '.join(packages_of(paths))}" if paths else ""


def _register_best(run_dir: Path, config: Any) -> None:
    """Register a finished run's best model, if the configuration names a registered model."""
    from dmvae.platform.serve.registry import RegistryError, register
    from dmvae.training.settings import trusted

    tracking = config.tracking
    if tracking.register_as is None:
        return
    try:
        found = register(run_dir, tracking.register_as, tracking, trusted(config.model))
    except RegistryError as error:
        later = f"{command('register')} {run_dir} --name {tracking.register_as}{_trust(config)}"
        raise UserError(f"Training finished, but the model could not be registered: {error} Retry: {later}") from None
    _print_row("registered", found.uri)
    for package, how in found.own_code.items():
        _print_row("own code", f"{package}: {how}")


def _register(config: Any) -> None:
    from dmvae.platform.serve.registry import register

    found = register(Path(config.run), config.name, config.tracking, config.trust)
    _print(f"registered {found.uri}")
    for package, how in found.own_code.items():
        _print(f"own code   {package}: {how}")
    _print(f"next       {command('promote')} {found.name} --version {found.version} --dataset DATASET")


def _promote(config: Any) -> None:
    from dmvae.platform.serve.promotion import promote

    decision = promote(config, progress=_print)
    _print(f"{'promoted' if decision.moved else 'not promoted'}: {decision.reason}")
    _print(f"champion   models:/{config.name}/{decision.champion}")


def _embed(config: Any) -> None:
    from dmvae.platform.serve.embedding import embed

    summary = embed(config, progress=_print)
    _print(f"embedded   {summary.rows:,} rows, {summary.fresh:,} of them new, {summary.rows_per_second:,.0f} rows/s")
    _print(f"latents    {summary.output}")


def _serve(config: Any) -> None:
    try:
        from dmvae.platform.serve.application import run
    except ImportError as error:
        raise UserError(f"Cannot serve: {error}. Install the extra `serve`: pip install 'dmvae[serve]'.") from None
    run(config, progress=_print)


def _sync(config: Any) -> None:
    from dmvae.platform.tracking.runs import sync, tracking_uri

    results = sync(Path(config.folder), tracking_uri(config.tracking) if config.tracking.uri else None)
    for result in results:
        rejected = f", {result.rejected} rejected, see *.rejected.jsonl there" if result.rejected else ""
        message = f": {result.message}" if result.message else ""
        _print(f"{result.outbox_dir}: {result.state}, {result.lines} lines delivered{rejected}{message}")
    if not results:
        _print(f"No run records found under {config.folder}.")
    if any(result.state == "undelivered" for result in results):
        raise UserError("Not every run was delivered; the reasons are above. Run the command again to resume.")


def _status(config: Any) -> None:
    from dmvae.platform.status import statuses

    found = [status.line() for status in statuses(Path(config.folder))]
    _print("\n".join(found) if found else f"No runs or studies found in {config.folder}.")


def _doctor(config: Any) -> None:
    from dmvae.platform.doctor import report

    errors = report(config, progress=_print)
    if errors:
        raise UserError(f"{errors} check(s) failed; each line above has the remedy.")


def command(verb: str) -> str:
    """Return how to call a verb the way that this process was called."""
    return f"dmvae {verb}" if Path(sys.argv[0]).stem == "dmvae" else f"python -m jobs.{verb}"


def _print_row(label: str, value: object) -> None:
    _print(f"{label:<24} {value}")


def _print(text: str) -> None:
    print(text, flush=True)


VERBS: dict[str, Verb] = {
    "init": Verb("Write the example configurations of this package.", "init:InitConfig", _init, "folder"),
    "prepare": Verb("Convert incomplete multimodal data to a dataset.", "data:PrepareConfig", _prepare),
    "inspect": Verb("Check a dataset and propose a training run.", "inspect:InspectConfig", _inspect, "dataset"),
    "train": Verb("Train a DMVAE with Ray Train; run again to resume.", "training:TrainConfig", _train),
    "search": Verb("Search for the best configuration; run again to resume.", "search:SearchConfig", _search),
    "evaluate": Verb("Estimate the NLL of a split under a model.", "evaluation:EvaluateConfig", _evaluate),
    "report": Verb("Draw a trained model: PNG files and one HTML page.", "report:ReportConfig", _report),
    "register": Verb("Register a run's best model with MLflow.", "registry:RegisterConfig", _register, "run"),
    "promote": Verb("Make a model version the champion if it is better.", "registry:PromoteConfig", _promote, "name"),
    "embed": Verb("Write the latents of every row; run again to resume.", "registry:EmbedConfig", _embed, "model"),
    "serve": Verb("Serve a registered model with Ray Serve.", "registry:ServeConfig", _serve, "model"),
    "status": Verb("Show what runs and studies are doing.", "operations:StatusConfig", _status, "folder"),
    "doctor": Verb("Check this machine, Ray, MLflow and the place of the runs.", "operations:DoctorConfig", _doctor),
    "sync": Verb("Deliver to MLflow the records it missed.", "tracking:SyncConfig", _sync, "folder"),
}
