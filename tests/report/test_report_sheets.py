"""The drawing of quality sheets, from arrays alone."""

import io
from collections.abc import Iterator

import numpy as np

from swiftv2.report.sheets import PLANES, CohortSheet, RunSheet, Slices, draw

FRAMES, BINS = 30, 10


def slices() -> Slices:
    picture = np.linspace(0, 1, 20 * 30).reshape(20, 30)
    picture[:3] = np.nan
    return Slices(dict.fromkeys(PLANES, picture), dict.fromkeys(PLANES, 4.0))


def run_sheet(*, confounds: bool = True, cleaned: bool = False) -> RunSheet:
    displacement = np.full(FRAMES, 0.1)
    displacement[[0, 7]] = np.nan, 0.9
    return RunSheet(
        title="r0123456789abcdef",
        facts=(("frames", "30 of 2 s"), ("note", "words " * 30)),
        mean=slices(),
        tsnr=None if cleaned else slices(),
        displacement=displacement if confounds else None,
        censored=displacement > 0.5 if confounds else None,
        global_signal=np.sin(np.arange(FRAMES)),
        histogram=np.arange(BINS),
        edges=np.linspace(0, 1, BINS + 1),
        seconds=np.arange(FRAMES) * 2.0,
    )


def cohort_sheet(*, maps: bool = True, outliers: int = 2) -> CohortSheet:
    measures = {"tsnr": np.arange(9.0), "motion": np.full(9, np.nan), "one": np.array([3.0])}
    names = tuple(f"r{number:016x} tsnr z +5.0" for number in range(outliers))
    shown = slices() if maps else None
    return CohortSheet("demo", (("runs", "9"),), shown, shown, "" if maps else "too few subjects", measures, names)


def test_a_cohort_takes_two_pages_and_a_run_one() -> None:
    stream = io.BytesIO()
    sheets: list[CohortSheet | RunSheet] = [
        cohort_sheet(),
        cohort_sheet(maps=False, outliers=90),
        run_sheet(),
        run_sheet(confounds=False, cleaned=True),
    ]
    assert draw(stream, iter(sheets)) == 6
    data = stream.getvalue()
    assert data.startswith(b"%PDF")
    assert data.count(b"/Type /Page ") == 6
    assert data.count(b"/Subtype /Image") >= 6


def test_the_same_sheets_give_the_same_bytes() -> None:
    first, second = io.BytesIO(), io.BytesIO()
    for stream in (first, second):
        draw(stream, [cohort_sheet(), run_sheet()])
    assert first.getvalue() == second.getvalue()


def test_nothing_is_held_of_the_sheets_behind() -> None:
    """Sheets come from a generator: the next one is made when the former is drawn."""
    drawn: list[int] = []
    stream = io.BytesIO()

    def sheets() -> Iterator[CohortSheet | RunSheet]:
        for number in range(3):
            drawn.append(len(stream.getvalue()))
            yield cohort_sheet(maps=False) if number % 2 else run_sheet()

    draw(stream, sheets())
    assert drawn[0] < drawn[1] < drawn[2]
