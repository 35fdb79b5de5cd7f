"""Datasets, sources and configurations made wrong by a seeded generator, and what became of them."""

import json
import random
import shutil
import tomllib
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import tomli_w
import torch
from pydantic import ValidationError

from dmvae.config.data import PrepareConfig
from dmvae.config.errors import UserError
from dmvae.config.parsing import read_toml
from dmvae.config.training import TrainConfig
from dmvae.data.errors import DatasetError
from dmvae.data.format.manifest import Manifest
from dmvae.data.preparation.prepare import prepare
from dmvae.data.preparation.writer import write_dataset
from dmvae.data.reading.dataset import open_dataset
from dmvae.data.storage.verify import sha256_of
from dmvae.model.dmvae import DMVAE
from dmvae.platform.evaluate.checks import check_data
from dmvae.training.loop import train
from dmvae.training.settings import resolve
from dmvae.training.setup import WorkerData
from dmvae.training.state import TrainState, build_optimizer
from dmvae.training.step import Collectives, NonFiniteLossError
from tests.data.preparation.test_rows import make_rows

SPLITS = ("train", "val", "test")
Content = dict[str, np.ndarray]


@dataclass(frozen=True)
class Case:
    """What is opened, and whether there is a correct result besides an error.

    Attributes:
        folder: holds `data/`, `rows.npz` and `run.toml`.
        expected: `error`; `original`: an error, or the values of the dataset before it was made wrong; `file`: an
            error, or what pyarrow reads from the files; `valid`: an error, or a configuration.
    """

    folder: Path
    expected: str


def make_original(folder: Path) -> Path:
    """Write a dataset of every type of column, two shards in its larger split; its source; and a run's settings."""
    rows = make_rows(90, string_ids=True)
    splits = {"train": rows.take(slice(0, 50)), "val": rows.take(slice(50, 70)), "test": rows.take(slice(70, 90))}
    folder.mkdir(parents=True)
    write_dataset(folder / "data", splits, shard_bytes=25 * rows.columns.row_bytes, record_batch_rows=8)
    part = make_rows(30, complete=True)
    np.savez(folder / "rows.npz", id=part.ids, label=np.abs(part.labels), **part.data)
    tree = {
        "name": "run",
        "seed": 1,
        "data": {"dataset": str(folder / "data"), "streams": 8, "window_rows": 64},
        "model": {"latent_dim": 2, "beta": 0.5, "modalities_specific_dim": dict.fromkeys(rows.data, 1)},
        "optim": {"learning_rate": 0.01, "schedule": "cosine", "warmup_steps": 3},
        "training": {"epochs": 2, "batch_size": 16, "precision": "float64", "monitor": "joint"},
        "workers": {"num": 2, "cpus": 0.5},
        "evaluation": {"num_draws": 20, "proposal": "encoder"},
    }
    (folder / "run.toml").write_text(tomli_w.dumps(tree))
    return folder


def contents(folder: Path) -> dict[str, Content]:
    """Read every split through the project's reader."""
    dataset, found = open_dataset(folder / "data"), {}
    for name in SPLITS:
        split = dataset.split(name)
        batch = split.read(np.arange(len(split)), dtype=torch.float64)
        found[name] = {"id": np.asarray(batch.ids).astype(str)}
        found[name] |= {f"data.{key}": values.numpy() for key, values in batch.data.items()}
        masks = batch.masks or {}
        found[name] |= {f"mask.{key}": masks.get(key, torch.ones(len(batch)) > 0).numpy() for key in batch.data}
    return found


def contents_by_pyarrow(folder: Path) -> dict[str, Content]:
    """Read every split with pyarrow alone, scaled and zero-filled as the reader promises."""
    manifest, found = json.loads((folder / "data" / "dataset.json").read_text()), {}
    for name in SPLITS:
        tables = []
        for shard in manifest["splits"][name]["shards"]:
            with pa.memory_map(str(folder / "data" / shard["path"])) as file:
                tables.append(pa.ipc.open_file(file).read_all())
        table = pa.concat_tables(tables).combine_chunks()
        found[name] = {"id": np.asarray(table["id"].to_pylist()).astype(str)}
        for key in manifest["modalities"]:
            column = table[key].combine_chunks()
            here = column.is_valid().to_numpy(zero_copy_only=False)
            shape = (len(column), *column.type.shape)
            values = column.storage.values.to_numpy().reshape(shape).astype(np.float64)
            values = np.where(here.reshape(-1, *[1] * (len(shape) - 1)), values, 0)
            found[name][f"data.{key}"] = values / 255 if manifest["modalities"][key]["dtype"] == "uint8" else values
            found[name][f"mask.{key}"] = here
    return found


def admit(folder: Path) -> None:
    """Make the manifest agree with the files as to sizes and checksums, and with itself."""
    file = folder / "data" / "dataset.json"
    content = json.loads(file.read_text())
    for split in content["splits"].values():
        for shard in split["shards"]:
            path = folder / "data" / shard["path"]
            shard["bytes"], shard["sha256"] = path.stat().st_size, sha256_of(path)
    write_manifest(file, content)


