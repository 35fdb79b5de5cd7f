"""The command line: what a person types, and what a person reads when it is wrong."""

import os
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from dmvae.cli import VERBS, main, run_verb
from dmvae.config.errors import UserError
from dmvae.config.evaluation import EvaluateConfig
from dmvae.config.parsing import parse, read_toml
from dmvae.config.training import TrainConfig

CONFIGS = Path(__file__).parents[1] / "jobs" / "configs"
KINDS = {"digits": "prepare", "evaluate": "evaluate", "report": "report", "search": "search"}


def write(folder: Path, text: str) -> Path:
    file = folder / "run.toml"
    file.write_text(text)
    return file


@pytest.mark.parametrize("file", sorted(CONFIGS.glob("*.toml")), ids=lambda file: file.stem)
def test_every_shipped_configuration_is_valid(file: Path) -> None:
    config = VERBS[KINDS.get(file.stem, "train")].config()
    assert read_toml(config, file).model_dump_json()


@pytest.mark.parametrize("verb", sorted(VERBS))
def test_help_lists_settings_loads_no_torch_and_takes_under_a_second(verb: str) -> None:
    program = (
        "import sys\n"
        "from dmvae.cli import run_verb\n"
        "try:\n"
        f"    run_verb({verb!r}, ['--help'])\n"
        "finally:\n"
        "    heavy = {'torch', 'ray', 'mlflow', 'optuna', 'pyarrow'} & sys.modules.keys()\n"
        "    assert not heavy, heavy\n"
    )
    fastest = float("inf")
    for _ in range(3):
        before = os.times()  # of processor time: the machine may be busy
        done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
        after = os.times()
        spent = after.children_user - before.children_user + after.children_system - before.children_system
        fastest = min(fastest, spent)
        assert done.returncode == 0, done.stderr
        if fastest < 1.0:
            break
    assert "options" in done.stdout
    assert fastest < 1.0


def test_flags_lie_over_the_file(tmp_path: Path) -> None:
    file = write(tmp_path, 'name = "a"\n[data]\ndataset = "d"\n[optim]\nlearning_rate = 0.5\n')
    config = parse(TrainConfig, "x", "", [str(file), "--training.epochs", "7", "--model.latent-dim", "3"])
    assert (config.optim.learning_rate, config.training.epochs, config.model.latent_dim) == (0.5, 7, 3)


def test_a_configuration_needs_no_file() -> None:
    config = parse(EvaluateConfig, "x", "", ["--model", "m", "--dataset", "d", "--evaluation.num-draws", "20"])
    assert (config.model, config.evaluation.num_draws) == ("m", 20)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("[optim]\nlearning_rat = 1.0", ["optim.learning_rat", "did you mean 'learning_rate'"]),
        ("[training]\nepochs = 0", ["training.epochs", "greater than 0", "got 0"]),
        ("[training]\nepochs = 'many'", ["training.epochs", "'many'"]),
        ("[model]\nbeta = -1.0", ["model.beta", "-1.0"]),
        ("[model]\nbeta = nan", ["model.beta", "nan"]),
        ("[model]\ninput_dims = {a = [3]}\ndecoders_dist = {b = 'normal'}", ["decoders_dist", "['b']", "['a']"]),
        ("[model]\ninput_dims = {a = [3, 0]}", ["model.input_dims.a", "got 0"]),
        ("[model]\ninput_dims = {joint = [3]}", ["'joint'", "Rename"]),
        ("[model]\nrescale_factors = {a = 1.0}\ninput_dims = {a = [1]}", ["uses_likelihood_rescaling"]),
        ("[optim]\nweight_decay = 0.1", ["adamw"]),
        ("[evaluation]\nnum_draws = 1", ["evaluation.num_draws", "2"]),
        ("nonsense", ["not valid TOML"]),
    ],
)
def test_a_bad_file_gets_one_message_that_names_file_key_and_law(
    text: str, words: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = write(tmp_path, text if text == "nonsense" else f'name = "a"\ndata.dataset = "d"\n{text}\n')
    assert run_verb("train", [str(file)]) == 2
    message = capsys.readouterr().err
    assert message.startswith("error: ")
    assert "Traceback" not in message
    for word in [str(file), *words]:
        assert word in message


def test_a_bad_flag_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = write(tmp_path, 'name = "a"\n[data]\ndataset = "d"\n')
    assert run_verb("train", [str(file), "--optim.weight-decay", "0.5"]) == 2
    assert "adamw" in capsys.readouterr().err
    with pytest.raises(SystemExit) as stop:
        run_verb("train", [str(file), "--optim.learning-rat", "0.5"])
    assert stop.value.code == 2
    assert "learning-rate" in capsys.readouterr().err


def test_sync_takes_a_folder_as_its_only_argument(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_verb("sync", [str(tmp_path)]) == 0
    assert capsys.readouterr().out == f"No run records found under {tmp_path}.\n"
    assert run_verb("train", [str(tmp_path)]) == 2
    assert "must be a TOML file" in capsys.readouterr().err


def test_an_absent_file_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    assert run_verb("train", ["absent.toml"]) == 2
    assert "Configuration file not found: absent.toml" in capsys.readouterr().err


def test_a_missing_setting_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="name: this setting is required"):
        read_toml(TrainConfig, write(tmp_path, '[data]\ndataset = "d"\n'))


def test_the_console_command_lists_its_verbs(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--help"]) == 0
    shown = capsys.readouterr().out
    assert all(verb in shown for verb in VERBS)
    assert main(["fly"]) == 2
    assert "'fly'" in capsys.readouterr().err


def test_every_job_is_a_verb() -> None:
    jobs = {file.stem for file in CONFIGS.parent.glob("*.py")} - {"__init__"}
    assert jobs == set(VERBS) - {"init"}, "a checkout has the configurations"


def test_the_lock_pins_what_the_project_asks_for() -> None:
    root = CONFIGS.parents[1]
    lock = dict(line.split("==") for line in (root / "requirements.lock").read_text().splitlines() if "==" in line)
    project = tomllib.loads((root / "pyproject.toml").read_text())["project"]
    wanted = [*project["dependencies"], *project["optional-dependencies"]["dev"]]
    names = {name.replace("_", "-").lower() for name in lock}
    for requirement in wanted:
        name = requirement.split("[")[0].split(">")[0].split("=")[0].strip().replace("_", "-").lower()
        assert name in names | {"dmvae"}, requirement
    assert lock["torch"] == "2.13.0"


def test_sync_takes_a_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_verb("sync", [str(tmp_path)]) == 0
    assert f"No run records found under {tmp_path}" in capsys.readouterr().out
