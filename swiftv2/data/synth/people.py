"""Who is in a generated cohort: sites, families, sessions, traits and the labels that follow from them."""

from dataclasses import dataclass

import numpy as np

from swiftv2.config.synth import SynthConfig
from swiftv2.data import keyed

COUPLINGS = {"coupling_weak": 0.11, "coupling_medium": 0.19, "coupling_strong": 0.355}
"""Difference between the classes of the correlation of two networks' neural signals."""
BINARY = (*COUPLINGS, "lagged", "asymmetry", "ventricles", "motion_confounded", "site_confounded", "null")
CONTINUOUS = ("slope",)
TRAITS = (*BINARY, *CONTINUOUS)
SIBLING_CORRELATION = 0.5
SLOPE_CORRELATION = 0.4


@dataclass(frozen=True)
class Person:
    """One subject and what the generator knows of them.

    Attributes:
        index: number in the cohort, from 0.
        family: number of the family.
        site: number of the site.
        sessions: 1 or 2.
        tr: repetition time in seconds.
        labels: value of every trait: 0 or 1, or a number for `slope`.
        exponent: exponent of the 1/f spectrum of the neural signals.
        laterality: natural logarithm of left over right amplitude of the lateralised network.
        ventricle_growth: share of the growable tissue around the ventricles that is fluid.
        restlessness: natural logarithm of the usual framewise displacement over its median.
        fluctuation: standard deviation of grey matter's network signal, per cent of its mean.
        temporal_snr: mean over standard deviation in time of grey matter, as the mean variance of its voxels gives it.
    """

    index: int
    family: int
    site: int
    sessions: int
    tr: float
    labels: dict[str, float]
    exponent: float
    laterality: float
    ventricle_growth: float
    restlessness: float
    fluctuation: float
    temporal_snr: float

    @property
    def name(self) -> str:
        """The BIDS label, such as sub-0001."""
        return f"sub-{self.index + 1:04d}"


def draw_people(config: SynthConfig, count: int, purpose: str = "people") -> list[Person]:
    """Draw subjects; each depends on the seed, its family and its own number only."""
    people: list[Person] = []
    while len(people) < count:
        index = len(people)
        rng = keyed.generator(config.seed, purpose, index)
        # A sibling follows their elder one, so that a pair costs two places and the share comes out as said.
        alone = (
            not people or people[-1].family != index - 1 or rng.random() >= config.sibling_share / (2 - config.sibling_share)
        )
        family = index if alone else people[-1].family
        site = family % config.sites
        people.append(_draw(config, index, family, site, rng, keyed.generator(config.seed, f"{purpose} family", family)))
    return people


def _draw(
    config: SynthConfig, index: int, family: int, site: int, own: np.random.Generator, shared: np.random.Generator
) -> Person:
    share = SIBLING_CORRELATION
    z = dict(
        zip(
            TRAITS,
            np.sqrt(share) * shared.standard_normal(len(TRAITS)) + np.sqrt(1 - share) * own.standard_normal(len(TRAITS)),
            strict=True,
        )
    )
    labels: dict[str, float] = {name: float(z[name] > 0) for name in BINARY}
    restlessness = float(0.5 * own.standard_normal())
    labels["motion_confounded"] = float(z["motion_confounded"] + 3.0 * restlessness > 0)
    labels["site_confounded"] = float(z["site_confounded"] + (1.0 if site % 2 else -1.0) > 0)
    tilt = float(own.standard_normal())
    labels["slope"] = round(float(SLOPE_CORRELATION * tilt + np.sqrt(1 - SLOPE_CORRELATION**2) * z["slope"]), 4)
    return Person(
        index=index,
        family=family,
        site=site,
        sessions=2 if own.random() < config.session_share else 1,
        tr=config.repetition_times[site % len(config.repetition_times)],
        labels=labels,
        exponent=1.0 + 0.25 * tilt,
        laterality=float((0.3 if labels["asymmetry"] else -0.3) + 0.2 * own.standard_normal()),
        ventricle_growth=float(np.clip(0.45 + (0.15 if labels["ventricles"] else -0.15) + 0.2 * own.standard_normal(), 0, 1)),
        restlessness=restlessness,
        fluctuation=float(np.clip(1.0 + 0.2 * own.standard_normal(), 0.5, 1.5)),
        temporal_snr=float(own.uniform(45.0, 75.0) * (0.95 if site % 2 else 1.0)),
    )


def table(config: SynthConfig, people: list[Person]) -> list[dict[str, str]]:
    """Rows of participants.tsv: ids, site, family, labels; missing ones are n/a."""
    rows = []
    for person in people:
        rng = keyed.generator(config.seed, "missing", person.index)
        values = {name: f"{person.labels[name]:g}" for name in TRAITS}
        shown = {name: "n/a" if rng.random() < config.missing_share else value for name, value in values.items()}
        rows.append(
            {
                "participant_id": person.name,
                "site": f"site{person.site + 1}",
                "family_id": f"f{person.family + 1:04d}",
                **shown,
            }
        )
    return rows


def withdrawn(config: SynthConfig, people: list[Person]) -> list[str]:
    """Names of the subjects who withdrew their consent."""
    return [p.name for p in people if keyed.generator(config.seed, "withdrawn", p.index).random() < config.withdrawn_share]