def write_manifest(file: Path, content: dict[str, Any]) -> None:
    """Write a manifest with the fingerprint that belongs to it, if one can belong to it."""
    content.pop("fingerprint", None)
    try:
        content["fingerprint"] = Manifest.model_validate(content).fingerprint
    except (ValidationError, TypeError):
        content["fingerprint"] = "0" * 64
    file.write_text(json.dumps(content))


def flip(file: Path, draw: random.Random) -> None:
    content = bytearray(file.read_bytes())
    for _ in range(draw.choice((1, 1, 2, 8))):
        content[draw.randrange(len(content))] ^= 1 << draw.randrange(8)
    file.write_bytes(content)


def cut_or_grow(file: Path, draw: random.Random) -> None:
    content = file.read_bytes()
    file.write_bytes(content[: draw.randrange(len(content))] if draw.random() < 0.8 else content + draw.randbytes(9))


def shard_of(folder: Path, draw: random.Random, split: str = "*") -> Path:
    return draw.choice(sorted((folder / "data").glob(f"{split}/*.arrow")))


def leaves(tree: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """The paths of all that is no table, and of the tables too."""
    items = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else ()
    return [path, *(leaf for key, value in items for leaf in leaves(value, (*path, key)))]


WRONG: tuple[Any, ...] = (
    -1,
    0,
    3,
    2**62,
    2**70,
    0.5,
    1e300,
    True,
    "",
    "x",
    "../../etc",
    "train",
    [],
    [1],
    [0],
    {},
    {"a": 1},
)


def put_wrong_value(tree: Any, draw: random.Random) -> None:
    """Replace something in a tree by what is of another type or out of range, or rename or drop it."""
    path = draw.choice([path for path in leaves(tree) if path])
    place = tree
    for key in path[:-1]:
        place = place[key]
    how = draw.random()
    if how < 0.8:
        place[path[-1]] = draw.choice(WRONG)
    elif how < 0.9 and isinstance(place, dict):
        place[f"{path[-1]}x"] = place.pop(path[-1])
    else:
        del place[path[-1]]


def rewrite(file: Path, change: Callable[[pa.Table], pa.Table]) -> None:
    with pa.memory_map(str(file)) as source:
        table = change(pa.ipc.open_file(source).read_all())
    chunks = [table.slice(start, 8).combine_chunks() for start in range(0, max(len(table), 1), 8)]
    file.unlink()
    with pa.OSFile(str(file), "wb") as sink, pa.ipc.new_file(sink, table.schema) as writer:
        for chunk in chunks:
            writer.write_table(chunk)


def change_schema(table: pa.Table, draw: random.Random) -> pa.Table:
    name = draw.choice(table.schema.names)
    number = table.schema.get_field_index(name)
    match draw.randrange(5):
        case 0:
            return table.drop_columns([name])
        case 1:
            return table.rename_columns([other + ("x" if other == name else "") for other in table.schema.names])
        case 2:
            return table.append_column("extra", pa.array(range(len(table))))
        case 3:
            return table.set_column(number, name, pa.array([0.5] * len(table)))
        case _:
            return table.append_column(pa.field(name, table.schema.field(name).type), table[name])


def spoil_value(table: pa.Table, draw: random.Random) -> pa.Table:
    """Put NaN, infinity or a class out of range into an observed slot."""
    name = draw.choice(("half", "single", "double", "word"))
    column = table[name].combine_chunks()
    here = np.flatnonzero(column.is_valid().to_numpy(zero_copy_only=False))
    values = column.storage.values.to_numpy().copy().reshape(len(column), -1)
    bad = draw.choice((-1, 99, 2**40)) if name == "word" else draw.choice((np.nan, np.inf, -np.inf))
    values[draw.choice(here), draw.randrange(values.shape[1])] = bad
    mask = pa.array(~column.is_valid().to_numpy(zero_copy_only=False))
    lists = pa.FixedSizeListArray.from_arrays(pa.array(values.reshape(-1)), values.shape[1], mask=mask)
    number = table.schema.get_field_index(name)
    return table.set_column(number, table.schema.field(name), pa.ExtensionArray.from_storage(column.type, lists))


def repeat_id(table: pa.Table, draw: random.Random) -> pa.Table:
    ids = table["id"].to_pylist()
    ids[draw.randrange(1, len(ids))] = ids[0]
    return table.set_column(0, table.schema.field("id"), pa.array(ids))


def make_wrong(kind: str, draw: random.Random, folder: Path) -> Case:
    """Make the copy of the original in `folder` wrong in one of `KINDS`' ways."""
    manifest = folder / "data" / "dataset.json"
    if kind in ("shard flipped", "shard cut"):
        (flip if kind == "shard flipped" else cut_or_grow)(shard_of(folder, draw), draw)
        return Case(folder, "original")
    if kind in ("manifest flipped", "manifest cut"):
        (flip if kind == "manifest flipped" else cut_or_grow)(manifest, draw)
        return Case(folder, "original")
    if kind == "manifest edited":
        content = json.loads(manifest.read_text())
        put_wrong_value(content, draw)
        write_manifest(manifest, content) if isinstance(content, dict) else manifest.write_text(json.dumps(content))
        return Case(folder, "file")
    if kind == "shard flipped and admitted":
        flip(shard_of(folder, draw), draw)
        admit(folder)
        return Case(folder, "file")
    if kind in ("schema changed", "value out of range", "id repeated"):
        change = {"schema changed": change_schema, "value out of range": spoil_value, "id repeated": repeat_id}[kind]
        rewrite(shard_of(folder, draw), lambda table: change(table, draw))
        admit(folder)
        return Case(folder, "error")
    if kind == "split empty":
        return empty_split(folder, draw)
    if kind == "source flipped":
        (flip if draw.random() < 0.7 else cut_or_grow)(folder / "rows.npz", draw)
        return Case(folder, "source")
    file = folder / "run.toml"
    if kind == "settings flipped":
        (flip if draw.random() < 0.7 else cut_or_grow)(file, draw)
    else:
        tree = tomllib.loads(file.read_text())
        put_wrong_value(tree, draw)
        file.write_text(tomli_w.dumps(tree))
    return Case(folder, "valid")


KINDS = (
    "shard flipped", "shard cut", "manifest flipped", "manifest cut", "manifest edited", "shard flipped and admitted",
    "schema changed", "value out of range", "id repeated", "split empty", "source flipped", "settings flipped",
    "settings edited",
)  # fmt: skip


def empty_split(folder: Path, draw: random.Random) -> Case:
    """Take all rows from a split: its shards from the manifest, or the rows from its shards."""
    name, manifest = draw.choice(SPLITS), folder / "data" / "dataset.json"
    content = json.loads(manifest.read_text())
    if draw.random() < 0.5:
        content["splits"][name]["shards"] = []
    else:
        for shard in content["splits"][name]["shards"]:
            rewrite(folder / "data" / shard["path"], lambda table: table.slice(0, 0))
            shard |= {"rows": 0, "observed": dict.fromkeys(shard["observed"], 0)}
    write_manifest(manifest, content)
    admit(folder)
    return Case(folder, "error")


def examine(case: Case, original: dict[str, Content]) -> str:
    """Use what was made wrong as jobs do; return `refused`, `correct`, or what is the matter."""
    try:
        if case.expected == "source":
            tree = {
                "dataset": str(case.folder / "made"),
                "source": {"kind": "npz", "path": str(case.folder / "rows.npz")},
            }
            prepare(PrepareConfig.model_validate(tree), progress=lambda line: None)
            open_dataset(case.folder / "made").verify()
            return "correct"
        config = read_toml(TrainConfig, case.folder / "run.toml")
        dataset = open_dataset(config.data.dataset)
        resolved = resolve(config, dataset)
        check_data(resolved, dataset)
        take_a_step(resolved)
        found = contents(Path(config.data.dataset).parent)
    except (UserError, DatasetError, NonFiniteLossError, ValidationError) as error:
        return "refused" if str(error) else "an empty message"
    except ValueError as error:
        ours = "/dmvae/" in traceback.extract_tb(error.__traceback__)[-1].filename
        return "refused" if ours else "".join(traceback.format_exception(error))
    except Exception as error:  # noqa: BLE001  # any other type is what is looked for
        return "".join(traceback.format_exception(error))
    if case.expected == "error":
        return "taken for good"
    expected = contents_by_pyarrow(case.folder) if case.expected == "file" else original
    same = all(
        found[split].keys() == expected[split].keys()
        and all(np.array_equal(found[split][key], expected[split][key]) for key in expected[split])
        for split in SPLITS
    )
    return "correct" if same else "other values"


def take_a_step(config: TrainConfig) -> None:
    """Begin to train, if that is a matter of moments."""
    with torch.device("meta"):
        if sum(parameter.numel() for parameter in DMVAE(config.model).parameters()) > 10**6:
            return
    torch.manual_seed(config.seed)
    dtype = torch.float64 if config.training.precision == "float64" else torch.float32
    model, data = DMVAE(config.model).to(dtype), WorkerData(config, 0, 1, dtype)
    state = TrainState(model, build_optimizer(model, config.optim))
    next(train(state, data, config, Collectives(model)))


def run_case(seed: int, original: Path, expected: dict[str, Content], folder: Path) -> tuple[str, str]:
    """Make case `seed` and use it; return its kind and what came of it."""
    draw, kind = random.Random(seed), KINDS[seed % len(KINDS)]
    shutil.copytree(original, folder)
    file = folder / "run.toml"
    file.write_text(file.read_text().replace(str(original), str(folder)))
    outcome = examine(make_wrong(kind, draw, folder), expected)
    shutil.rmtree(folder)
    return kind, outcome
