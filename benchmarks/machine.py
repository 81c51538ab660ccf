"""What benchmarks ask of the machine: what it is, processor time, memory, the page cache, system calls."""

import argparse
import ctypes
import datetime as dt
import importlib.util
import mmap
import os
import platform
import re
import resource
import shutil
import subprocess
import sys
import tempfile
import textwrap
from collections.abc import Iterable, Sequence
from importlib.metadata import version
from pathlib import Path

import numpy as np

from swiftv2.errors import SwiftError

ROOT = Path(__file__).resolve().parents[1]
OPENS = ("open", "openat", "openat2", "creat")
METADATA = ("stat", "lstat", "fstat", "newfstatat", "statx", "getdents", "getdents64", "access", "faccessat2")
SEEKS = ("lseek",)
BEGIN, END = "benchmark-begins-here", "benchmark-ends-here"
"""Files that do not exist: trying to open them marks a place in the list of system calls."""


def page(title: str, packages: Sequence[str], body: Iterable[str]) -> str:
    """A result page in markdown: date, hardware, commit, versions, command, then the body's lines."""
    today = dt.datetime.now(dt.UTC).date().isoformat()
    here = [name for name in packages if importlib.util.find_spec(name)]
    versions = ", ".join(f"{name} {version(name)}" for name in here)
    lines = [f"# {title}, {today}", "", f"Hardware: {hardware()}. Commit {commit()}.", ""]
    lines += [f"Python {platform.python_version()}, {versions}.", "", "```", command(), "```", "", *body]
    return re.sub(r"\n{3,}", "\n\n", "\n".join(lines)) + "\n"


def prose(text: str) -> list[str]:
    """Lines of a paragraph."""
    return ["", *textwrap.wrap(text, 124), ""]


