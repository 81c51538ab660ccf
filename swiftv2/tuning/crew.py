"""Several workers on this machine, each a process, in the place of a Slurm array."""

import os
import signal
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from types import FrameType

from swiftv2.errors import InterruptedRunError, UsageError

STOPPED_EARLY = InterruptedRunError.exit_status


def run_crew(study: Sequence[str], workers: int, ranks: int, name: str, tell: Callable[[str], None]) -> int:
    """Start workers, hand signals on to them, and wait.

    Args:
        study: words of `swiftv2 tune run`: the study's file and what changes it.
        workers: how many.
        ranks: processes of a trial; each worker has as many of the devices in CUDA_VISIBLE_DEVICES, where that names some.
        name: of the workers, before their numbers: with the same name they take up their own trials again.
        tell: told in one line how a worker ended.

    Returns:
        0 where all came to the end, 75 where one was told to stop, else 1.

    Raises:
        UsageError: there are fewer devices than workers need.
    """
    shares = _devices(os.environ, workers, ranks)
    processes: list[subprocess.Popen[bytes]] = []

    def hand_on(number: int, frame: FrameType | None) -> None:
        del number, frame
        for process in processes:
            process.send_signal(signal.SIGTERM)

    heard = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)
    former = [signal.signal(number, hand_on) for number in heard]
    try:
        for index in range(workers):
            words = [sys.executable, "-m", "swiftv2", "tune", "run", *study, "--worker", f"{name}-{index}"]
            environment = dict(os.environ) | ({} if shares is None else {"CUDA_VISIBLE_DEVICES": shares[index]})
            processes.append(subprocess.Popen(words, env=environment, process_group=0))  # noqa: S603 (our own words)
        statuses = [process.wait() for process in processes]
    finally:
        for number, handler in zip(heard, former, strict=True):
            signal.signal(number, handler)
    for index, status in enumerate(statuses):
        if status not in {0, STOPPED_EARLY}:
            tell(f"worker {name}-{index} ended with status {status}")
    return STOPPED_EARLY if STOPPED_EARLY in statuses else int(any(statuses))


def _devices(environment: Mapping[str, str], workers: int, ranks: int) -> list[str] | None:
    """The devices of each worker, None where none are named."""
    named = [one for one in environment.get("CUDA_VISIBLE_DEVICES", "").split(",") if one]
    if not named:
        return None
    if len(named) < workers * ranks:
        raise UsageError(
            f"--workers {workers} with ranks={ranks} takes {workers * ranks} devices, CUDA_VISIBLE_DEVICES names {len(named)}"
        )
    return [",".join(named[index * ranks : (index + 1) * ranks]) for index in range(workers)]
