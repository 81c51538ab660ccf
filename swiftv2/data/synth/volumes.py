"""From a person and a run's latents to the numbers of a scanner: static image, networks, physiology, motion, noise."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from swiftv2.data.synth.anatomy import NETWORKS, TISSUES, Atlas, Lattice
from swiftv2.data.synth.latents import LATERAL, network_bold, slow_signal
from swiftv2.data.synth.people import Person

Array = NDArray[np.float32]

GREY, WHITE, FLUID, OUTSIDE = 1000.0, 880.0, 1180.0, 40.0
SLOPE = 0.25
"""Source units of one step of the stored integers."""
GLOBAL_PERCENT, RESPIRATION_PERCENT, DRIFT_PERCENT = 0.35, 0.25, 0.4
SMOOTH_NOISE_SHARE = 0.5
NOISE_FWHM_MM = 6.0
NOISE_MEMORY_SECONDS = 2.2
SPIKE_MM = 0.5
MEDIAN_DISPLACEMENT_MM = 0.12
HEAD_RADIUS_MM = 50.0
NON_STEADY_GAIN = 0.06


@dataclass(frozen=True)
class Anatomy:
    """A person's static image and maps on a lattice, (z, y, x) float32 each."""

    lattice: Lattice
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
    static += OUTSIDE * (1 - np.minimum(mask, 1.0))
    networks = maps[len(TISSUES) :].copy()
    _, _, x = lattice.axes()
    side = np.exp(np.where(x < 0, 0.5, -0.5) * person.laterality).astype(np.float32)
    networks[NETWORKS.index(LATERAL)] *= side
    return Anatomy(lattice, brain, grey.astype(np.float32), static, networks)


def make_run(person: Person, anatomy: Anatomy, frames: int, non_steady: int, rng: np.random.Generator) -> Run:
    """One run of a person (deterministic in `rng`)."""
    times = np.arange(frames, dtype=np.float64) * np.float64(person.tr)
    bold = network_bold(person, rng, times)
    courses, maps = _components(person, anatomy, bold, times, rng)
    grey = (anatomy.grey > 0.5) & anatomy.brain
    per_cent = (courses.T @ maps.reshape(len(maps), -1)).reshape(frames, *anatomy.lattice.shape)
    structured = float(np.sqrt(np.mean(per_cent[:, grey].var(0))))
    total = 100.0 / person.temporal_snr
    noise = np.sqrt(max(total**2 - structured**2, (0.5 * total) ** 2))
    per_cent += noise * _noise(anatomy.lattice, frames, person.tr, rng)
    per_cent[:non_steady] += (
        100.0 * NON_STEADY_GAIN * np.exp(-np.arange(non_steady, dtype=np.float32))[:, None, None, None]
    )
    steps, spikes = _motion(person, frames, rng)
    image = anatomy.static * (1.0 + per_cent / 100.0)
    gradient = np.stack([np.gradient(anatomy.static, anatomy.lattice.voxel_mm, axis=axis) for axis in (2, 1, 0)])
    for frame in np.flatnonzero(spikes):
        image[frame] += 0.5 * np.tensordot(steps[frame, :3].astype(np.float32), gradient, 1)
    stored = np.rint(image / SLOPE).clip(0, np.iinfo(np.int16).max).astype(np.int16)
    return Run(stored, _confounds(image, anatomy, steps), non_steady)


def _components(
    person: Person, anatomy: Anatomy, bold: Array, times: NDArray[np.float64], rng: np.random.Generator
) -> tuple[Array, Array]:
    """Time courses (components, T) and maps (components, z, y, x), whose products are per cent of the static image."""
    grey = (anatomy.grey > 0.5) & anatomy.brain
    networks = anatomy.networks * anatomy.brain
    amplitude = np.sqrt(np.mean(np.square(networks[:, grey]).sum(0)))
    body = (anatomy.grey + 0.4) * anatomy.brain
    breath = np.sin(
        2 * np.pi * (rng.uniform(0.25, 0.33) * times + 0.3 * np.cumsum(rng.standard_normal(len(times))) / 10)
    )
    # Legendre polynomials, so that linear and quadratic drifts do not lean on one another.
    along = np.linspace(-1.0, 1.0, len(times))
    fields = np.stack([_smooth_field(anatomy.lattice, rng) for _ in range(3)]) * anatomy.brain
    courses = np.vstack(
        (bold.T, slow_signal(rng, times)[None], breath[None], along[None], (1.5 * along**2 - 0.5)[None])
    )
    maps = np.concatenate(
        (
            networks * (person.fluctuation / amplitude),
            GLOBAL_PERCENT * body[None],
            RESPIRATION_PERCENT * np.sqrt(2.0) * fields[:1],
            DRIFT_PERCENT * fields[1:],
        )
    )
    return courses.astype(np.float32), maps.astype(np.float32)


