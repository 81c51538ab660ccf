"""Reconstructions on the page of a run: fixed clips in three planes, how they were learned, and maps of cohorts."""

import base64
import io
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any
from xml.etree.ElementTree import Element

import numpy as np

from swiftv2.errors import SwiftError
from swiftv2.report.markup import Content, element, listed
from swiftv2.report.reconstructions import (
    Arrays,
    best_of,
    draw_courses,
    draw_learning,
    draw_mean,
    draw_planes,
    of_clip,
    read_arrays,
    read_index,
)
from swiftv2.report.run.reading import Run

DRAWN = 4
"""Clips and means that a page shows at most, and cohorts whose maps it shows."""


def pictures_section(run: Run) -> Element | None:
    """Reconstructions of a run's last evaluation; None where nothing was drawn.

    Raises:
        SwiftError: files of the run directory are damaged.
    """
    index = read_index(run.path)
    if index is None or not index["steps"]:
        return None
    last = index["steps"][-1]
    step = last["step"]
    content: list[Content] = []
    drawn, written = index["drawn"], index["maps"]
    arrays = read_arrays(run.path, step)
    for one in drawn[:DRAWN]:
        own, caption = of_clip(arrays, one["name"]), str(one["caption"])
        content += _clip(run, index["steps"], one, own) if one["kind"] == "clip" else [_mean(caption, own)]
    content += [_map(run, one) for one in written[:DRAWN]]
    more = max(len(drawn) - DRAWN, 0) + max(len(written) - DRAWN, 0)
    notes = [str(note) for note in index.get("notes", [])] + ([f"{more} more under figures/"] if more else [])
    if notes:
        content.append(listed(notes))
    if not content:
        return None
    title = element("h2", "Reconstructions")
    lead = element("p", f"Held-out data at step {step}: the same clips under the same masks at each evaluation.", kind="quiet")
    return element("section", title, lead, *content, id="pictures")


def _clip(run: Run, steps: Sequence[Mapping[str, Any]], drawn: Mapping[str, Any], clip: Arrays) -> list[Element]:
    caption = str(drawn["caption"])
    slices = _picture(
        (13.5, 6.0),
        lambda figure: draw_planes(figure, clip),
        f"{caption}: original, masked, reconstructed and error in three planes, of the volume and of its fluctuation",
        f"{caption}. Blue-grey is hidden from the model. The volume mostly shows the static image, which copying gives too; "
        "the fluctuation (less each voxel's mean over the clip) is what has to be learned: the reconstruction should show "
        "the original's reds and blues inside the green outlines of what was hidden. "
        "Error is reconstructed less original, drawn where hidden alone. "
        "L and R are the brain's left and right, P and A its back and front.",
    )
    courses = _picture(
        (8.5, 4.2),
        lambda figure: draw_courses(figure, clip),
        f"{caption}: measured, reconstructed and interpolated time courses of three voxels",
        "Three voxels of that clip, of middling to large fluctuation. Shaded frames were hidden: dots are the model, crosses "
        "interpolation between visible frames. A model that has learned lies nearer the black line than the crosses.",
    )
    learned = _learned(run, steps, drawn)
    return [slices, courses] if learned is None else [slices, courses, learned]


