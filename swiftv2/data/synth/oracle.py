"""What a perfect reader of the latents would score on each trait: the ceiling of any model, published with the cohort."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.stats import pearsonr, rankdata

from swiftv2.config.synth import SynthConfig
from swiftv2.data import keyed
from swiftv2.data.synth.anatomy import NETWORKS
from swiftv2.data.synth.latents import PAIRS, lag_reading, network_bold
from swiftv2.data.synth.people import BINARY, Person, draw_people

DRAWS = 600
"""Simulated subjects with one run each, of the cohort's own length and repetition times."""
READERS = {
    "coupling_weak": "zero-lag correlation of the pair's latent BOLD",
    "coupling_medium": "zero-lag correlation of the pair's latent BOLD",
    "coupling_strong": "zero-lag correlation of the pair's latent BOLD",
    "lagged": "difference of the pair's correlations at +4 s and -4 s; their zero-lag correlation tells nothing",
    "asymmetry": "left over right amplitude of one network",
    "ventricles": "share of the growable tissue that is fluid (anatomy only)",
    "motion_confounded": "the subject's usual framewise displacement (no brain signal)",
    "site_confounded": "the site (no brain signal)",
    "null": "nothing: a coin",
    "slope": "exponent of the subject's 1/f spectrum",
}


def auroc(labels: Sequence[float] | NDArray[np.float64], scores: Sequence[float] | NDArray[np.float64]) -> float:
    """Area under the ROC curve by ranks; 0.5 for scores that tell nothing."""
    positive = np.asarray(labels) > 0.5
    ranks = rankdata(scores)
    number = int(positive.sum())
    other = len(ranks) - number
    return float((ranks[positive].sum() - number * (number + 1) / 2) / (number * other))


def auroc_error(area: float, positive: int, negative: int) -> float:
    """Standard error of an area under the ROC curve over this many subjects of the two classes (Hanley and McNeil, 1982)."""
    first, second = area / (2 - area), 2 * area**2 / (1 + area)
    spread = area * (1 - area) + (positive - 1) * (first - area**2) + (negative - 1) * (second - area**2)
    return float(np.sqrt(max(spread, 0.0) / (positive * negative)))


def readings(config: SynthConfig, person: Person, purpose: str) -> dict[str, float]:
    """What the perfect reader measures on one run of a person, by trait; `lagged_static` is the zero-lag correlation."""
    times = np.arange(config.run_frames(person.tr), dtype=np.float64) * np.float64(person.tr)
    bold = network_bold(person, keyed.generator(config.seed, purpose, person.index), times)
    values = {"slope": person.exponent, "asymmetry": person.laterality, "ventricles": person.ventricle_growth}
    values |= {"motion_confounded": person.restlessness, "site_confounded": float(person.site % 2), "null": 0.0}
    for trait, pair in PAIRS.items():
        first, second = (bold[:, NETWORKS.index(name)] for name in pair)
        static = float(np.corrcoef(first, second)[0, 1])
        values[trait] = lag_reading(first, second, person.tr) if trait == "lagged" else static
        if trait == "lagged":
            values["lagged_static"] = static
    return values


def ceilings(config: SynthConfig) -> dict[str, Any]:
    """Score of the perfect reader on each trait, over `DRAWS` unrelated subjects, with its standard error.

    Returns:
        By trait: kind, reader, metric, oracle, standard_error, chance; `lagged` also says what static connectivity gets.
    """
    alone = config.model_copy(update={"sibling_share": 0.0})
    people = draw_people(alone, DRAWS, purpose="oracle people")
    measured = [readings(alone, person, "oracle latents") for person in people]
    return {trait: _ceiling(trait, [p.labels[trait] for p in people], measured) for trait in READERS}


def _ceiling(trait: str, labels: list[float], measured: list[Mapping[str, float]] | list[dict[str, float]]) -> dict[str, Any]:
    scores = [values[trait] for values in measured]
    if trait not in BINARY:
        found = float(pearsonr(labels, scores).statistic)
        error = (1 - found**2) / np.sqrt(len(labels) - 1)
        entry = {"kind": "continuous", "metric": "pearson_r", "oracle": found, "standard_error": error, "chance": 0.0}
    else:
        found = auroc(labels, scores)
        error = auroc_error(found, int(sum(labels)), len(labels) - int(sum(labels)))
        entry = {"kind": "binary", "metric": "auroc", "oracle": found, "standard_error": error, "chance": 0.5}
    entry |= {"reader": READERS[trait]}
    if trait == "lagged":
        entry["static_connectivity"] = auroc(labels, [values["lagged_static"] for values in measured])
    return {name: round(float(v), 4) if isinstance(v, float | np.floating) else v for name, v in entry.items()}
