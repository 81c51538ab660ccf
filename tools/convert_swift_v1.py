"""Convert SwiFT v1's frame folders to NIfTI files that `swiftv2 store build` takes.

Read: `SOURCE/SUBJECT/frame_0.pt`, `frame_1.pt`, ...; each a tensor (H, W, D) or (H, W, D, 1), float16 or float32.
"""

import pickle
import re
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from migration import convert, parser, run_tool
from migration_files import RefusedError, Volume

from swiftv2.errors import UsageError

PROGRAM = "convert_swift_v1"
_FRAME = re.compile(r"frame_(\d+)\.pt")
_DAMAGE = (OSError, EOFError, RuntimeError, ValueError, KeyError, pickle.UnpicklingError)


class FrameFolder:
    """The frames of one subject."""

    def __init__(self, folder: Path) -> None:
        """Look at names and first frame.

        Raises:
            RefusedError: a gap in the numbers, or a frame that is no such tensor.
        """
        self._folder = folder
        others, numbers = [], []
        for path in sorted(folder.iterdir()):
            match = _FRAME.fullmatch(path.name)
            if match is None:
                others.append(path)
            else:
                numbers.append(int(match[1]))
        numbers.sort()
        gap = next((wanted for wanted, number in enumerate(numbers) if number != wanted), None)
        if gap is not None:
            raise RefusedError(f"frame {gap} is missing while later ones are there: restore it, or leave the subject out")
        self.count = len(numbers)
        self.shape = (0, 0, 0)
        first = self._load(0)
        self.shape = (first.shape[0], first.shape[1], first.shape[2])
        self.facts: dict[str, Any] = {"Normalisation": "whole run, by SwiFT v1"}
        ignored = [path.name for path in others if not self._statistics(path)]
        self.remarks: tuple[str, ...] = (f"ignored: {', '.join(ignored)}",) if ignored else ()

    def read(self, wanted: Sequence[int]) -> Iterator[Volume]:
        """The wanted frames, (H, W, D) float32."""
        for number in wanted:
            yield self._load(number)

    def _load(self, number: int) -> Volume:
        try:
            value = torch.load(self._folder / f"frame_{number}.pt", map_location="cpu", weights_only=True)
        except _DAMAGE as error:
            raise RefusedError(f"frame {number} cannot be read ({type(error).__name__})") from error
        if not isinstance(value, torch.Tensor) or value.dtype not in (torch.float16, torch.float32):
            raise RefusedError(f"frame {number} is no float16 or float32 tensor")
        if value.ndim == 4 and value.shape[3] == 1:
            value = value[..., 0]
        if value.ndim != 3 or (any(self.shape) and tuple(value.shape) != self.shape):
            raise RefusedError(
                f"frame {number} has the shape {tuple(value.shape)}: (H, W, D) or (H, W, D, 1), all alike, is known"
            )
        frame: Volume = value.to(torch.float32).numpy()
        return frame

    def _statistics(self, path: Path) -> bool:
        """Keep mean and std of the run where a file beside the frames is a mapping that holds them."""
        if path.suffix != ".pt":
            return False
        try:
            content = torch.load(path, map_location="cpu", weights_only=True)
        except _DAMAGE:
            return False
        if not isinstance(content, dict):
            return False
        found = {}
        for name, value in content.items():
            for fact in ("mean", "std"):
                if str(name).lower().endswith(fact) and (not isinstance(value, torch.Tensor) or value.numel() == 1):
                    found[f"Run{fact.title()}"] = float(value)
        self.facts |= found
        return bool(found)


def main(argv: Sequence[str] | None = None) -> int:
    """Convert; returns the exit status."""

    def command() -> int:
        arguments = options.parse_args(argv)
        if not arguments.source.is_dir():
            raise UsageError(f"{arguments.source} is no folder: give the one whose folders are the subjects (v1 calls it img)")
        folders = [path for path in arguments.source.iterdir() if path.is_dir() and next(path.glob("frame_*.pt"), None)]
        return convert(arguments, folders, FrameFolder, PROGRAM, "auto")

    options = parser(PROGRAM, __doc__ or "", "folder of frame folders, one a subject")
    return run_tool(PROGRAM, command)


if __name__ == "__main__":
    sys.exit(main())
