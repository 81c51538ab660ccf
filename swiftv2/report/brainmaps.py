"""Maps of the brain, drawn by nilearn, left and right marked; curves of embeddings."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from swiftv2.errors import SwiftError


def draw_map(nifti: Path, out: Path, title: str) -> Path:
    """Draw a map in MNI space on a glass brain and on slices, one PNG.

    Args:
        nifti: three-dimensional, in a template space.
        out: the picture.
        title: above it.

    Raises:
        SwiftError: the map is 0 everywhere.
    """
    import matplotlib as mpl

    mpl.use("Agg")
    import nibabel as nib
    import numpy as np
    from matplotlib import pyplot as plt
    from nilearn import plotting

    image = nib.load(nifti)
    values = np.asarray(image.get_fdata())  # type: ignore[attr-defined]
    top = float(np.percentile(np.abs(values[values != 0]), 99)) if values.any() else 0.0
    if top == 0.0:
        raise SwiftError(f"{nifti}: is 0 everywhere: there is nothing to draw")
    figure, axes = plt.subplots(2, 1, figsize=(10, 5), layout="none")
    figure.suptitle(title)
    shared: dict[str, Any] = {"cmap": "RdBu_r", "vmax": top, "annotate": True, "cbar_tick_format": "%.0e"}
    glass: dict[str, Any] = {"display_mode": "lyrz", "plot_abs": False, "colorbar": True}
    slices: dict[str, Any] = {
        "display_mode": "z",
        "cut_coords": 6,
        "threshold": 0.2 * top,
        "black_bg": False,
        "colorbar": False,
    }
    plotting.plot_glass_brain(image, figure=figure, axes=axes[0], **glass, **shared)
    plotting.plot_stat_map(image, figure=figure, axes=axes[1], **slices, **shared)
    out.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(out, dpi=120)
    plt.close(figure)
    return out


def draw_dynamics(found: Mapping[str, Mapping[str, Any]], out: Path) -> Path:
    """Draw autocorrelation over lag for each stage, slope and effective rank in the legend.

    Args:
        found: what `downstream.dynamics.describe` says, by stage.
        out: the picture.
    """
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    figure, axis = plt.subplots(figsize=(6, 3.6), layout="constrained")
    for name, one in found.items():
        lags: Sequence[float] = one["lag_seconds"]
        label = f"{name}: slope {one['power_slope']['mean']:.2f}, rank {one['effective_rank']:.1f} of {one['dimensions']}"
        axis.plot(lags, one["autocorrelation"], marker="o", markersize=3, label=label)
    axis.axhline(0, color="0.6", linewidth=0.8)
    axis.set(xlabel="lag (s)", ylabel="autocorrelation of clip embeddings")
    axis.legend(fontsize=8, frameon=False)
    out.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(out, dpi=120)
    plt.close(figure)
    return out
