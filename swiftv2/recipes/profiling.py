"""Which modules of a model have a range of their own in a profile, and the page that is made of it."""

from collections.abc import Iterator

from torch import nn

from swiftv2.engine.launch import World
from swiftv2.engine.profile import Profile
from swiftv2.engine.rundir import RunDirectory
from swiftv2.models.heads import Predictor
from swiftv2.models.simmim import MaskedModel
from swiftv2.models.swin4d import PatchEmbed, PositionTables, Stage, Swin4D
from swiftv2.report.profile import write_page


def profile_of(asked: str | None, run: RunDirectory, world: World, module: nn.Module) -> Profile:
    """The profile of a run, for the loop.

    Args:
        asked: `train.profile`.
        run: the opened run directory.
        world: this process among the ranks.
        module: what the backend trains.
    """
    return Profile(asked, run, world, named_ranges(module), write_page)


def named_ranges(module: nn.Module) -> dict[str, nn.Module]:
    """Modules of a model by the names of their ranges: whole, encoder with patch embedding, stages and merging, decoder, head.

    Blocks within a stage have none: where they are compiled, a hook would compile them again.
    """
    return dict(pair for path, one in module.named_modules() for pair in _ranges(path, one))


def _ranges(path: str, module: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Names in brackets say what the own time of a module around others goes into."""
    last = path.rpartition(".")[2]
    if not path:
        yield "objective (normalising, scattering)", module
    elif isinstance(module, MaskedModel):
        yield "masked model (loss)", module
    elif isinstance(module, Predictor):
        yield "predictor", module
    elif isinstance(module, Swin4D):
        yield "encoder (routing)", module
        yield "final norm", module.norm
    elif isinstance(module, PatchEmbed):
        yield "patch embedding", module
    elif isinstance(module, PositionTables) and last.isdecimal():
        yield f"positions {int(last) + 1}", module
    elif isinstance(module, Stage):
        yield f"stage {int(last) + 1}", module
        if module.downsample is not None:
            yield f"merging {int(last) + 1}", module.downsample
    elif last in {"decoder", "pool", "head"}:
        yield last, module
