"""The command that makes weights of this package from a SwiFT v1 checkpoint."""

import argparse
from pathlib import Path
from typing import Any, get_args

from swiftv2.config.data import NormalisationConfig
from swiftv2.config.load import override
from swiftv2.errors import UsageError
from swiftv2.terminal import add_command, say

_KINDS = get_args(NormalisationConfig.model_fields["kind"].annotation)
_SCOPES = get_args(NormalisationConfig.model_fields["scope"].annotation)


def add(verbs: Any) -> None:
    """The verb `import-v1` of `checkpoint`."""
    text = (
        "make a folder of weights, for fine-tuning and embedding, from a SwiFT v1 Lightning checkpoint; nothing in it is run. "
        "What the file does not tell of its input is asked here and never guessed; fine-tuning refuses other input. Its voxels "
        "are in LAS order: build stores for it with grid.orientation=LAS."
    )
    example = (
        "swiftv2 checkpoint import-v1 swift.ckpt weights --space MNI152NLin6Asym --voxel-mm 2 --tr 0.72 "
        "--normalisation znorm_minback"
    )
    parser = add_command(verbs, "import-v1", _import, text, [example])
    parser.add_argument("checkpoint", type=Path, help="a .ckpt file")
    parser.add_argument("folder", type=Path, help="where the weights go; must not exist")
    parser.add_argument("--space", required=True, help="template space of the runs that it was trained on")
    parser.add_argument("--voxel-mm", type=float, required=True, help="edge of their voxels in mm")
    parser.add_argument("--tr", type=float, help="their repetition time in seconds; unset where it differed")
    parser.add_argument("--normalisation", choices=_KINDS, required=True, help="how BOLD was scaled")
    parser.add_argument("--scope", choices=_SCOPES, default="run", help="where its statistics came from (default: run)")
    parser.add_argument(
        "overrides",
        nargs="*",
        metavar="KEY=VALUE",
        help="SwiFT v1's own keywords that the file does not hold, such as embed_dim=36",
    )


def _import(arguments: argparse.Namespace) -> int:
    config: dict[str, Any] = {}
    for word in arguments.overrides:
        override(config, word)
    if arguments.voxel_mm <= 0 or (arguments.tr is not None and arguments.tr <= 0):
        raise UsageError("--voxel-mm and --tr are above 0")
    contract = {
        "space": arguments.space,
        "voxel_mm": [arguments.voxel_mm] * 3,
        "tr_seconds": arguments.tr,
        "normalisation": {"kind": arguments.normalisation, "scope": arguments.scope},
    }
    from swiftv2 import weights

    model, card = weights.import_swift_v1(arguments.checkpoint, contract, config)
    weights.export(arguments.folder, model, card)
    say(f"{arguments.folder}: SwiFT v1 with {sum(p.numel() for p in model.parameters()):,} parameters, for input in LAS order")
    return 0
