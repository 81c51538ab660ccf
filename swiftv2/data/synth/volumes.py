"""From a person and a run's latents to the numbers of a scanner: static image, networks, physiology, motion, noise."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from swiftv2.data.synth.anatomy import NETWORKS, TISSUES, Atlas, Lattice
from swiftv2.data.synth.latents import LATERAL, breathing, network_bold, slow_signal
from swiftv2.data.synth.people import Person

Array = NDArray[np.float32]
Floats = NDArray[np.float64]

SOURCES = {"networks": slice(0, -4), "global": slice(-4, -3), "respiration": slice(-3, -2), "drift": slice(-2, None)}
"""Where each kind of shared signal is among the components."""

GREY, WHITE, FLUID = 1000.0, 880.0, 1180.0
SLOPE = 1.25
"""Source units of one step of the stored integers."""
GLOBAL_PERCENT, RESPIRATION_PERCENT, DRIFT_PERCENT = 0.35, 0.25, 0.4
SMOOTH_NOISE_SHARE = 0.5
NOISE_FWHM_MM = 6.0
NOISE_MEMORY_SECONDS = 2.2
LEAST_NOISE_SHARE = 0.5
"""Least deviation of the noise, as a share of the whole deviation."""
SPIKE_SHARE = 0.5
"""How much of a sudden move is left after realignment."""
FRAMES_AT_ONCE = 64
MEDIAN_DISPLACEMENT_MM = 0.12
HEAD_RADIUS_MM = 50.0
NON_STEADY_GAIN = 0.06


@dataclass(frozen=True)
class Anatomy:
    """A person's static image and maps on a lattice, (z, y, x) float32 each."""

    lattice: Lattice
    head: NDArray[np.bool_]
    """Voxels with any signal; V of them."""
    brain: NDArray[np.bool_]
    grey: Array
    static: Array
    networks: Array
    """(networks, z, y, x), largest about 1."""


@dataclass(frozen=True)
class Run:
    """One run: stored integers (T, z, y, x) int16 with slope `SLOPE`, and its confounds (T,) by column name."""

    stored: NDArray[np.int16]
    confounds: dict[str, NDArray[np.float64]]
    non_steady: int


def make_anatomy(person: Person, atlas: Atlas, lattice: Lattice, rng: np.random.Generator) -> Anatomy:
    """A person's brain: the template moved by up to 2 mm, with their ventricles and their coil's bias field."""
    shift, scale = rng.uniform(-2.0, 2.0, 3), 1.0 + 0.015 * rng.standard_normal()
    maps = atlas.sample(lattice, shift, scale)
    mask, grey, white, growth = maps[: len(TISSUES)]
    fluid = np.clip(mask - grey - white, 0.0, 1.0) + person.ventricle_growth * growth
    grey, white = (tissue * (1 - person.ventricle_growth * growth) for tissue in (grey, white))
    total = np.maximum(grey + white + fluid, 1e-3)
    image = (GREY * grey + WHITE * white + FLUID * fluid) / total
    image *= np.exp(0.12 * _smooth_field(lattice, rng))
    brain = mask > 0.5
    static: Array = np.where(mask > 0.05, image * np.minimum(total, 1.0), 0.0).astype(np.float32)
    networks = maps[len(TISSUES) :].copy()
    _, _, x = lattice.axes()
    side = np.exp(np.where(x < 0, 0.5, -0.5) * person.laterality).astype(np.float32)
    networks[NETWORKS.index(LATERAL)] *= side
    return Anatomy(lattice, static > 0, brain, grey.astype(np.float32), static, networks)


