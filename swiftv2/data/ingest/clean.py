"""Cleaning of time courses while a store is built, by nilearn: confounds regressed out, trends and frequency bands removed.

All that nilearn.signal.clean does here is linear in a voxel's time course, and the same for all voxels of a run. So nilearn
cleans unit impulses, once a run, and the matrix that comes out is applied to all voxels: some twenty times faster than
nilearn's own loop over voxels, and equal to it within rounding.
"""

import re
import tempfile
import textwrap
import warnings
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from swiftv2.config.clean import CleanConfig
from swiftv2.data.ingest.nifti import Bold, RefusedError
from swiftv2.data.statistics import is_cleaned, voxel_statistics

BLOCK_BYTES = 32 << 20
"""Time courses (float64) that are cleaned at a time; about four times as much is in use for them."""
_LEAST_FREEDOM = 10
"""Degrees of freedom that must be left of a voxel's time course: with fewer, what is left is hardly its own."""
_MESSAGE_WIDTH = 300
_NEUTRAL = "task-rest"
"""nilearn finds tables by the image's name and puts paths into its messages; this name tells nobody's id."""


def clean_run(
    bold: Bold,
    brain: npt.NDArray[np.bool_],
    config: CleanConfig,
    tr: float,
    steady_from: int,
    confounds: Path | None,
    *,
    block_bytes: int = BLOCK_BYTES,
) -> tuple[Bold, dict[str, Any]]:
    """Clean each voxel's time course with nilearn.signal.clean: trend, Butterworth filter, then confounds (filtered alike).

    Volumes before `steady_from` take no part: they keep their values, less the mean where that is removed. Voxels that never
    change afterwards (background) keep theirs. Censored volumes are cleaned like others.

    Memory: the result as float32 beside what comes in, about four blocks, and two matrices of frames x frames.

    Args:
        bold: the run's kept voxels.
        brain: (V,) brain voxels; found before cleaning, since zeros mean nothing after it.
        config: what is to be done.
        tr: repetition time in seconds.
        steady_from: leading non-steady volumes.
        confounds: fMRIPrep's confound table, its JSON beside it; needed by a strategy.
        block_bytes: bytes of the time courses cleaned at a time; the result does not depend on it but for rounding.

    Returns:
        Float32 values (slope 1, intercept 0), and what was done: the settings, `nilearn` (version), `confounds` (number of
        columns regressed out) and `from_frame`.

    Raises:
        RefusedError: cleaned already, no or unfit confounds, a band that the repetition time cannot hold, or too few volumes.
    """
    frames = len(bold.numbers) - steady_from
    mean, std = voxel_statistics(bold.numbers[steady_from:], brain, bold.slope, bold.intercept)
    if std[brain].any() and is_cleaned(mean, std, brain):
        raise RefusedError("cleaned already (its voxels' means are about zero): give uncleaned files, or build without clean.*")
    _check_band(config, tr, frames)
    regressors: npt.NDArray[Any] | None = None
    if config.strategy != "none":
        regressors = _regressors(config.strategy, confounds, len(bold.numbers))[steady_from:]
        _check_freedom(config, tr, frames, regressors.shape[1])
    operator = _operator(config, tr, frames, regressors)
    values = np.empty(bold.numbers.shape, dtype=np.float32)
    width = max(block_bytes // (8 * len(bold.numbers)), 1)
    for first in range(0, len(brain), width):
        block = bold.numbers[:, first : first + width].astype(np.float64) * bold.slope + bold.intercept
        _clean_block(block, operator, steady_from, keep_mean=config.keep_mean)
        values[:, first : first + width] = block
    done = {
        **config.model_dump(mode="json"),
        "nilearn": version("nilearn"),
        "confounds": 0 if regressors is None else regressors.shape[1],
        "from_frame": steady_from,
    }
    return Bold(values, 1.0, 0.0, bold.nonzero), done


def _operator(
    config: CleanConfig, tr: float, frames: int, regressors: npt.NDArray[np.float64] | None
) -> npt.NDArray[np.float64]:
    """The matrix (frames, frames) that cleans time courses (frames, voxels) without mean."""
    from nilearn import signal

    filtered = config.high_pass_hz is not None or config.low_pass_hz is not None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        warnings.simplefilter("ignore", FutureWarning)
        try:
            matrix = signal.clean(
                np.eye(frames),
                detrend=config.detrend,
                standardize=None,
                confounds=regressors,
                filter="butterworth" if filtered else False,
                high_pass=config.high_pass_hz,
                low_pass=config.low_pass_hz,
                t_r=tr,
            )
        except ValueError as error:
            if "padlen" in str(error):
                raise RefusedError(f"{frames} steady frames are too few for the filter of clean.*") from error
            raise RefusedError(f"nilearn cannot clean its {frames} steady frames: {_one_line(error)}") from error
    return np.asarray(matrix, dtype=np.float64)


def _clean_block(
    block: npt.NDArray[np.float64], operator: npt.NDArray[np.float64], steady_from: int, *, keep_mean: bool
) -> None:
    """Clean time courses (frames, some voxels) in place."""
    steady = block[steady_from:]
    changing = np.ptp(steady, axis=0) > 0
    courses = steady[:, changing]
    mean = courses.mean(axis=0)
    cleaned = operator @ (courses - mean)
    # A filter leaves a rest of the mean behind at the ends: what goes and what stays is settled here.
    cleaned -= cleaned.mean(axis=0)
    steady[:, changing] = cleaned + mean if keep_mean else cleaned
    if not keep_mean:
        block[:steady_from, changing] -= mean


def _check_band(config: CleanConfig, tr: float, frames: int) -> None:
    nyquist = 0.5 / tr
    for name, limit in (("high_pass_hz", config.high_pass_hz), ("low_pass_hz", config.low_pass_hz)):
        if limit is not None and limit >= nyquist:
            raise RefusedError(
                f"clean.{name}={limit:g} is not below {nyquist:g} Hz, the highest frequency that TR {tr:g} s holds"
            )
    if config.high_pass_hz is not None and frames * tr * config.high_pass_hz < 1:
        raise RefusedError(
            f"{frames} frames are too few for clean.high_pass_hz={config.high_pass_hz:g}: {frames * tr:g} s hold no such cycle"
        )


def _check_freedom(config: CleanConfig, tr: float, frames: int, columns: int) -> None:
    """Each column takes a degree of freedom, and a band leaves those of its share of the spectrum."""
    high, low = config.high_pass_hz or 0.0, config.low_pass_hz or 0.5 / tr
    freedom = int((frames - 1 - config.detrend) * (low - high) * 2 * tr)
    if freedom - columns < _LEAST_FREEDOM:
        raise RefusedError(
            f"{frames} frames are too few for {columns} confounds: {max(freedom - columns, 0)} degrees of freedom would be left"
        )


def _regressors(strategy: str, table: Path | None, frames: int) -> npt.NDArray[np.float64]:
    """Columns (frames, N) that nilearn's load_confounds_strategy takes from a table."""
    if table is None:
        raise RefusedError(f"no confound table beside it, which clean.strategy={strategy} needs")
    described = table.with_suffix(".json")
    if strategy == "compcor" and not described.is_file():
        raise RefusedError("no JSON beside its confound table, which clean.strategy=compcor needs to tell the components")
    from nilearn.interfaces.fmriprep import load_confounds_strategy

    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        warnings.simplefilter("ignore", FutureWarning)
        for path in (table, described) if strategy == "compcor" else (table,):
            (Path(folder) / f"{_NEUTRAL}_desc-confounds_timeseries{path.suffix}").symlink_to(path.resolve())
        try:
            columns, _ = load_confounds_strategy(
                str(Path(folder) / f"{_NEUTRAL}_desc-preproc_bold.nii.gz"), denoise_strategy=strategy
            )
        except (ValueError, KeyError, OSError) as error:
            raise RefusedError(f"its confounds do not serve clean.strategy={strategy}: {_one_line(error)}") from error
    values: npt.NDArray[np.float64] = np.asarray(columns, dtype=np.float64)
    if values.ndim != 2 or len(values) != frames:
        raise RefusedError(f"the confound table has {len(values)} lines for {frames} frames")
    if not np.isfinite(values).all():
        raise RefusedError(f"the confounds of clean.strategy={strategy} have gaps or infinities")
    return values


def _one_line(error: Exception) -> str:
    """A library's message on one line, without paths, cut at a word where it is long."""
    return textwrap.shorten(re.sub(r"\S*/\S*", "...", str(error)), _MESSAGE_WIDTH, placeholder=" ...")
