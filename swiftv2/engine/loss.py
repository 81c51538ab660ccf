"""When ranks lose each other: what PyTorch says of it, and what is said to a person."""

import re

from torch.distributed import DistError

from swiftv2.engine.beats import Beat
from swiftv2.errors import InterruptedRunError, SwiftError

CONNECTION = re.compile(r"connection|broken pipe|timed? ?out|read error|write error", re.IGNORECASE)
"""What gloo says where another rank is gone or does not answer; it has no kinds of errors of its own."""
MISTAKE = re.compile(r"invalid ?(usage|argument)|enforce fail", re.IGNORECASE)
"""What gloo and NCCL say of calls that do not fit each other: going on from a checkpoint would not mend them."""


def lost_each_other(error: RuntimeError) -> bool:
    """Whether a collective failed because ranks do not reach each other any more."""
    text = str(error)
    between_ranks = isinstance(error, DistError) or ("gloo" in text and CONNECTION.search(text) is not None)
    return between_ranks and MISTAKE.search(text) is None


def after_loss(error: RuntimeError, left: Beat | None = None) -> SwiftError:
    """What this rank ends with after its collective failed.

    Args:
        error: of the collective.
        left: the rank that ended first, as far as that is known.

    Returns:
        An error of status 1 where a rank failed by itself, since going on would not mend that; else of status 75.
    """
    if left is not None and left.state == "failed":
        return SwiftError(f"rank {left.rank} on {left.host} ended by an error of its own, and this one with it")
    on = "the same command goes on from the last checkpoint"
    if left is not None:
        where = f"{left.phase} of step {left.step}"
        return InterruptedRunError(f"rank {left.rank} on {left.host} is gone since {where} (killed, or its node is dead); {on}")
    # PyTorch puts a stack of its own below the first line, and advice of its own behind the first sentence.
    reason = str(error).partition("\n")[0].partition(". ")[0]
    return InterruptedRunError(f"the ranks lost each other ({reason}); {on}")