def make_run(person: Person, anatomy: Anatomy, frames: int, non_steady: int, rng: np.random.Generator) -> Run:
    """One run of a person (deterministic in `rng`); the signals are made for the head's voxels alone, (T, V)."""
    per_cent = shared_signal(*components(person, anatomy, frames, rng))
    level = noise_level(person, anatomy, per_cent)
    smooth, white = noise(anatomy, frames, person.tr, rng)
    smooth *= np.float32(level * np.sqrt(SMOOTH_NOISE_SHARE))
    white *= np.float32(level * np.sqrt(1 - SMOOTH_NOISE_SHARE))
    per_cent += smooth
    per_cent += white
    per_cent[:non_steady] += 100.0 * NON_STEADY_GAIN * np.exp(-np.arange(non_steady, dtype=np.float32))[:, None]
    steps, spikes = motion(person, frames, rng)
    image: Array = anatomy.static[anatomy.head] * (1 + per_cent / np.float32(100))
    for frame in np.flatnonzero(spikes):
        image[frame] += spike(anatomy, steps[frame])
    stored = np.zeros((frames, *anatomy.lattice.shape), np.int16)
    stored[:, anatomy.head] = np.rint(image / SLOPE).clip(0, np.iinfo(np.int16).max)
    return Run(stored, _confounds(image, anatomy, steps), non_steady)


def components(person: Person, anatomy: Anatomy, frames: int, rng: np.random.Generator) -> tuple[Floats, Floats]:
    """What voxels share: time courses (C, T) and maps (C, V), whose products are per cent of the static image.

    C are the networks, the global signal, breathing and two drifts, as `SOURCES` names them.
    """
    times = np.arange(frames, dtype=np.float64) * np.float64(person.tr)
    networks = anatomy.networks[:, anatomy.head]
    grey = anatomy.grey[anatomy.head]
    amplitude = np.sqrt(np.mean(np.square(networks[:, grey > 0.5]).sum(axis=0)))
    # Legendre polynomials, so that linear and quadratic drifts do not lean on one another.
    along = np.linspace(-1.0, 1.0, frames)
    bold = network_bold(person, rng, times)
    courses = np.vstack((bold.T, slow_signal(rng, times), breathing(rng, times), along, 1.5 * along**2 - 0.5))
    fields = [_smooth_field(anatomy.lattice, rng)[anatomy.head] for _ in range(3)]
    maps = (
        networks * (person.fluctuation / amplitude),
        GLOBAL_PERCENT * (grey + 0.4)[None],
        RESPIRATION_PERCENT * fields[0][None],
        DRIFT_PERCENT * np.stack(fields[1:]),
    )
    return courses.astype(np.float64), np.concatenate(maps, dtype=np.float64)


def shared_signal(courses: Floats, maps: Floats) -> Array:
    """The sum (T, V) of the products of courses (C, T) and maps (C, V)."""
    signal = np.empty((courses.shape[1], maps.shape[1]), np.float32)
    # Products in double precision: rounded to single, they are the same on every processor.
    for start in range(0, len(signal), FRAMES_AT_ONCE):
        signal[start : start + FRAMES_AT_ONCE] = courses.T[start : start + FRAMES_AT_ONCE] @ maps
    return signal


def noise_level(person: Person, anatomy: Anatomy, shared: Array) -> float:
    """Deviation in per cent of the noise that, beside the shared signal (T, V), gives the person's temporal SNR."""
    grey = (anatomy.grey > 0.5)[anatomy.head]
    total = 100.0 / person.temporal_snr
    rest = total**2 - float(np.mean(shared[:, grey].var(axis=0)))
    return float(np.sqrt(max(rest, (LEAST_NOISE_SHARE * total) ** 2)))


def _smooth_field(lattice: Lattice, rng: np.random.Generator) -> Array:
    """A random polynomial of second order in space, of about unit size over the head."""
    z, y, x = (axis / 80.0 for axis in lattice.axes())
    terms = (x, y, z, x * y, y * z, x * z, x**2 - 0.3, y**2 - 0.3, z**2 - 0.3)
    weights = rng.standard_normal(len(terms)).astype(np.float32)
    field = sum(weight * term for weight, term in zip(weights, terms, strict=True))
    return np.broadcast_to(np.asarray(field, dtype=np.float32), lattice.shape)