def table(heads: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    """Lines of a markdown table."""
    return [f"| {' | '.join(line)} |" for line in (heads, ["---"] * len(heads), *rows)]


def write_page(text: str, out: Path | None) -> None:
    """Print a page, or write it to a file."""
    if out is None:
        sys.stdout.write(text)
    else:
        out.write_text(text, encoding="utf-8")


def hardware() -> str:
    """Cores, memory and how busy the machine is, in one phrase."""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    model = [line.split(":")[1].strip() for line in _lines(Path("/proc/cpuinfo")) if line.startswith("model name")]
    cores = f"{os.cpu_count()} cores ({model[0] if model else platform.machine()})"
    return f"{cores}, {memory:.0f} GiB, local virtual disk, no GPU, load when this ended {os.getloadavg()[0]:.1f}"


def commit() -> str:
    """The commit of the checkout, and whether tracked files were changed since."""
    git = shutil.which("git")
    if git is None:
        return "unknown"
    here = [git, "-C", str(ROOT)]
    found = subprocess.run([*here, "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False).stdout.strip()
    changed = subprocess.run([*here, "status", "--porcelain", "-uno", "swiftv2"], capture_output=True, check=False).stdout
    return f"{found}{' with uncommitted changes' if changed.strip() else ''}"


def command() -> str:
    """The command line; places that belong to one machine are replaced by a word, those of the checkout are relative to it."""
    words = [str(Path(sys.argv[0]).resolve()), *sys.argv[1:]]
    shown = ["python"]
    for word, before in zip(words, ["", *words], strict=False):
        path = Path(word)
        if path.is_relative_to(ROOT):
            shown.append(str(path.relative_to(ROOT)))
        elif path.is_absolute():
            shown.append("FOLDER" if before == "--folder" else "FILE")
        else:
            shown.append(word)
    return " ".join(shown)


def _lines(path: Path) -> list[str]:
    return path.read_text(encoding="utf-8").splitlines() if path.is_file() else []


def cpu_seconds() -> float:
    """Processor time of this process with all its threads, in user and system mode."""
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime + used.ru_stime


def memory(field: str) -> int:
    """Bytes of `VmRSS` (now) or `VmHWM` (at most so far) of this process."""
    for line in _lines(Path("/proc/self/status")):
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) * 1024
    raise SwiftError(f"/proc/self/status names no {field}: this benchmark needs Linux")


def disk_bytes() -> int:
    """Bytes that this process has made the disk deliver so far (what the page cache held is not among them)."""
    return next(int(line.split()[1]) for line in _lines(Path("/proc/self/io")) if line.startswith("read_bytes"))


def drop(paths: Iterable[Path]) -> None:
    """Take files out of the page cache."""
    for path in paths:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(descriptor)


def fill(paths: Iterable[Path]) -> None:
    """Bring files into the page cache."""
    for path in paths:
        with path.open("rb") as file:
            while file.read(1 << 24):
                pass


def resident(paths: Iterable[Path]) -> float:
    """Share of the pages of files that are in the page cache, as mincore tells."""
    libc = ctypes.CDLL(None, use_errno=True)
    pages, found = 0, 0
    for path in paths:
        size = path.stat().st_size
        if not size:
            continue
        with path.open("rb") as file, mmap.mmap(file.fileno(), size, access=mmap.ACCESS_READ) as mapped:
            view = np.frombuffer(mapped, dtype=np.uint8)
            flags = np.zeros(-(-size // mmap.PAGESIZE), dtype=np.uint8)
            status = libc.mincore(ctypes.c_void_p(view.ctypes.data), ctypes.c_size_t(size), ctypes.c_void_p(flags.ctypes.data))
            del view
        if status:
            raise SwiftError(f"mincore failed for {path.name}: {os.strerror(ctypes.get_errno())}")
        pages, found = pages + len(flags), found + int((flags & 1).sum())
    return found / max(pages, 1)


def mark(name: str) -> None:
    """Leave a mark in the list of system calls."""
    try:
        os.close(os.open(name, os.O_RDONLY))
    except FileNotFoundError:
        return


def count_calls(program: Sequence[str]) -> tuple[int, int, int]:
    """Run a program under strace; how often it opened files, asked for metadata and moved in a file between its two marks.

    Raises:
        SwiftError: strace is missing, or the program failed.
    """
    strace = shutil.which("strace")
    if strace is None:
        raise SwiftError("strace is not installed: install it, or leave the counting out with --no-strace")
    with tempfile.TemporaryDirectory() as folder:
        log = Path(folder) / "calls"
        traced = [strace, "-f", "-o", str(log), "-e", f"trace={','.join(f'?{name}' for name in (*OPENS, *METADATA, *SEEKS))}"]
        done = subprocess.run([*traced, *program], capture_output=True, text=True, check=False, env=environment())
        if done.returncode:
            raise SwiftError(f"the traced program failed: {done.stderr.strip().splitlines()[-1:]}")
        lines = log.read_text(encoding="utf-8", errors="replace").splitlines()
    first, last = (next(i for i, line in enumerate(lines) if name in line) for name in (BEGIN, END))
    # A call that another thread interrupts is listed twice; its second line names it as "<... name resumed>".
    names = [
        line.split(maxsplit=1)[1].split("(")[0] for line in lines[first + 1 : last] if "(" in line and "resumed>" not in line
    ]
    opens, metadata, seeks = (sum(name in kind for name in names) for kind in (OPENS, METADATA, SEEKS))
    return opens, metadata, seeks


def child(script: str, *words: str) -> list[str]:
    """Command line of a benchmark's own script in a process of its own."""
    return [sys.executable, str(ROOT / "benchmarks" / script), *words]


def environment() -> dict[str, str]:
    """Environment of child processes: package and benchmarks are found as here."""
    paths = [str(ROOT), str(ROOT / "benchmarks"), *filter(None, [os.environ.get("PYTHONPATH")])]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(paths)}


def run_children(words: Sequence[str]) -> None:
    """Run a command that starts processes of a benchmark.

    Raises:
        SwiftError: it failed.
    """
    done = subprocess.run(list(words), capture_output=True, text=True, check=False, env=environment())
    if done.returncode:
        raise SwiftError(f"a benchmark's child process failed: {' '.join(done.stderr.strip().splitlines()[-2:])}")


def parser(description: str | None) -> argparse.ArgumentParser:
    """A parser with what all benchmarks take."""
    made = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--folder", type=Path, required=True, help="folder in which generated data are kept between benchmarks")
    made.add_argument("--out", type=Path, help="file to be written instead of the screen")
    return made
