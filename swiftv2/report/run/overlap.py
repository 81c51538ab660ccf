"""Whether what is held out was held out: subjects, families and files in two parts, and subjects seen in pretraining."""

from collections.abc import Mapping
from typing import Any, NamedTuple
from xml.etree.ElementTree import Element

from swiftv2.report.markup import element, tabled
from swiftv2.report.run.datasheet import FILE
from swiftv2.report.run.reading import Run
from swiftv2.report.run.words import counted, section


class Check(NamedTuple):
    """One check."""

    what: str
    sign: str
    says: str

    @property
    def failed(self) -> bool:
        """Whether it found a leak."""
        return self.sign == _FAILED

    @property
    def unknown(self) -> bool:
        """Whether it could not be made."""
        return self.sign == _UNKNOWN


SEEN = "subjects that the weights were trained on"
_PASSED, _FAILED, _UNKNOWN = "\u2713 passed", "\u2715 failed", "? not known"


def checks_of(run: Run) -> list[Check]:
    """Of the data sheet and of the result; empty for runs that wrote neither.

    Raises:
        SwiftError: a file is damaged.
    """
    return [*_parts(run.document(FILE)), *_pretraining(run)]


def overlap_section(run: Run) -> Element | None:
    """The checks as a table; None for runs that wrote neither a data sheet nor a result."""
    checks = checks_of(run)
    if not checks:
        return None
    failed, unknown = sum(check.failed for check in checks), sum(check.unknown for check in checks)
    says = f"{counted(failed, 'check')} failed: held-out scores are not to be believed." if failed else "No leak was found."
    says += f" {counted(unknown, 'check')} could not be made." if unknown else ""
    table = tabled(("check", "", "what was found"), [list(check) for check in checks], label="overlap and leakage checks")
    return section("overlap", "Overlap and leakage", element("p", says, kind="says"), table)


def _parts(sheet: Mapping[str, Any] | None) -> list[Check]:
    if sheet is None:
        return []
    found, by_run = sheet["leakage"], sheet.get("unit") == "run"
    subjects = found["subjects"]
    if by_run:
        one = Check("subjects in two parts", _PASSED, f"{counted(subjects, 'subject')}, as asked: the split divides runs")
    else:
        one = Check("subjects in two parts", _FAILED if subjects else _PASSED, counted(subjects, "subject"))
    known = found["families_known"]
    if found["families"] is None:
        two = Check("families in two parts", _UNKNOWN, "no label table of the store names families")
    else:
        told = f"{counted(found['families'], 'family', 'families')}; of {counted(known, 'subject')} the family is known"
        failed = found["families"] and not by_run
        two = Check("families in two parts", _FAILED if failed else _PASSED, told)
    files = found["files"]
    three = Check("files of equal content in two parts", _FAILED if files else _PASSED, counted(files, "file"))
    return [one, two, three]


def _pretraining(run: Run) -> list[Check]:
    result = run.document("result.json")
    if result is None or "overlap" not in result:
        return []
    what, found = SEEN, result["overlap"]
    if found is None:
        return [Check(what, _PASSED, "the encoder was not pretrained")]
    if not found["known"]:
        return [Check(what, _UNKNOWN, f"{found['why']}; this was declared by encoder.overlap")]
    told = f"{found['counted']:,} of {found['asked']:,}"
    if found["counted"]:
        told += ", declared by encoder.overlap: test scores flatter"
    return [Check(what, _FAILED if found["counted"] else _PASSED, told)]
