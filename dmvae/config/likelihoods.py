"""What is known of each likelihood without torch: its values, its parameters, and the data that suggest it.

The likelihoods themselves are in `dmvae.distributions.likelihoods`. Configurations are checked and datasets prepared
without loading torch, so what both need stands here, one entry per likelihood.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal, get_args

Values = Literal["real", "unit", "classes", "counts", "columns"]
"""Any finite numbers; numbers in [0, 1]; whole numbers below a number of classes; whole numbers of 0 or more; a table
whose columns differ in kind."""
ColumnKind = Literal["real", "positive", "count", "binary", "category"]
"""What a column of a table holds: any numbers; numbers above 0, modelled by their logarithm; whole numbers of 0 or
more; one of two classes; one of several classes."""

UNSEEN = "unseen in training"
"""The name of the class of a column that stands for all classes that no training row has."""

_HEAVY_TAILS = 4.2  # kurtosis: the geometric mean of a normal's 3 and a Laplace distribution's 6
_POISSON_DISPERSION = 1.5  # variance over mean; 1 of a Poisson distribution


@dataclass(frozen=True)
class Param:
    """One entry of `decoder_dist_params`: a number greater than 0, unless it says otherwise.

    Attributes:
        minimum: the smallest legal number; None: any number greater than 0.
        whole: only whole numbers are legal.
        words: what it may be besides a number.
        required: it must be given.
        numbers: numbers are legal.
        is_list: it is a list of such values.
    """

    minimum: int | None = None
    whole: bool = False
    words: tuple[str, ...] = ()
    required: bool = False
    numbers: bool = True
    is_list: bool = False

    def allows(self, value: Any) -> bool:
        """Tell whether a value is legal."""
        if self.is_list or isinstance(value, tuple):
            one = replace(self, is_list=False)
            return self.is_list and isinstance(value, tuple) and all(one.allows(element) for element in value)
        if isinstance(value, str):
            return value in self.words
        if not self.numbers:
            return False
        # outside of float32's range, a scale is 0 or infinite where it is used
        in_range = 1e-30 <= value <= 1e30 if self.minimum is None else self.minimum <= value <= 1e30
        return in_range and (isinstance(value, int) or not self.whole)

    def __str__(self) -> str:
        if self.is_list:
            return f"a list, each entry {replace(self, is_list=False)}"
        if not self.numbers:
            return " or ".join(f'"{word}"' for word in self.words)
        kind = "a whole number" if self.whole else "a number"
        positive = "greater than 0 (at least 1e-30, at most 1e30)"
        least = positive if self.minimum is None else f"of {self.minimum} or more"
        return " or ".join([f"{kind} {least}", *(f'"{word}"' for word in self.words)])


@dataclass(frozen=True)
class ValueTraits:
    """What an inspection found in the training values of one modality, as they are read.

    Attributes:
        kind: `binary` is 0 or 1, `log` is read as log(1 + x), `unknown` means that no row has the modality.
        classes: of the kind `classes`.
        dispersion: variance over mean of a typical feature; of counts.
        kurtosis: of a typical feature; NaN if every feature is constant.
    """

    kind: Literal["classes", "binary", "unit", "counts", "log", "real", "columns", "unknown"]
    classes: int = 0
    dispersion: float = math.nan
    kurtosis: float = math.nan


def _never(traits: ValueTraits) -> str | None:
    return None


def _no_fault(params: Mapping[str, Any]) -> str | None:
    return None


@dataclass(frozen=True)
class LikelihoodSpec:
    """One likelihood.

    Attributes:
        values: what it is a distribution of.
        params: its entries in `decoder_dist_params`.
        check_params: says what is wrong with parameters that are legal one by one; None if nothing is.
        suggest: says why values with these traits suggest it; None if they do not.
        suggested_params: parameters that go with a suggestion.
        suggested_params_of_images: those for images, if they differ.
    """

    values: Values = "real"
    params: Mapping[str, Param] = field(default_factory=dict)
    check_params: Callable[[Mapping[str, Any]], str | None] = _no_fault
    suggest: Callable[[ValueTraits], str | None] = _never
    suggested_params: Mapping[str, Any] = field(default_factory=dict)
    suggested_params_of_images: Mapping[str, Any] | None = None

    def fault(self, params: Mapping[str, Any]) -> str | None:
        """Say what is wrong with parameters; None if nothing is."""
        unknown = sorted(params.keys() - self.params.keys())
        if unknown:
            known = ", ".join(sorted(self.params)) or "it has none"
            return f"unknown parameter {unknown[0]!r}. Available: {known}."
        for key, param in self.params.items():
            if key not in params and not param.required:
                continue
            if key not in params or not param.allows(params[key]):
                return f"{key} must be {param}, but got {params.get(key)!r}."
        return self.check_params(params)


def _check_pad(params: Mapping[str, Any]) -> str | None:
    pad, classes = params.get("pad"), params["classes"]
    if pad is None or pad < classes:
        return None
    return f"pad must be one of the classes, 0 to {classes - 1}, but got {pad}."


def _check_scale_floor(params: Mapping[str, Any]) -> str | None:
    floor, scale = params.get("scale_floor"), params.get("scale", 1.0)
    if floor is None:
        return None
    if scale not in SCALES_WITH_FLOOR:
        return f"scale_floor has no effect on scale={scale!r}. Remove it, or set scale to one of {SCALES_WITH_FLOOR}."
    if floor >= 1:
        return f"scale_floor must be below 1, as it is a share of the training deviation, but got {floor}. Lower it."
    return None


def _check_columns(params: Mapping[str, Any]) -> str | None:
    for key, kind in (("classes", "category"), ("rates", "count")):
        given, needed = len(params.get(key, ())), params["kinds"].count(kind)
        if given != needed and (given or key == "classes"):
            return f"{key} must have one entry for each column of kind {kind}, {needed}, but got {given}."
    return None


def _suggest_normal(traits: ValueTraits) -> str | None:
    if traits.kind == "real" and not traits.kurtosis > _HEAVY_TAILS:
        return f"kurtosis {traits.kurtosis:.1f} (normal 3, laplace 6)"
    return {
        "unit": "grey values in [0, 1], for which bernoulli is not a density",
        "log": "read as log(1 + x), which rarely has heavy tails",
        "unknown": "no training row has it",
    }.get(traits.kind)


def _suggest_laplace(traits: ValueTraits) -> str | None:
    heavy = traits.kind == "real" and traits.kurtosis > _HEAVY_TAILS
    return f"heavy tails: kurtosis {traits.kurtosis:.1f} (normal 3, laplace 6)" if heavy else None


def _suggest_counts(traits: ValueTraits, poisson: bool) -> str | None:
    if traits.kind != "counts" or poisson != (traits.dispersion <= _POISSON_DISPERSION):
        return None
    return f"counts: whole numbers of 0 or more, their variance {traits.dispersion:.1f} times the mean"


SCALES_WITH_FLOOR = ("learned_per_feature", "learned_per_modality")
_SCALES = {"scale": Param(words=("learned", *SCALES_WITH_FLOOR)), "scale_floor": Param(minimum=0)}
_COUNTS = {"size_factor": Param(), "rate": Param()}

SPECS: dict[str, LikelihoodSpec] = {
    "normal": LikelihoodSpec(
        params=_SCALES,
        check_params=_check_scale_floor,
        suggest=_suggest_normal,
        suggested_params={"scale": "learned_per_feature"},
        suggested_params_of_images={"scale": "learned_per_modality"},
    ),
    "laplace": LikelihoodSpec(
        params=_SCALES,
        check_params=_check_scale_floor,
        suggest=_suggest_laplace,
        suggested_params={"scale": "learned_per_feature"},
        suggested_params_of_images={"scale": "learned_per_modality"},
    ),
    "bernoulli": LikelihoodSpec(
        values="unit",
        suggest=lambda traits: "every value is 0 or 1 when read" if traits.kind == "binary" else None,
    ),
    "categorical": LikelihoodSpec(
        values="classes",
        params={
            "classes": Param(minimum=2, whole=True, required=True),
            "pad": Param(minimum=0, whole=True),
        },
        check_params=_check_pad,
        suggest=lambda traits: f"classes 0..{traits.classes - 1}" if traits.kind == "classes" else None,
    ),
    "poisson": LikelihoodSpec(
        values="counts",
        params=_COUNTS,
        suggest=lambda traits: _suggest_counts(traits, poisson=True),
    ),
    "negative_binomial": LikelihoodSpec(
        values="counts",
        params={"dispersion": Param(words=("learned",)), **_COUNTS},
        suggest=lambda traits: _suggest_counts(traits, poisson=False),
    ),
    "columns": LikelihoodSpec(
        values="columns",
        params={
            "kinds": Param(words=get_args(ColumnKind), numbers=False, is_list=True, required=True),
            "classes": Param(whole=True, is_list=True),
            "rates": Param(is_list=True),
            "scale_floor": Param(minimum=0),
        },
        check_params=_check_columns,
        suggest=lambda traits: "columns of several kinds" if traits.kind == "columns" else None,
    ),
}
"""By name. `dmvae.distributions.likelihoods.register` adds entries of likelihoods that are not built in."""


def values_of(likelihood: str | None) -> Values:
    """Return what a likelihood is a distribution of; `real` for None and for a name without an entry."""
    return SPECS[likelihood].values if likelihood in SPECS else "real"


def suggest(traits: ValueTraits) -> tuple[str, str]:
    """Return the name of the likelihood that values with these traits suggest, and the reason."""
    # what was registered last knows more than what is built in
    reasons = ((name, spec.suggest(traits)) for name, spec in reversed(SPECS.items()))
    return next((name, reason) for name, reason in reasons if reason is not None)
