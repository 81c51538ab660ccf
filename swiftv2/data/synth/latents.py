"""Latent signals in continuous time: 1/f neural noise through a haemodynamic response.

A signal is a sum of Fourier components of keyed random amplitudes, evaluated at the frames' times: it does not know the
repetition time at which it is sampled.
"""

from functools import lru_cache

import numpy as np
from numpy.typing import NDArray
from scipy import stats

from swiftv2.data.synth.anatomy import NETWORKS
from swiftv2.data.synth.people import COUPLINGS, Person

Floats = NDArray[np.float64]
Complex = NDArray[np.complex128]

KNEE_HZ = 0.01
HIGHEST_HZ = 0.5
PERIOD_S = 2048.0
LAG_S = 4.0
LAG_SHARE = 0.8
"""Share of the variance that the two networks of the lagged trait have in common."""
BASE_COUPLING = 0.1
BREATHING_WANDER_HZ = 0.03
LATERAL = "FrontoParietalPosterior"
"""The network whose two sides differ in amplitude."""
PAIRS = {
    "coupling_weak": ("FrontoParietalAnterior", "DorsalAttention"),
    "coupling_medium": ("DefaultModePosterior", "CinguloOpercular"),
    "coupling_strong": ("VisualPosterior", "SomatomotorDorsal"),
    "lagged": ("DefaultModeAnterior", "VisualAnterior"),
}
"""The two networks that each trait couples; no network is in two pairs."""


def network_bold(person: Person, rng: np.random.Generator, times: Floats) -> NDArray[np.float32]:
    """BOLD time courses (T, networks) of about unit variance within a run, at `times` (T,) in seconds, ascending."""
    duration = float(times[-1] - times[0]) + person.tr
    hz = frequencies(duration)
    white = _white(rng, len(NETWORKS), hz)
    for trait, difference in COUPLINGS.items():
        first, second = (NETWORKS.index(name) for name in PAIRS[trait])
        rho = BASE_COUPLING + difference * (person.labels[trait] - 0.5)
        white[second] = rho * white[first] + np.sqrt(1 - rho**2) * white[second]
    first, second = (NETWORKS.index(name) for name in PAIRS["lagged"])
    # Time reversal turns one label into the other, so that no correlation at equal times can tell them apart.
    half = np.exp(1j * np.pi * hz * LAG_S * (1 if person.labels["lagged"] else -1))
    common = np.sqrt(LAG_SHARE) * _white(rng, 1, hz)[0]
    white[first] = common * half + np.sqrt(1 - LAG_SHARE) * white[first]
    white[second] = common / half + np.sqrt(1 - LAG_SHARE) * white[second]
    return _evaluate(white * spectrum(hz, person.exponent, duration), hz, times).T.astype(np.float32)


def slow_signal(rng: np.random.Generator, times: Floats) -> Floats:
    """One more signal (T,) of the same kind, for what the whole brain shares."""
    duration = float(times[-1] - times[0]) + float(times[1] - times[0])
    hz = frequencies(duration)
    signal: Floats = _evaluate(_white(rng, 1, hz) * spectrum(hz, 1.0, duration), hz, times)[0]
    return signal


def breathing(rng: np.random.Generator, times: Floats) -> Floats:
    """A wave (T,) of variance 1 at 0.25 to 0.33 Hz, of wandering rate and depth; long repetition times alias it."""
    hz = frequencies(float(times[-1] - times[0]))
    slow = hz[hz < BREATHING_WANDER_HZ]
    wander, depth = _evaluate(_white(rng, 2, slow) / np.sqrt(len(slow)), slow, times)
    phase = 2 * np.pi * (rng.uniform(0.25, 0.33) * times + 0.5 * wander + rng.uniform())
    wave: Floats = np.sqrt(2) * np.sin(phase) * np.exp(0.2 * depth - 0.04)
    return wave


def lag_reading(first: NDArray[np.float32], second: NDArray[np.float32], tr: float) -> float:
    """Correlation of `second` with `first` (T,) 4 s before it, less that with `first` 4 s after it."""
    step = max(round(LAG_S / tr), 1)
    follows = np.corrcoef(first[:-step], second[step:])[0, 1]
    precedes = np.corrcoef(first[step:], second[:-step])[0, 1]
    return float(follows - precedes)


def frequencies(duration: float) -> Floats:
    """Frequencies (F,) in Hz of the components for runs of at most `duration` seconds."""
    period = PERIOD_S
    while period < 1.25 * duration:
        period *= 2
    return np.arange(1, round(HIGHEST_HZ * period) + 1) / period


def haemodynamic_response(times: Floats) -> Floats:
    """The canonical double-gamma response at `times` (seconds): peak at 5 s, undershoot at 15 s, ratio 6 to 1."""
    response: Floats = stats.gamma.pdf(times, 6) - stats.gamma.pdf(times, 16) / 6
    return response


def spectrum(hz: Floats, exponent: float, duration: float) -> Complex:
    """Gain (F,) of 1/f noise of this exponent, flat below 0.01 Hz, after the haemodynamic response.

    Components that complete a cycle within `duration` seconds have unit variance together, so that a run, its mean
    removed, has about that.
    """
    gain: Complex = (KNEE_HZ**2 + hz**2) ** (-exponent / 4) * _response_gain(len(hz), float(hz[0]))
    scaled: Complex = gain / np.sqrt((np.abs(gain[hz >= 1.0 / duration]) ** 2).sum())
    return scaled


@lru_cache(maxsize=4)
def _response_gain(count: int, step_hz: float) -> Complex:
    times: Floats = np.arange(320) / 10
    hz = np.arange(1, count + 1) * step_hz
    gain: Complex = np.exp(-2j * np.pi * hz[:, None] * times) @ haemodynamic_response(times)
    return gain


def _white(rng: np.random.Generator, count: int, hz: Floats) -> Complex:
    """Random amplitudes (count, F); each component has an expected variance of 1 when evaluated."""
    pair = rng.standard_normal((count, len(hz), 2))
    white: Complex = pair[..., 0] + 1j * pair[..., 1]
    return white


def _evaluate(components: Complex, hz: Floats, times: Floats) -> Floats:
    cosine, sine = _waves(hz.tobytes(), times.tobytes())
    signals: Floats = components.real @ cosine - components.imag @ sine
    return signals


@lru_cache(maxsize=4)
def _waves(hz: bytes, times: bytes) -> tuple[Floats, Floats]:
    """Cosines and sines (F, T); kept, because all runs of a site share them."""
    phase = 2 * np.pi * np.outer(np.frombuffer(hz), np.frombuffer(times))
    return np.cos(phase), np.sin(phase)
