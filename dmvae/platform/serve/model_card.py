"""The card of a registered model: its training data, its metrics, how to use it, and its limits."""

from collections.abc import Mapping
from typing import Any

from dmvae.data.reading.dataset import Dataset

CARD = "card.json"
README = "card.md"


def make_card(
    run: Mapping[str, Any], result: Mapping[str, Any], dataset: Dataset, weights: str, own_code: Mapping[str, str]
) -> dict[str, Any]:
    """Return the content of `card.json`.

    Args:
        run: of `run.json`.
        result: of `result.json`.
        dataset: the one that the run was trained on.
        weights: SHA-256 of the weights.
        own_code: how each package of own code comes along, in words.
    """
    train = dataset.split(run["data"]["train_split"])
    return {
        "run": run["name"],
        "run_id": result["run_id"],
        "dataset": {"name": dataset.name, "fingerprint": dataset.manifest.fingerprint},
        "train_rows": len(train),
        "train_observed": train.observed,
        "metrics": result["metrics"],
        "weights": weights,
        **({"own_code": dict(own_code)} if own_code else {}),
    }


def card_text(card: Mapping[str, Any], specs: Mapping[str, Any]) -> str:
    """Return the card as Markdown, the README of the registered model.

    Args:
        card: of `make_card`.
        specs: the fields of `ModalitySpec` by modality.
    """
    metrics, observed = card["metrics"], card["train_observed"]
    split = next((key.partition("/")[0] for key in metrics if key.endswith("/nll")), "test")
    modality_rows = "\n".join(
        f"| {name} | {tuple(spec['shape'])} | {spec['dtype']} | {observed[name] / max(card['train_rows'], 1):.1%} |"
        for name, spec in specs.items()
    )
    metric_rows = "\n".join(
        f"| {name} | {value:.4g} | {_standard_error(metrics, name)} |"
        for name, value in sorted(metrics.items())
        if "_se" not in name
    )
    return f"""# {card["run"]}

A disentangled multimodal VAE (DMVAE) with shared and private latents. Any modality of a row may be missing.

Trained on {card["train_rows"]:,} rows of the dataset {card["dataset"]["name"]} (fingerprint
`{card["dataset"]["fingerprint"]}`), MLflow run `{card["run_id"]}`.

| modality | shape of a row | type | observed in training |
|---|---|---|---|
{modality_rows}

| metric | value | standard error |
|---|---|---|
{metric_rows}

`{split}/nll` is the negative log-likelihood in nats per row, of the values as the model reads them. The operation `nll`
returns that of the values as you pass them, before any scaling.

{_own_code(card)}## How to use it

    import mlflow
    model = mlflow.pyfunc.load_model("models:/NAME@champion")
    model.predict([{{...}}], params={{"operation": "impute"}})

`mlflow.pyfunc.load_model` runs Python code that the registry holds with the model: use it only with one that you trust.
`dmvae.load("models:/NAME@champion")` reads the same weights and runs no code.

A row is a dict from modality to nested lists, in the units of the original data. Leave a missing modality out, or set
it to null. Operations: encode, reconstruct, impute, nll, sample. `impute` returns the mean and the standard deviation
over draws, and `best`, the prediction from the means of the posteriors.

## Limits

The model knows only what its training rows show. An imputed value is plausible, not measured. If an `nll` answer has
`trusted: false`, its true error may be larger than the `nll_se` that it reports.
"""


def _own_code(card: Mapping[str, Any]) -> str:
    rows = "\n".join(f"| {package} | {how} |" for package, how in card.get("own_code", {}).items())
    if not rows:
        return ""
    return f"Loading this model runs code that is not part of dmvae:\n\n| package | comes as |\n|---|---|\n{rows}\n\n"


def _standard_error(metrics: Mapping[str, float], name: str) -> str:
    stem, _, last = name.rpartition("/")
    for key in (f"{name}_se", f"{stem}_se/{last}"):
        if key in metrics:
            return f"{metrics[key]:.2g}"
    return ""
