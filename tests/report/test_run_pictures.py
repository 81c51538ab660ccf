"""Reconstructions on the page: left on the left, hidden places blank, pictures small and told in words, damage named."""

import base64
import io
import json
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
import pytest
from PIL import Image

from swiftv2.data.grid import mni152_grid
from swiftv2.errors import SwiftError
from swiftv2.recipes import maps
from swiftv2.report.reconstructions import FOLDER, PLANES, draw_slice, pictures_of, read_arrays
from swiftv2.report.run.pictures import pictures_section
from swiftv2.report.run.reading import Run

EVIL = "<script>alert(1)</script>"


def run_of(path: Path) -> Run:
    return Run(path=path, name="run", settings={}, environment={}, metrics=(), events=(), evaluation=None)


def written(path: Path, steps: tuple[int, ...] = (10, 20, 30), *, mean: bool = False) -> Run:
    """A run with one clip or one mean, and a map, of noise."""
    rng = np.random.default_rng(1)
    folder = path / FOLDER
    folder.mkdir(parents=True)
    for step in steps:
        arrays: dict[str, Any] = {"cut_mm": np.array([12.0, -20.0, 8.0])}
        kinds = (
            ("measured", "reconstructed", "error", "fluctuation", "moved") if mean else ("original", "reconstructed", "mean")
        )
        arrays |= {f"{kind}_{plane}": rng.normal(900, 100, (20, 24)).astype(np.float32) for kind in kinds for plane in PLANES}
        if not mean:
            arrays |= {f"hidden_{plane}": rng.random((20, 24)) < 0.6 for plane in PLANES}
            arrays |= {f"course_{name}": rng.normal(900, 10, (3, 20)) for name in ("true", "reconstructed", "interpolated")}
            arrays |= {"course_hidden": rng.random((3, 20)) < 0.6, "course_mm": np.zeros((3, 3)), "seconds": np.arange(20.0)}
        np.savez_compressed(folder / f"step_{step:09d}.npz", **{f"one/{name}": values for name, values in arrays.items()})
    grid = mni152_grid(6.0, "RAS", "MNI152NLin2009cAsym")
    for name in ("r2", "r2_gain"):
        values = rng.normal(size=grid.size).astype(np.float32)
        maps.write_map(path / "figures" / "maps" / f"fluctuation_{name}_one.nii.gz", values, grid, np.arange(grid.size))
    drawn = {"name": "one", "kind": "mean" if mean else "clip", "cohort": EVIL, "caption": f"Clip of {EVIL}"}
    names = {"r2": "fluctuation_r2_one.nii.gz", "gain": "fluctuation_r2_gain_one.nii.gz"}
    index = {
        "steps": [{"step": step, "loss": 1.0 / step, "file": f"step_{step:09d}.npz"} for step in steps],
        "drawn": [drawn],
        "maps": [{"cohort": "one", "subjects": 7, "baseline": "visible_mean", **names}],
        "notes": ["small: nothing is drawn of 2 real held-out subjects, fewer than 5"],
    }
    (folder / "index.json").write_text(json.dumps(index))
    return run_of(path)


def test_a_run_without_pictures_has_no_section(tmp_path: Path) -> None:
    assert pictures_section(run_of(tmp_path)) is None


@pytest.mark.slow
@pytest.mark.parametrize("mean", [False, True])
def test_each_picture_is_small_whole_and_told_in_words(tmp_path: Path, mean: bool) -> None:
    section = pictures_section(written(tmp_path, mean=mean))
    assert section is not None
    figures = list(section.iter("figure"))
    assert len(figures) == (2 if mean else 4), "a mean, or slices, courses and how they were learned; and a map"
    size = 0
    for figure in figures:
        image, caption = figure.find(".//img"), figure.find("figcaption")
        assert image is not None
        assert caption is not None
        assert len(image.get("alt") or "") > 30
        assert len("".join(caption.itertext())) > 100
        head, _, packed = str(image.get("src")).partition(",")
        assert head == "data:image/webp;base64"
        size += len(packed)
        pixels = np.asarray(Image.open(io.BytesIO(base64.b64decode(packed))).convert("RGB"))
        assert tuple(pixels[0, 0]) == (255, 255, 255)
        assert pixels.std() > 10
    assert size < 700_000
    assert "fewer than 5" in "".join(section.itertext())


def test_slices_show_left_at_the_left_and_errors_where_hidden_alone() -> None:
    rng = np.random.default_rng(2)
    clip = {f"{name}_axial": rng.normal(size=(6, 9)) for name in ("original", "mean", "reconstructed")}
    clip["hidden_axial"] = np.zeros((6, 9), dtype=bool)
    clip["hidden_axial"][0] = True
    shown = pictures_of(clip, "axial")
    assert np.isinf(shown["volume masked"][0]).all()
    assert np.isnan(shown["volume error"][1:]).all()
    expected = clip["reconstructed_axial"][0] - clip["original_axial"][0]
    np.testing.assert_allclose(shown["fluctuation error"][0], expected)
    np.testing.assert_array_equal(shown["volume reconstructed"][1:], clip["original_axial"][1:])

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    figure, axis = plt.subplots()
    image = draw_slice(axis, shown["volume masked"], (-1.0, 1.0, "gray"), "axial")
    left, right = (text for text in axis.texts)
    assert (left.get_text(), right.get_text()) == ("L", "R")
    assert left.get_position()[0] < right.get_position()[0]
    # Columns of the picture are places from left to right: the first is hidden, and nothing but it.
    assert np.ma.getmaskarray(image.get_array())[:, 0].all()
    assert not np.ma.getmaskarray(image.get_array())[:, 1:].any()
    plt.close(figure)


def test_damage_is_named_and_nothing_is_unpickled(tmp_path: Path) -> None:
    run = written(tmp_path)
    path = tmp_path / FOLDER / "step_000000030.npz"
    np.savez(path, **{"one/original_axial": np.array([{"a": 1}], dtype=object)})  # type: ignore[arg-type]
    with pytest.raises(SwiftError, match=r"step_000000030\.npz: cannot be read as arrays"):
        read_arrays(tmp_path, 30)
    path.write_bytes(b"PK\x03\x04 torn")
    with pytest.raises(SwiftError, match="damaged"):
        pictures_section(run)
    (tmp_path / FOLDER / "index.json").write_text('{"steps": 3}')
    with pytest.raises(SwiftError, match=r"index\.json.*damaged"):
        pictures_section(run)
