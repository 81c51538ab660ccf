"""Weights & Biases: offline files in the run directory, or the hosted service where it is asked for."""

import os
from collections.abc import Mapping
from pathlib import Path

from swiftv2.engine.trackers.tracker import Order, Tracker


class _Wandb:
    def __init__(self, order: Order) -> None:
        os.environ |= {"WANDB_SILENT": "true", "WANDB_ERROR_REPORTING": "false"}
        os.chdir(order.folder)
        import wandb

        self._run = wandb.init(
            mode="online" if order.mode == "online" else "offline",
            project=order.project,
            id=order.identity,
            name=order.identity,
            resume="allow",
            # It makes a folder `wandb` there, which is the order's.
            dir=str(Path(order.folder).parent),
            config=dict(order.settings),
            settings=wandb.Settings(
                console="off",
                disable_code=True,
                disable_git=True,
                disable_job_creation=True,
                save_code=False,
                silent=True,
                host="",
                username="",
                program="swiftv2",
                x_disable_machine_info=True,
                x_disable_meta=True,
                x_disable_stats=True,
                x_save_requirements=False,
            ),
        )
        # W&B's own step only rises; ours goes back where steps are done again.
        self._run.define_metric("step")
        self._run.define_metric("*", step_metric="step")

    def log(self, step: int, values: Mapping[str, float]) -> None:
        self._run.log({**values, "step": step})

    def close(self) -> None:
        self._run.finish()


def begin(order: Order) -> Tracker:
    """Open a run; offline it is a folder `wandb/offline-run-<time>-<id>` of this attempt."""
    return _Wandb(order)