def noise(anatomy: Anatomy, frames: int, tr: float, rng: np.random.Generator) -> tuple[Array, Array]:
    """Two noises (T, V) of unit deviation: one smooth in space that remembers, and one that is white."""
    sigma = NOISE_FWHM_MM / 2.355 / anatomy.lattice.voxel_mm
    smooth = np.empty((frames, int(anatomy.head.sum())), np.float32)
    for start in range(0, frames, FRAMES_AT_ONCE):
        box = rng.standard_normal((min(FRAMES_AT_ONCE, frames - start), *anatomy.lattice.shape), dtype=np.float32)
        ndimage.gaussian_filter(box, (0.0, sigma, sigma, sigma), mode="wrap", truncate=2.5, output=box)
        smooth[start : start + len(box)] = box[:, anatomy.head]
    smooth /= smooth.std()
    memory = np.float32(np.exp(-tr / NOISE_MEMORY_SECONDS))
    for frame in range(1, frames):
        smooth[frame] *= np.sqrt(1 - memory**2)
        smooth[frame] += memory * smooth[frame - 1]
    return smooth, rng.standard_normal(smooth.shape, dtype=np.float32)


def motion(person: Person, frames: int, rng: np.random.Generator) -> tuple[NDArray[np.float64], NDArray[np.bool_]]:
    """Frame-to-frame changes (T, 6) of three translations (mm) and three rotations (rad), and which are spikes."""
    usual = MEDIAN_DISPLACEMENT_MM * np.exp(person.restlessness)
    sizes = np.array([1.0, 1.0, 1.0, 1 / HEAD_RADIUS_MM, 1 / HEAD_RADIUS_MM, 1 / HEAD_RADIUS_MM])
    # The sum of six half-normal numbers has a mean of 4.8 deviations.
    steps = usual / 4.8 * sizes * rng.standard_normal((frames, 6))
    spikes = rng.random(frames) < 0.1 * usual
    steps[spikes] += sizes * rng.choice([-1.0, 1.0], (int(spikes.sum()), 6)) * rng.uniform(0.1, 0.4, (int(spikes.sum()), 1))
    steps[0], spikes[0] = 0.0, False
    return steps, spikes


def spike(anatomy: Anatomy, step: Floats) -> Array:
    """What realignment leaves of a sudden move by `step` (6,): a change (V,) of the image where it has edges."""
    gradient = (np.gradient(anatomy.static, anatomy.lattice.voxel_mm, axis=axis)[anatomy.head] for axis in (2, 1, 0))
    moved = sum(float(mm) * slope for mm, slope in zip(step[:3], gradient, strict=True))
    return np.asarray(SPIKE_SHARE * moved, dtype=np.float32)


def _confounds(image: Array, anatomy: Anatomy, steps: NDArray[np.float64]) -> dict[str, NDArray[np.float64]]:
    """Columns of fMRIPrep's table that follow from the images and the motion."""
    parameters = np.cumsum(steps, axis=0)
    displacement = np.abs(steps[:, :3]).sum(axis=1) + HEAD_RADIUS_MM * np.abs(steps[:, 3:]).sum(axis=1)
    displacement[0] = np.nan
    brain, grey, static = anatomy.brain[anatomy.head], anatomy.grey[anatomy.head], anatomy.static[anatomy.head]
    white = brain & (grey < 0.1) & (static < GREY)
    fluid = brain & (static > np.quantile(static[brain], 0.97))
    means = {"global_signal": brain, "white_matter": white, "csf": fluid}
    columns = {name: image[:, part].mean(axis=1).astype(np.float64) for name, part in means.items()}
    columns["framewise_displacement"] = displacement
    names = ("trans_x", "trans_y", "trans_z", "rot_x", "rot_y", "rot_z")
    return columns | dict(zip(names, parameters.T, strict=True))
