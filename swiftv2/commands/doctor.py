"""The command that looks at ranks, devices, disk and store before a run takes its first step."""

import argparse
import contextlib
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from swiftv2.config.load import load
from swiftv2.config.pretrain import PretrainConfig
from swiftv2.terminal import add_command, add_json, answer, own_output, table, warn

if TYPE_CHECKING:
    from swiftv2.recipes.doctor import Report

OVERRIDES = "words that change single settings of the file, such as train.micro_batch=2; an unknown key is refused"
SICK = 1


def add(nouns: Any) -> None:
    """The command `doctor`."""
    text = (
        "look at all that a pretraining run needs, before it begins. Start it as the run will be started: alone, by torchrun, "
        "mpirun or srun. Versions, devices, memory, disk, store, clocks and links of every rank are looked at, and one step of "
        "the largest size is taken; nothing is left behind. Status 1: something is sick; the line names rank and host "
        "(docs/doctor.md)."
    )
    examples = (
        "swiftv2 doctor configs/pretrain/demo.yaml",
        "torchrun --standalone --nproc-per-node 8 -m swiftv2 doctor configs/pretrain/806M.yaml data.store=cohort.zarr",
        "srun swiftv2 doctor configs/pretrain/806M.yaml data.store=cohort.zarr --json",
    )
    parser = add_command(nouns, "doctor", _doctor, text, examples)
    add_json(parser)
    parser.add_argument("--quick", action="store_true", help="leave out the bandwidth and the dry run of a step")
    parser.add_argument("config", type=Path, help="the YAML file of the run, such as configs/pretrain/806M.yaml")
    parser.add_argument("overrides", nargs="*", metavar="SECTION.KEY=VALUE", help=OVERRIDES)


def _doctor(arguments: argparse.Namespace) -> int:
    config = load(PretrainConfig, arguments.config, arguments.overrides)
    from swiftv2.recipes.doctor import examine

    # Libraries print what they like, those in C too (NCCL): standard output belongs to the answer.
    with own_output() as output:

        def show(report: "Report") -> None:
            with contextlib.redirect_stdout(output):
                _tell(report, arguments.json)

        outcome = examine(config, lambda name: warn(f"doctor: {name} ..."), show, quick=arguments.quick)
    status = 0 if outcome.ok else SICK
    if outcome.stuck:
        # A thread still hangs, in a file system or a collective, and would keep the interpreter from ending.
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
    return status


def _tell(report: "Report", as_json: bool) -> None:
    rows = [[check.name, check.verdict, check.what] for check in report.checks]
    if report.sick_hosts:
        last = f"SICK; leave out {', '.join(report.sick_hosts)}"
    elif not report.ok:
        last = "SICK, and it is no matter of a single host"
    else:
        warnings = sum(check.verdict == "warning" for check in report.checks)
        last = f"well{f', with {warnings} warning' + 's' * (warnings > 1) if warnings else ''}"
    answer(report.to_dict(), table(["check", "verdict", "what"], rows, words=3), f"\n{last}", as_json=as_json)