def _learned(run: Run, steps: Sequence[Mapping[str, Any]], drawn: Mapping[str, Any]) -> Element | None:
    """The same axial cut at the first, a middle, the best and the last evaluation."""
    entries, clips = [], []
    for place in sorted({0, len(steps) // 2, best_of(steps), len(steps) - 1}):
        found = of_clip(read_arrays(run.path, steps[place]["step"]), str(drawn["name"]))
        if found:
            entries.append(steps[place])
            clips.append(found)
    if len(clips) == 1:
        return None
    return _picture(
        (2.3 * len(clips) + 3.2, 4.8),
        lambda figure: draw_learning(figure, entries, clips),
        f"{drawn['caption']}: reconstructed at steps {', '.join(str(one['step']) for one in entries)}",
        "How it was learned: the same axial cut under the same mask from evaluation to evaluation, on one scale. Outside the "
        "green outlines voxels were visible and are as measured; inside, the fluctuation should come to resemble the measured "
        "one at the left, while the volume looks right from the beginning, since the static image can be copied.",
    )


def _mean(caption: str, mean: Arrays) -> Element:
    return _picture(
        (9.5, 6.0),
        lambda figure: draw_mean(figure, mean),
        f"{caption}: mean image measured and reconstructed, error, and size of the fluctuation, in three planes",
        f"{caption}. No single subject is shown. A reconstructed fluctuation much darker than the measured one is a model "
        "that predicts little more than each voxel's mean.",
    )


def _map(run: Run, written: Mapping[str, Any]) -> Element:
    folder = run.path / "figures" / "maps"
    cohort, baseline = str(written["cohort"]), str(written["baseline"]).replace("_", " ")

    def draw(figure: Any) -> None:
        import nibabel as nib
        from nilearn import plotting

        axes = [figure.add_axes((0.0, bottom, 1.0, 0.42)) for bottom in (0.51, 0.01)]
        titles = {"r2": "R² on the fluctuation", "gain": f"R² gained over {baseline}"}
        for axis, (kind, title) in zip(axes, titles.items(), strict=True):
            path = folder / str(written[kind])
            try:
                image: Any = nib.load(path)
                values = np.asarray(image.dataobj, dtype=np.float32)
            except Exception as error:  # nibabel, gzip and zlib raise many kinds
                raise SwiftError(f"{path}: cannot be read: the file is damaged or missing") from error
            known = values[np.isfinite(values)]
            top = float(np.quantile(np.abs(known), 0.98)) if len(known) else 1.0
            # nilearn takes NaN for 0: below the threshold it is left blank.
            options = {
                "cmap": "RdBu_r",
                "vmin": -(top or 1.0),
                "vmax": top or 1.0,
                "colorbar": True,
                "black_bg": False,
                "draw_cross": False,
                "threshold": 1e-9,
                "cbar_tick_format": "%.2f",
            }
            cuts = _cuts(image, values)
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", message="Non-finite values")
                shown = plotting.plot_stat_map(
                    image, bg_img=None, cut_coords=cuts, display_mode="ortho", figure=figure, axes=axis, **options
                )
            # nilearn marks left and right alone; its sagittal cuts look to the right.
            for side, place in (("P", 0.06), ("A", 0.94)):
                sagittal = shown.axes["x"].ax
                sagittal.text(place, 0.92, side, transform=sagittal.transAxes, fontsize=12, ha="center", va="center")
            figure.text(0.02, axis.get_position().y1 + 0.015, title, fontsize=11, fontweight="bold")

    return _picture(
        (9.0, 6.6),
        draw,
        f"{cohort}: maps of R2 on the fluctuation, and of what it gains over {baseline}, in three planes",
        f"{cohort}, {written['subjects']} held-out subjects: how much of each voxel's fluctuation is explained where it was "
        f"hidden (above, 1 is all, 0 no more than its mean), and how much more than by the better copying baseline, "
        f"{baseline} (below). Red is better. The files are figures/maps/{written['r2']} and {written['gain']}.",
        layout="none",
    )


def _cuts(image: Any, values: Any) -> list[float]:
    """World coordinates of the middle of what is known."""
    places = np.argwhere(np.isfinite(values))
    middle = np.median(places, axis=0) if len(places) else np.array(values.shape) / 2
    return [float(x) for x in image.affine[:3, :3] @ middle + image.affine[:3, 3]]


def _picture(
    size: tuple[float, float], draw: Callable[[Any], None], alt: str, caption: str, layout: Any = "constrained"
) -> Element:
    """A figure on white within the page, with its caption; WebP without loss takes half the bytes of a PNG."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from PIL import Image

    figure = Figure(figsize=size, layout=layout, facecolor="white")
    FigureCanvasAgg(figure)
    draw(figure)
    drawn, packed = io.BytesIO(), io.BytesIO()
    figure.savefig(drawn, format="png", dpi=110)
    Image.open(drawn).convert("RGB").save(packed, format="WEBP", lossless=True, quality=80, method=4)
    source = "data:image/webp;base64," + base64.b64encode(packed.getvalue()).decode("ascii")
    image = element("div", element("img", src=source, alt=alt, loading="lazy"), kind="picture")
    return element("figure", image, element("figcaption", caption), kind="wide")
