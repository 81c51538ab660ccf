"""Latent signals in continuous time: 1/f neural noise through a haemodynamic response, motion and breathing.

A signal is a sum of Fourier components of keyed random amplitudes, evaluated at the frames' times: it does not know the
repetition time at which it is sampled.
"""

from functools import lru_cache

import numpy as np
from numpy.typing import NDArray
from scipy import stats

Floats = NDArray[np.float64]
Complex = NDArray[np.complex128]

KNEE_HZ = 0.01
HIGHEST_HZ = 0.5
PERIOD_S = 2048.0
LAG_S = 4.0


def frequencies(duration: float) -> Floats:
    """Frequencies (F,) in Hz of the components for runs of at most this many seconds."""
    period = PERIOD_S
    while period < 1.25 * duration:
        period *= 2
    return np.arange(1, round(HIGHEST_HZ * period) + 1) / period


def haemodynamic_response(times: Floats) -> Floats:
    """The canonical double-gamma response at `times` (seconds): peak at 5 s, undershoot at 15 s, ratio 1 to 6."""
    response: Floats = stats.gamma.pdf(times, 6) - stats.gamma.pdf(times, 16) / 6
    return response


@lru_cache(maxsize=4)
def _response_gain(count: int, step_hz: float) -> Complex:
    times = np.arange(0, 32, 0.1)
    hz = np.arange(1, count + 1) * step_hz
    gain: Complex = np.exp(-2j * np.pi * hz[:, None] * times) @ haemodynamic_response(times)
    return gain


def spectrum(hz: Floats, slope: Floats, duration: float) -> Complex:
    """Gain (..., F) of 1/f noise of the given slopes (...,) after the haemodynamic response.

    Flat below 0.01 Hz. The variance of a run of `duration` seconds, its mean removed, is about 1.
    """
    power = 1.0 / (KNEE_HZ**2 + hz**2) ** (np.asarray(slope)[..., None] / 2)
    gain = np.sqrt(power) * _response_gain(len(hz), hz[0])
    seen = hz >= 1.0 / duration
    scaled: Complex = gain / np.sqrt((np.abs(gain[..., seen]) ** 2).sum(axis=-1, keepdims=True))
    return scaled


def amplitudes(rng: np.random.Generator, shape: tuple[int, ...], hz: Floats) -> Complex:
    """Random amplitudes (*shape, F) of white noise; each component has an expected power of 1 when sampled."""
    pair = rng.standard_normal((*shape, len(hz), 2))
    white: Complex = pair[..., 0] + 1j * pair[..., 1]
    return white


def evaluate(components: Complex, hz: Floats, times: Floats) -> Floats:
    """The real signals (..., T) of components (..., F) at `times` (T,) in seconds."""
    phase = 2 * np.pi * np.outer(hz, times)
    signals: Floats = components.real @ np.cos(phase) - components.imag @ np.sin(phase)
    return signals


def correlate(white: Complex, first: int, second: int, correlation: Floats | float) -> None:
    """Give row `second` of white amplitudes (..., N, F) this correlation (...,) with row `first`, in place."""
    rho = np.asarray(correlation)[..., None]
    white[..., second, :] = rho * white[..., first, :] + np.sqrt(1 - rho**2) * white[..., second, :]


def lag(white: Complex, first: int, second: int, sign: Floats | float, share: float, hz: Floats) -> None:
    """Let rows `first` and `second` share a signal that comes `LAG_S` later in `second` (sign 1) or in `first` (-1).

    Time reversal turns one sign into the other, so that no correlation at equal times can tell them apart.
    """
    half = np.exp(1j * np.pi * hz * LAG_S * np.asarray(sign)[..., None])
    common = white[..., first, :].copy()
    own = white[..., second, :].copy()
    extra = white[..., -1, :]
    white[..., first, :] = np.sqrt(share) * common * half + np.sqrt(1 - share) * extra
    white[..., second, :] = np.sqrt(share) * common / half + np.sqrt(1 - share) * own


