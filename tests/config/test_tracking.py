"""What a tracker may see of the settings, and what is refused."""

from pathlib import Path

import pytest
from pydantic import ValidationError

from swiftv2.config.engine import EngineConfig, RunConfig
from swiftv2.config.tracking import TrackingConfig, public


def test_numbers_switches_and_choices_leave_but_no_path_and_no_name() -> None:
    assert public(RunConfig(dir=Path("runs/sub-0001"), seed=3)) == {"seed": 3}
    seen = public(EngineConfig())
    assert seen["backend"] == "deepspeed"
    assert seen["zero_stage"] == 2
    assert public(TrackingConfig(wandb_project="jane-doe-thesis")).get("wandb_project") is None


def test_online_needs_a_project() -> None:
    with pytest.raises(ValidationError, match="neptune=online needs a project"):
        TrackingConfig(neptune="online")
    assert TrackingConfig(wandb="online", wandb_project="p").wanted == {"tensorboard": "offline", "wandb": "online"}
    assert TrackingConfig(tensorboard=False).wanted == {}
