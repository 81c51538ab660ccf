"""What the command line shows: help, one-line errors of use, answers as JSON or tables, and how far a command is."""

import argparse
import contextlib
import json
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from datetime import datetime, timedelta
from types import TracebackType
from typing import TYPE_CHECKING, Any, NoReturn, Self, TextIO

from swiftv2.errors import UsageError

if TYPE_CHECKING:  # rich is imported where something is shown: --help does without.
    from rich.progress import Progress
    from rich.table import Table

LINE_SECONDS = 5.0
LOG_WIDTH = 160
"""Columns of a table that does not go to a terminal."""


class Help(argparse.HelpFormatter):
    """Wraps sentences, but leaves lines that begin with two blanks as they are: they are there to be copied."""

    def _fill_text(self, text: str, width: int, indent: str) -> str:
        paragraphs: list[str] = []
        for line in text.splitlines():
            goes_on = paragraphs and not line.startswith("  ") and not paragraphs[-1].startswith("  ")
            paragraphs[-1:] = [f"{paragraphs[-1]} {line}"] if goes_on else [*paragraphs[-1:], line]
        return "\n".join(p if p.startswith("  ") else super(Help, self)._fill_text(p, width, indent) for p in paragraphs)


class Parser(argparse.ArgumentParser):
    """A parser whose complaints are one line like all others, and that takes no abbreviated options."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options, formatter_class=Help, allow_abbrev=False)

    def error(self, message: str) -> NoReturn:
        """Complain.

        Raises:
            UsageError: always.
        """
        raise UsageError(f"{message} (`{self.prog} --help` explains)")


def add_command(
    parent: Any, name: str, command: Callable[[argparse.Namespace], int], text: str, examples: Sequence[str]
) -> Parser:
    """A command with its help.

    Args:
        parent: what `add_subparsers` gave.
        name: the word that calls it.
        command: takes the parsed words, gives the exit status.
        text: what it does; the first sentence stands in the parent's help.
        examples: lines that can be copied.
    """
    shown = f"{text[0].upper()}{text[1:]}"
    epilog = "\n".join(["Examples:" if len(examples) > 1 else "Example:", *(f"  {line}" for line in examples)])
    parser: Parser = parent.add_parser(name, help=text.partition(".")[0], description=shown, epilog=epilog)
    parser.set_defaults(command=command)
    return parser


def add_json(parser: Parser) -> None:
    """Add the option that `answer` looks at."""
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of text")


@contextlib.contextmanager
def own_output() -> Iterator[TextIO]:
    """Standard output for what is written to the given stream alone; all else that is printed goes to standard error."""
    with contextlib.ExitStack() as stack:
        stream = sys.stdout
        with contextlib.suppress(OSError, ValueError):  # A stream of Python's alone, as tests put there, has no descriptor.
            number = sys.stdout.fileno()
            sys.stdout.flush()
            stream = stack.enter_context(os.fdopen(os.dup(number), "w", encoding=sys.stdout.encoding))
            stack.callback(os.dup2, stream.fileno(), number)
            os.dup2(sys.stderr.fileno(), number)
        stack.enter_context(contextlib.redirect_stdout(sys.stderr))
        yield stream
        stream.flush()


def say(text: str) -> None:
    """Print on standard output.

    Raises:
        OSError: it cannot be written, but for a reader that went away, as `head` does: that is no failure.
    """
    try:
        print(text, flush=True)  # noqa: T201 (what a command answers)
    except OSError as error:
        # Else the interpreter would try the rest once more at its end, and complain.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        if not isinstance(error, BrokenPipeError):
            raise OSError(error.errno, error.strerror, "standard output") from error


def warn(text: str) -> None:
    """Say on standard error, in one line, what does no harm to the answer but must not be overlooked."""
    print(f"swiftv2: {' '.join(text.splitlines())}", file=sys.stderr, flush=True)  # noqa: T201 (where a person reads)


def answer(values: dict[str, Any], *parts: "str | Table", as_json: bool) -> None:
    """Print values as one JSON object, or lines and tables that say the same."""
    if as_json:
        say(json.dumps(values))
        return
    from rich.console import Console

    console = Console() if sys.stdout.isatty() else Console(width=LOG_WIDTH)
    with console.capture() as capture:
        for part in parts:
            console.print(part, markup=False, highlight=False, soft_wrap=isinstance(part, str))
    say("\n".join(line.rstrip() for line in capture.get().rstrip().splitlines()))


def table(titles: Sequence[str], rows: Sequence[Sequence[str]], words: int = 1) -> "Table":
    """A table whose first `words` columns hold words and whose others hold numbers."""
    from rich import box
    from rich.table import Table
    from rich.text import Text

    made = Table(box=box.SIMPLE_HEAD, show_edge=False)
    for index, title in enumerate(titles):
        made.add_column(title, justify="left" if index < words else "right")
    for row in rows:
        made.add_row(*(Text(cell) for cell in row))
    return made


class Shown:
    """How far a command is: one moving line on a terminal, elsewhere a line every few seconds; on standard error.

    A command that is done in a few seconds shows nothing but its answer.
    """

    def __init__(self, unit: str, *, shown: bool = True) -> None:
        self._unit = unit
        self._shown = shown
        self._bar: Progress | None = None
        self._first: float | None = None
        self._last_line, self._lines, self._ended = time.monotonic(), 0, False
        self._bytes_before = 0

    def __enter__(self) -> Self:
        if self._shown and sys.stderr.isatty():
            from rich.console import Console
            from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

            columns = (TextColumn(self._unit), MofNCompleteColumn(), BarColumn(bar_width=24), TextColumn("{task.description}"))
            self._bar = Progress(*columns, console=Console(stderr=True))
            self._task = self._bar.add_task("", total=None)
            self._bar.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self._bar is not None:
            self._bar.stop()

    def update(self, done: int, total: int, size: int = 0, size_total: int = 0, note: str = "") -> None:
        """Show a state.

        Args:
            done: items done.
            total: items in all.
            size: bytes done; 0 where they are not known.
            size_total: bytes in all.
            note: what else is to be said.
        """
        if not self._shown:
            return
        now = time.monotonic()
        if self._first is None:
            # The first state holds what a former start has done: speed is measured from there.
            self._first, self._bytes_before = now, size
        parts = [note] if note else []
        speed = (size - self._bytes_before) / max(now - self._first, 1e-9)
        if speed and done < total:
            left = timedelta(seconds=round((size_total - size) / speed))
            parts = [f"{speed / 1e6:.1f} MB/s", *parts, f"left {left}"]
        text = "  ".join(parts)
        if self._bar is not None:
            self._bar.update(self._task, completed=done, total=total, description=text)
        elif now - self._last_line >= LINE_SECONDS or (done == total and self._lines > 0 and not self._ended):
            self._last_line, self._lines, self._ended = now, self._lines + 1, done == total
            stamp = f"{datetime.now().astimezone():%Y-%m-%d %H:%M:%S}"
            print(f"{stamp} {self._unit} {done}/{total}  {text}".rstrip(), file=sys.stderr, flush=True)  # noqa: T201 (where a person reads)