def _smooth_field(lattice: Lattice, rng: np.random.Generator) -> Array:
    """A random polynomial of second order in space, of about unit size over the head."""
    z, y, x = (axis / 80.0 for axis in lattice.axes())
    terms = (x, y, z, x * y, y * z, x * z, x**2 - 0.3, y**2 - 0.3, z**2 - 0.3)
    weights = rng.standard_normal(len(terms)).astype(np.float32)
    field = sum(weight * term for weight, term in zip(weights, terms, strict=True))
    return np.broadcast_to(np.asarray(field, dtype=np.float32), lattice.shape)


def _noise(lattice: Lattice, frames: int, tr: float, rng: np.random.Generator) -> Array:
    """Noise of unit deviation (T, z, y, x): a spatially smooth part that remembers, and a white part."""
    shape = (frames, *lattice.shape)
    smooth: Array = rng.standard_normal(shape, dtype=np.float32)
    sigma = NOISE_FWHM_MM / 2.355 / lattice.voxel_mm
    ndimage.gaussian_filter(smooth, (0.0, sigma, sigma, sigma), mode="wrap", truncate=3.0, output=smooth)
    smooth /= smooth[0].std()
    memory = np.float32(np.exp(-tr / NOISE_MEMORY_SECONDS))
    for frame in range(1, frames):
        smooth[frame] *= np.sqrt(1 - memory**2)
        smooth[frame] += memory * smooth[frame - 1]
    white = rng.standard_normal(shape, dtype=np.float32)
    smooth *= np.float32(np.sqrt(SMOOTH_NOISE_SHARE))
    white *= np.float32(np.sqrt(1 - SMOOTH_NOISE_SHARE))
    smooth += white
    return smooth


def _motion(person: Person, frames: int, rng: np.random.Generator) -> tuple[NDArray[np.float64], NDArray[np.bool_]]:
    """Frame-to-frame changes (T, 6) of three translations (mm) and three rotations (rad), and which are spikes."""
    usual = MEDIAN_DISPLACEMENT_MM * np.exp(person.restlessness)
    sizes = np.array([1.0, 1.0, 1.0, 1 / HEAD_RADIUS_MM, 1 / HEAD_RADIUS_MM, 1 / HEAD_RADIUS_MM])
    # The sum of six half-normal numbers has a mean of 4.8 deviations.
    steps = usual / 4.8 * sizes * rng.standard_normal((frames, 6))
    spikes = rng.random(frames) < 0.1 * usual
    steps[spikes] += (
        sizes * rng.choice([-1.0, 1.0], (int(spikes.sum()), 6)) * rng.uniform(0.1, 0.4, (int(spikes.sum()), 1))
    )
    steps[0], spikes[0] = 0.0, False
    return steps, spikes


def _confounds(image: Array, anatomy: Anatomy, steps: NDArray[np.float64]) -> dict[str, NDArray[np.float64]]:
    """Columns of fMRIPrep's table that follow from the images and the motion."""
    parameters = np.cumsum(steps, axis=0)
    displacement = np.abs(steps[:, :3]).sum(1) + HEAD_RADIUS_MM * np.abs(steps[:, 3:]).sum(1)
    displacement[0] = np.nan
    white = anatomy.brain & (anatomy.grey < 0.1) & (anatomy.static < GREY)
    fluid = anatomy.brain & (anatomy.static > np.quantile(anatomy.static[anatomy.brain], 0.97))
    columns = {
        "global_signal": image[:, anatomy.brain].mean(1).astype(np.float64),
        "white_matter": image[:, white].mean(1).astype(np.float64),
        "csf": image[:, fluid].mean(1).astype(np.float64),
        "framewise_displacement": displacement,
    }
    names = ("trans_x", "trans_y", "trans_z", "rot_x", "rot_y", "rot_z")
    return columns | dict(zip(names, parameters.T, strict=True))
