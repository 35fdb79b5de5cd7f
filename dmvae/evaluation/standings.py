"""Who wins: a model beside the best baseline, for its density and for the prediction of each modality."""

import math
from collections.abc import Mapping
from dataclasses import dataclass

_CLEAR = 2.0  # standard errors


@dataclass(frozen=True)
class Standing:
    """A model's figure beside that of its best baseline; smaller figures are better.

    Attributes:
        measure: what is compared.
        ours: the model's figure.
        baseline: the name of the best baseline.
        theirs: its figure.
        difference: theirs less ours, paired by row.
        se: the difference's standard error over rows.
    """

    measure: str
    ours: float
    baseline: str
    theirs: float
    difference: float
    se: float

    @property
    def verdict(self) -> str:
        """Whether the model wins, loses or ties: a difference within two standard errors is a tie."""
        if not abs(self.difference) > _CLEAR * self.se:
            return "tie"
        return "win" if self.difference > 0 else "loss"

    def __str__(self) -> str:
        words = {"win": "the model wins", "loss": "the model loses", "tie": "no clear difference"}
        return (
            f"{self.measure}: {words[self.verdict]}: {self.ours:.4g}, best baseline {self.baseline} {self.theirs:.4g} "
            f"(difference {self.difference:.3g} ± {self.se:.2g})"
        )


def standings(figures: Mapping[str, float]) -> list[Standing]:
    """Compare the model with the best baseline of each measure in the figures of an `EvaluationSuite`.

    Args:
        figures: names without the split, `nll` among them where baselines have an NLL.
    """
    found = []
    nll = {
        name.removesuffix("/nll"): value
        for name, value in figures.items()
        if name.endswith("/nll") and f"{name}_minus_ours" in figures
    }
    if nll:
        best = min(nll, key=lambda name: nll[name])
        difference, se = (figures[f"{best}/nll_minus_ours{suffix}"] for suffix in ("", "_se"))
        found.append(Standing("NLL", nll[best] - difference, best, nll[best], difference, se))
    modalities = [name.split("/")[1] for name in figures if name.startswith("imputation/") and name.endswith("/rmse")]
    for modality in modalities:
        place = f"imputation/{modality}/"
        ours = figures[f"{place}rmse"]
        errors = {
            name.removeprefix(place): value
            for name, value in figures.items()
            if name.startswith(place) and f"{name}_minus_ours" in figures
        }
        if errors and not math.isnan(ours):
            best = min(errors, key=lambda name: errors[name])
            difference, se = (figures[f"{place}{best}_minus_ours{suffix}"] for suffix in ("", "_se"))
            found.append(Standing(f"prediction of {modality}", ours, best, errors[best], difference, se))
    return found