def pair_correlation(first: Floats, second: Floats) -> Floats:
    """Fisher's z (...,) of the correlation over the last axis."""
    a = first - first.mean(axis=-1, keepdims=True)
    b = second - second.mean(axis=-1, keepdims=True)
    r = (a * b).sum(axis=-1) / np.sqrt((a * a).sum(axis=-1) * (b * b).sum(axis=-1))
    z: Floats = np.arctanh(np.clip(r, -0.999999, 0.999999))
    return z


def lead(first: Floats, second: Floats) -> Floats:
    """How much better `second` follows `first` by a frame than the other way round: a difference of Fisher z (...,)."""
    return pair_correlation(first[..., :-1], second[..., 1:]) - pair_correlation(first[..., 1:], second[..., :-1])


def spectral_slope(signals: Floats, repetition_time: float) -> Floats:
    """Negative log-log slope (...,) between 0.01 and 0.08 Hz of the mean periodogram of signals (..., N, T)."""
    centred = signals - signals.mean(axis=-1, keepdims=True)
    power = (np.abs(np.fft.rfft(centred * np.hanning(signals.shape[-1]), axis=-1)) ** 2).mean(axis=-2)
    hz = np.fft.rfftfreq(signals.shape[-1], repetition_time)
    band = (hz > KNEE_HZ) & (hz < 0.08)
    x = np.log(hz[band]) - np.log(hz[band]).mean()
    slope: Floats = -(np.log(power[..., band]) @ x) / (x @ x)
    return slope


def motion(rng: np.random.Generator, level: float, times: Floats) -> Floats:
    """Six motion parameters (T, 6): x, y, z in mm, then rotations in radians; slow drift and sudden moves.

    Args:
        rng: keyed generator.
        level: about the mean framewise displacement in mm at a repetition time of 2 s.
        times: the frames' times in seconds, ascending.
    """
    duration = float(times[-1]) + 1.0
    hz = frequencies(duration)
    white = amplitudes(rng, (6,), hz) * hz**-0.9
    slow = evaluate(white / np.sqrt((np.abs(white) ** 2).sum(axis=-1, keepdims=True)), hz, times).T * level
    moves = int(rng.poisson(4 * level * duration / 60))
    start = rng.uniform(0, duration, moves)
    jump = rng.standard_normal((moves, 6)) * rng.lognormal(-1.2, 0.5, (moves, 1))
    after = times[:, None] - start
    trace = np.where(after >= 0, 0.2 + 0.8 * np.exp(-np.clip(after, 0, None) / 3.0), 0.0)
    parameters: Floats = slow + trace @ jump
    parameters[:, 3:] /= 50.0
    return parameters - parameters[0]


def framewise_displacement(parameters: Floats) -> Floats:
    """Power's displacement (T,) in mm of motion parameters (T, 6) on a sphere of 50 mm; the first is 0."""
    moved = np.abs(np.diff(parameters, axis=0, prepend=parameters[:1]))
    displacement: Floats = moved[:, :3].sum(axis=1) + 50.0 * moved[:, 3:].sum(axis=1)
    return displacement


def breathing(rng: np.random.Generator, times: Floats) -> Floats:
    """Two signals (T, 2) of variance 1: breathing at about 0.3 Hz, aliased by the sampling, in two phases."""
    hz = frequencies(float(times[-1]) + 1.0)
    slow = hz[hz < 0.05]
    wander, depth = evaluate(amplitudes(rng, (2,), slow) / np.sqrt(len(slow)), slow, times)
    phase = 2 * np.pi * (rng.uniform(0.22, 0.36) * times + 0.5 * wander) + rng.uniform(0, 2 * np.pi)
    wave = np.stack([np.cos(phase), np.sin(phase)], axis=1) * np.exp(0.25 * depth)[:, None]
    scaled: Floats = wave * np.sqrt(2)
    return scaled
