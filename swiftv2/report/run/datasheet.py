"""What a run was trained on: cohorts, hours, spaces, motion, and what was refused."""

from collections.abc import Mapping
from typing import Any
from xml.etree.ElementTree import Element

from swiftv2.report.markup import Cell, Content, Number, element, tabled
from swiftv2.report.run.reading import Run
from swiftv2.report.run.words import counted, facts, listing, section

FILE = "datasheet.json"
_TITLES = (
    "cohort",
    "runs",
    "subjects train",
    "val",
    "test",
    "clips train",
    "held out",
    "hours",
    "TR (s)",
    "space",
    "orientation of files",
    "displacement (mm)",
    "temporal SNR",
)


def datasheet_section(run: Run) -> Element | None:
    """The data sheet that the run wrote when it began; None for runs without one."""
    sheet = run.document(FILE)
    if sheet is None:
        return None
    cohorts: Mapping[str, Any] = sheet["cohorts"]
    runs, hours = (sum(cohort[key] for cohort in cohorts.values()) for key in ("runs", "hours"))
    subjects = sum(sum(cohort["subjects"].values()) for cohort in cohorts.values())
    grid = sheet["grid"]
    says = (
        f"{counted(runs, 'run')} of {counted(subjects, 'subject')} in {counted(len(cohorts), 'cohort')}, "
        f"{hours:,.1f} hours of BOLD, {'generated' if sheet['generated'] else 'measured'}."
    )
    clip = sheet["clip"]
    length = f"{clip['seconds']:g} s" if clip.get("seconds") else f"{clip.get('frames')} frames"
    voxel = " \u00d7 ".join(f"{size:g}" for size in grid["voxel_mm"])
    shape = " \u00d7 ".join(map(str, grid["shape"]))
    told: list[tuple[str, Content]] = [
        ("store", f"{sheet['store']}, version {sheet['version']}"),
        ("grid", f"{shape} voxels of {voxel} mm, {grid['orientation']}"),
        ("space", str(grid["space"])),
        ("voxels kept", f"{sheet['voxels']:,}"),
        ("clips", length),
        ("runs in the store", f"{sheet['runs_in_store']:,}"),
    ]
    table = tabled(_TITLES, [_row(name, cohort) for name, cohort in cohorts.items()], label="cohorts", sortable=True)
    return section("datasheet", "Data sheet", element("p", says, kind="says"), facts(told), table, *_notes(sheet))


def _row(name: str, cohort: Mapping[str, Any]) -> list[Cell]:
    subjects, clips = cohort["subjects"], cohort["clips"]
    heldout = sum(count for part, count in clips.items() if part != "train")
    motion, snr = cohort["framewise_displacement_mm"], cohort["temporal_snr"]
    numbers = [cohort["runs"], *(subjects.get(part, 0) for part in ("train", "val", "test")), clips.get("train", 0), heldout]
    return [
        name,
        *(Number(value, f"{value:,}") for value in numbers),
        Number(cohort["hours"], f"{cohort['hours']:,.1f}"),
        _kinds(cohort["tr"]),
        _kinds(cohort["spaces"]),
        _kinds(cohort["orientations"]),
        Number(motion["median"], f"{motion['median']:.3f} ({motion['percentile_90']:.3f})") if motion else "not known",
        Number(snr["median"], f"{snr['median']:.0f}") if snr else "not known",
    ]


def _kinds(counts: Mapping[str, int]) -> str:
    return ", ".join(counts) if len(counts) < 2 else ", ".join(f"{kind} ({count:,})" for kind, count in counts.items())


def _notes(sheet: Mapping[str, Any]) -> list[Element]:
    looked = [cohort for cohort in sheet["cohorts"].values() if cohort["looked_at"] < cohort["runs"]]
    notes = ["Displacement is the mean of a run, here the median over runs (and the 90th percentile)."]
    notes += ["Displacement and SNR are of some runs of each cohort, spread evenly over it."] if looked else []
    unreadable = sum(cohort.get("unreadable", 0) for cohort in sheet["cohorts"].values())
    notes += (
        [f"{counted(unreadable, 'run')} of those looked at could not be read: `swiftv2 store verify` tells more."]
        if unreadable
        else []
    )
    changed = {
        "resampled onto the grid": sum(cohort["resampled"] for cohort in sheet["cohorts"].values()),
        "cleaned before": sum(cohort["cleaned"] for cohort in sheet["cohorts"].values()),
        "withdrawn since": sheet["withdrawn"],
        "too short for a clip": sheet["too_short"],
    }
    told = [f"{number:,} {what}" for what, number in changed.items() if number]
    notes += [f"Of the runs, {listing(told)}."] if told else []
    made = [element("p", " ".join(notes), kind="quiet")]
    refused = sheet["refused"]
    if refused is None:
        return [*made, element("p", "What the store refused cannot be told: its report is not readable here.", kind="quiet")]
    if not refused:
        return [*made, element("p", "The builds of the store refused no file.", kind="quiet")]
    rows: list[list[Cell]] = [[reason, Number(number, f"{number:,}")] for reason, number in refused.items()]
    title = element("h3", f"{counted(sum(refused.values()), 'file')} refused by the builds of the store")
    return [*made, title, tabled(("reason", "files"), rows, label="refused files", sortable=True)]
