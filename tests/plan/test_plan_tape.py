"""What a pass holds, recorded on fake tensors, against real tensors and PyTorch's own hooks."""

import weakref
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

from swiftv2.config.load import load, presets_root
from swiftv2.config.pretrain import PretrainConfig
from swiftv2.models.flops import computed_flops
from swiftv2.models.geometry import patches_with_brain
from swiftv2.plan.tape import FREED, GRADIENT, HELD, Recorder, Tape, forget_tables, record, stretch
from swiftv2.recipes.planning import Window, counted_flops, find_window, make_batch, make_objective

SETTINGS = [
    "model.packing=none",
    "model.packing=template",
    "model.packing=subject",
    "model.checkpoint_stages=[0,1]",
    "model.checkpoint_stages=[0] model.checkpoint_keep=attention",
    "model.variant=decoupled model.embed_dim=36 model.num_heads=[3,6]",
    "objective=visible_only",
]
SIDE = 24


@pytest.fixture(autouse=True)
def no_tables_left() -> Iterator[None]:
    yield
    forget_tables()


def configured(words: str) -> PretrainConfig:
    path = presets_root() / "pretrain" / "demo.yaml"
    small = ["data.store=none.zarr", "engine.backend=plain", "model.depths=[1,1]", f"model.image_size=[{SIDE},{SIDE},{SIDE}]"]
    return load(PretrainConfig, path, [*small, *words.split()])


@pytest.fixture(scope="module")
def window() -> Window:
    return a_ball()


@cache
def a_ball() -> Window:
    """A brain in the shape of a ball: a quarter of the grid, whose corners hold none."""
    axis = torch.arange(SIDE) - (SIDE - 1) / 2
    inside = axis[:, None, None] ** 2 + axis[None, :, None] ** 2 + axis[None, None, :] ** 2 < (SIDE / 2.6) ** 2
    return Window((SIDE, SIDE, SIDE), inside.flatten().nonzero()[:, 0], torch.int16, "a ball")


class Live(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Most bytes of real storages that appear from here on."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.known: weakref.WeakSet[Any] = weakref.WeakSet()
        self.now = self.most = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        given = {t.untyped_storage().data_ptr() for t in tree_iter((args, kwargs)) if isinstance(t, Tensor)}
        for tensor in (t for t in tree_iter(made) if isinstance(t, Tensor)):
            storage = tensor.untyped_storage()
            if storage not in self.known and storage.data_ptr() not in given:
                self.known.add(storage)
                self.now += storage.nbytes()
                self.most = max(self.most, self.now)
                weakref.finalize(storage, self.gone, storage.nbytes())
        return made

    def gone(self, size: int) -> None:
        self.now -= size


def most_of(tape: Tape, clips: int = 1) -> float:
    now = most = 0.0
    for event in tape.events:
        sign = {HELD: 1, FREED: -1}.get(event.kind, 0)
        now += sign * (event.fixed + event.each * clips)
        most = max(most, now)
    return most


@cache
def recorded(words: str, clips: int) -> Tape:
    config = configured(words)
    window = a_ball()
    return record(lambda: (make_objective(config, window), make_batch(config, window, clips)), clips, "fp32")


@pytest.mark.parametrize("words", SETTINGS)
def test_the_peak_is_that_of_real_tensors(words: str, window: Window) -> None:
    config = configured(words)
    tape = recorded(words, 2)
    objective, batch = make_objective(config, window), make_batch(config, window, 2)
    with torch.no_grad():
        objective(batch)
    with Live() as live:
        torch.autograd.backward(objective(batch))
    assert most_of(tape) == pytest.approx(live.most, rel=0.005)


def test_what_is_saved_for_the_backward_pass_is_held(window: Window) -> None:
    config = configured("model.packing=none")
    saved: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        saved[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    objective, batch = make_objective(config, window), make_batch(config, window, 1)
    objective(batch)
    there = {t.untyped_storage().data_ptr() for t in [*objective.parameters(), *objective.buffers(), batch.mask, batch.brain]}
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = objective(batch)
    real = sum(size for pointer, size in saved.items() if pointer not in there)
    del loss
    forget_tables()
    with Recorder() as recorder:
        module, numbers = make_objective(config, window), make_batch(config, window, 1)
        recorder.building = False
        with torch.no_grad():
            module(numbers)
        before = recorder.live
        out = module(numbers)
        held = recorder.live - before
    del out
    # Tables of the model are saved too; they are counted once, apart from the passes.
    assert held <= real * 1.001
    assert held == pytest.approx(real, rel=0.05)


@pytest.mark.parametrize("words", [SETTINGS[0], SETTINGS[2], SETTINGS[4]])
def test_two_tapes_tell_every_other(words: str) -> None:
    two, three, five = (recorded(words, clips) for clips in (2, 3, 5))
    line = stretch(two, three)
    assert line is not None
    assert most_of(line, 5) == pytest.approx(most_of(five), rel=1e-3)
    assert stretch(two, two) is None


def test_bf16_halves_gradients(window: Window) -> None:
    config = configured("model.packing=none")
    full, half = (
        record(lambda: (make_objective(config, window), make_batch(config, window, 1)), 1, precision)
        for precision in ("fp32", "bf16")
    )
    assert (full.element, half.element) == (4, 2)
    assert sum(e.fixed for e in half.events if e.kind == GRADIENT) * 2 == sum(
        e.fixed for e in full.events if e.kind == GRADIENT
    )
    assert most_of(half) < most_of(full), "volumes and loss stay in float32"


def test_nothing_is_allocated_and_no_table_is_left(window: Window) -> None:
    path = presets_root() / "pretrain" / "3.2B.yaml"
    config = load(PretrainConfig, path, ["data.store=none.zarr", "model.depths=[1,1,1,1]"])
    full = find_window(config)
    peak = _resident()
    tape = record(lambda: (make_objective(config, full), make_batch(config, full, 1)), 1, "fp32")
    assert sum(tape.sizes) > 4e8
    assert _resident() - peak < 1.2e9
    # A real model of the same process still computes real numbers.
    small = configured("model.packing=none")
    assert torch.isfinite(make_objective(small, window)(make_batch(small, window, 1)))


def _resident() -> int:
    fields = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(fields["VmHWM"].split()[0]) * 1024


@pytest.mark.parametrize("words", SETTINGS[:3])
def test_flops_of_a_pass_are_those_that_the_model_counts(words: str, window: Window) -> None:
    config = configured(words)
    packed = config.model.packing != "none"
    kept = patches_with_brain(window.brain[None], config.model.patch_size)[0].numpy() if packed else None
    found = counted_flops(config, window)
    assert found["total"] == pytest.approx(computed_flops(config.model, kept)["total"], rel=0.02)


def test_a_parameter_without_a_gradient_is_told() -> None:
    class Idle(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.used, self.idle = nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, batch: Tensor) -> Tensor:
            out: Tensor = self.used(batch).sum()
            return out

    with pytest.raises(Exception, match="2 trainable parameters get no gradient"):
        record(lambda: (Idle(), torch.zeros(2, 4)), 2, "fp32")
