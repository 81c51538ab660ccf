"""Errors that a user can act on: one line that says what is wrong, where, and what to do."""


class SwiftError(Exception):
    """Something failed that the user can mend; the command line prints it as one line and exits with 1."""

    exit_status = 1


class UsageError(SwiftError):
    """The command or its configuration is wrong; the command line exits with 2."""

    exit_status = 2


class DamagedError(SwiftError):
    """Bytes on the disk are missing or not what was written: so they are for whoever reads them, and again."""


class RankError(SwiftError):
    """Something failed on this rank and maybe on no other, such as reading its clips: it must say so itself."""


class InterruptedRunError(SwiftError):
    """The run broke off through no fault of its own; the same command goes on, so the command line exits with 75."""

    exit_status = 75
