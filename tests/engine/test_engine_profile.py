"""Profiles: traces, what a summary makes of them, and that a run is the same with one as without."""

import gzip
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from swiftv2.config.engine import EngineConfig, FaultsConfig, ScheduleConfig, TrainConfig
from swiftv2.config.load import build
from swiftv2.config.model import OptimizerConfig
from swiftv2.engine.build import build_backend
from swiftv2.engine.clock import Clock
from swiftv2.engine.launch import World
from swiftv2.engine.loop import fit
from swiftv2.engine.profile import Profile
from swiftv2.engine.rundir import RunDirectory
from swiftv2.engine.sentinel import Sentinel
from swiftv2.engine.timeline import Event, kind_of, read_trace, summarise
from swiftv2.errors import SwiftError, UsageError
from swiftv2.records import read_lines, read_metrics

sys.path.insert(0, str(Path(__file__).parent / "workers"))
from toy import DECAY, Batches, Toy

ALONE = World(0, 1, 0, 1, torch.device("cpu"))
ENGINE = EngineConfig(backend="plain", device="cpu", precision="fp32")


def _train(path: Path, asked: str | None, max_steps: int = 8, finished: Callable[[Path], Path] | None = None) -> Toy:
    module = Toy()
    train = TrainConfig(max_steps=max_steps, global_batch=8, save_every=4, evaluate_every=4, profile=asked)
    with (
        RunDirectory.open(path, f"train: {{max_steps: {max_steps}}}\n", ALONE) as run,
        Sentinel.over(run, ALONE, train, FaultsConfig()) as watch,
    ):
        fit(
            backend=build_backend(ENGINE, OptimizerConfig(lr=1e-2), module, DECAY, ALONE, 8, 1),
            world=ALONE,
            run=run,
            watch=watch,
            batches=lambda samples, exclusions: Batches(samples, ALONE, 1, exclusions=exclusions),
            train=train,
            schedule=ScheduleConfig(warmup_steps=2),
            peak_lr=1e-2,
            seed=0,
            profile=Profile(asked, run, ALONE, {"first": module.first, "second": module.second}, finished),
        )
    return module


def _losses(path: Path) -> list[float]:
    return [row["loss"] for row in read_metrics(path / "metrics.jsonl")]


def _summary(folder: Path) -> dict[str, Any]:
    value: dict[str, Any] = json.loads((folder / "summary.json").read_text(encoding="utf-8"))
    return value


def _where(told: dict[str, Any], kind: str, least: float = 0.0) -> set[tuple[str, str]]:
    """Ranges and directions in which a kind of operator took time."""
    cells = [cell for cell in told["cells"] if cell["kind"] == kind and cell["cpu"] > least]
    return {(cell["range"][-1] if cell["range"] else "", cell["direction"]) for cell in cells}


@pytest.fixture(scope="module")
def profiled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of 8 steps, of which 3 to 5 are profiled."""
    path = tmp_path_factory.mktemp("profile") / "run"
    module = _train(path, "steps:3-5")
    assert not module.first._forward_hooks
    assert not module.first._forward_pre_hooks
    return path


def test_a_profile_names_steps_phases_and_modules_in_its_trace(profiled: Path) -> None:
    folder = profiled / "profile" / "attempt_1"
    assert sorted(p.name for p in folder.iterdir()) == ["summary.json", "trace-rank-0.json.gz"]
    trace = json.loads(gzip.decompress((folder / "trace-rank-0.json.gz").read_bytes()))
    ranges = [event["name"] for event in trace["traceEvents"] if event.get("cat") == "user_annotation"]
    assert [name for name in ranges if name.startswith("step ")] == ["step 3", "step 4", "step 5"]
    for name in ("data", "forward", "backward", "optimizer", "first", "second"):
        assert ranges.count(name) >= 3, name
    event = next(one for one in read_lines(profiled / "events.jsonl") if one["event"] == "profile")
    assert (event["step"], event["steps"], event["path"]) == (5, [3, 4, 5], "profile/attempt_1")


def test_a_summary_gives_each_moment_of_a_step_to_one_cell(profiled: Path) -> None:
    summary = _summary(profiled / "profile" / "attempt_1")
    told = summary["ranks"]["0"]
    assert (told["steps"], summary["other_steps"], summary["problems"]) == ([3, 4, 5], 1, [])
    assert sum(cell["cpu"] for cell in told["cells"]) == pytest.approx(told["seconds"], rel=1e-6)
    # The trace's own steps are those that the clock of the process has seen.
    assert told["seconds"] == pytest.approx(sum(summary["step_seconds"]), rel=0.2)
    assert {"data", "forward", "backward", "optimizer"} <= {cell["phase"] for cell in told["cells"]}
    assert {("first", "forward"), ("first", "backward"), ("second", "forward"), ("second", "backward")} <= _where(
        told, "matrix products"
    )
    # The norm between the layers is in no named module, in both directions.
    assert _where(told, "normalisation") == {("", ""), ("", "backward")}
    assert next(one for one in told["operators"] if one["name"] == "aten::addmm")["count"] == 6


def test_losses_of_a_profiled_run_are_those_of_another(profiled: Path, tmp_path: Path) -> None:
    _train(tmp_path / "run", None)
    assert _losses(profiled) == _losses(tmp_path / "run")
    assert not (tmp_path / "run" / "profile").exists()


def test_a_profile_that_cannot_be_written_is_told_and_the_run_goes_on(
    profiled: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    _train(tmp_path / "run", None, max_steps=2)
    (tmp_path / "run" / "profile").write_text("in the way", encoding="utf-8")
    _train(tmp_path / "run", "steps:3-4")
    assert _losses(tmp_path / "run") == _losses(profiled)
    told = [line for line in capsys.readouterr().err.splitlines() if "profile of" in line]
    assert len(told) == 1
    assert f"profile of steps 3 to 4, which is not whole: rank 0: {tmp_path}/run/profile" in told[0]


def test_whatever_goes_wrong_with_a_profile_the_run_goes_on(
    profiled: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def page(folder: Path) -> Path:
        raise KeyError(folder.name)

    _train(tmp_path / "run", "steps:3-4", finished=page)
    assert _losses(tmp_path / "run") == _losses(profiled)
    assert "profile of steps 3 to 4, which is not whole: KeyError: 'attempt_1'" in capsys.readouterr().err


def test_a_profile_begins_again_where_training_goes_back(tmp_path: Path) -> None:
    told: list[str] = []
    with RunDirectory.open(tmp_path / "run", "x: 1\n", ALONE) as run:
        profile = Profile("steps:5-6", run, ALONE).telling(told.append)
        for step in (4, 5, 2, 3, 4, 5, 6, 7):
            profile.begin(step)
            torch.ones(2).add_(1)
            profile.end(step)
    assert _summary(tmp_path / "run" / "profile" / "attempt_1")["steps"] == [5, 6]
    assert "went back" in told[0]


def test_steps_that_are_passed_or_not_reached_are_told_in_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    _train(tmp_path / "run", "steps:30-31", max_steps=2)
    _train(tmp_path / "run", "steps:1-2", max_steps=4)
    told = [line.partition("train.profile=")[2] for line in capsys.readouterr().err.splitlines() if "train.profile" in line]
    assert told == [
        "steps:30-31: the run ended before these steps: nothing is profiled",
        "steps:1-2: the run is past these steps: nothing is profiled",
    ]
    assert not (tmp_path / "run" / "profile").exists()


def test_a_run_that_goes_on_within_the_steps_profiles_the_rest(tmp_path: Path) -> None:
    _train(tmp_path / "run", "steps:2-6", max_steps=3)
    _train(tmp_path / "run", "steps:2-6", max_steps=8)
    steps = {folder.name: _summary(folder)["steps"] for folder in (tmp_path / "run" / "profile").iterdir()}
    assert steps == {"attempt_1": [2, 3], "attempt_2": [4, 5, 6]}


@pytest.mark.parametrize(
    ("asked", "why"),
    [
        ("10-15", "write it as steps:A-B"),
        ("steps:a-b", "write it as steps:A-B"),
        ("steps:0-5", "write it as steps:A-B"),
        ("steps:15-10", "write steps:10-15"),
        ("steps:1-101", "at most 100"),
    ],
)
def test_words_that_name_no_steps_are_refused(asked: str, why: str) -> None:
    with pytest.raises(UsageError, match=why):
        build(TrainConfig, {"max_steps": 10, "global_batch": 4, "profile": asked}, where="test")


class Normed(nn.Module):
    """A norm, and nothing else."""

    def forward(self, x: Tensor) -> Tensor:
        """(..., C) -> (..., C)."""
        return functional.layer_norm(x, x.shape[-1:])


class Recomputed(nn.Module):
    """A product whose result is computed again in the backward pass."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.eye(32))

    def forward(self, x: Tensor) -> Tensor:
        """(..., C) -> (..., C)."""
        out: Tensor = checkpoint(lambda one: torch.sigmoid(one @ self.weight), x, use_reentrant=False)
        return out


class Attended(nn.Module):
    """Attention without weights."""

    def forward(self, x: Tensor) -> Tensor:
        """(B, tokens, C) -> (B, tokens, C)."""
        heads = x.view(*x.shape[:-1], 4, 8).transpose(1, 2)
        return functional.scaled_dot_product_attention(heads, heads, heads).transpose(1, 2).flatten(2)


def test_backward_passes_belong_to_the_module_of_their_forward_pass(tmp_path: Path) -> None:
    """Three modules of one kind of operator each, twice in a row, one of them computed again: no kind strays."""
    parts = {"norm": Normed(), "product": Recomputed(), "attention": Attended()}
    run, clock = RunDirectory(tmp_path, 1, ALONE, None), Clock(torch.device("cpu"))
    x = torch.randn(2, 64, 32, generator=torch.Generator().manual_seed(0), requires_grad=True)
    long: list[tuple[int, str]] = []
    profile = Profile("steps:1-2", run, ALONE, parts).telling(lambda _: None, clock, lambda *place: long.append(place))
    with profile:
        for step in (1, 2):
            profile.begin(step)
            assert profile.profiled
            with clock.part("forward"):
                y = x
                for part in (*parts.values(), *parts.values()):
                    y = part(y)
                loss = y.square().sum()
            with clock.part("backward"):
                torch.autograd.backward(loss)
            profile.end(step)
    assert not profile.profiled
    assert clock.ranges is None
    assert long == [(2, "save")]
    told = _summary(tmp_path / "profile" / "attempt_1")["ranks"]["0"]
    assert _where(told, "normalisation") == {("norm", "forward"), ("norm", "backward")}
    assert _where(told, "matrix products") == {("product", "forward"), ("product", "backward")}
    assert _where(told, "attention") == {("attention", "forward"), ("attention", "backward")}
    counts = {one["name"]: one["count"] for one in told["operators"]}
    # Per step twice forward, twice again for the checkpoint, twice two gradients.
    assert counts["aten::mm"] == 2 * (2 + 2 + 4)
    assert counts["aten::native_layer_norm_backward"] == 4


def _event(name: str, start: float, end: float, category: str = "cpu_op", thread: int = 1, **args: Any) -> Event:
    return Event(name, category, thread, start, end, args)


NUMBER: dict[str, Any] = {"Sequence number": 3}


def _range(name: str, start: float, end: float, thread: int = 1) -> Event:
    return _event(name, start, end, "user_annotation", thread)


def test_kernels_belong_to_the_operator_that_launched_them() -> None:
    """A hand-made trace in the form of CUDA's: the backward pass is in a thread of autograd's, kernels come late."""
    seconds = 1e6
    events = [
        _range("step 7", 0, 100 * seconds),
        _range("forward", 10 * seconds, 30 * seconds),
        _range("stage 1", 12 * seconds, 20 * seconds),
        _event("aten::mm", 13 * seconds, 15 * seconds, **NUMBER),
        _event("cudaLaunchKernel", 14 * seconds, 15 * seconds, "cuda_runtime", correlation=1),
        _event("sm90_xmma_gemm", 40 * seconds, 50 * seconds, "kernel", 7, correlation=1),
        _range("backward", 30 * seconds, 90 * seconds),
        _event("autograd::engine::evaluate_function: MmBackward0", 40 * seconds, 60 * seconds, thread=2, **NUMBER),
        _event("aten::mm", 41 * seconds, 59 * seconds, thread=2),
        _event("cudaLaunchKernel", 42 * seconds, 44 * seconds, "cuda_runtime", 2, correlation=2),
        _event("sm90_xmma_gemm", 55 * seconds, 80 * seconds, "kernel", 7, correlation=2),
        _event("cudaStreamSynchronize", 70 * seconds, 85 * seconds, "cuda_runtime"),
        _event("Memcpy HtoD", 200 * seconds, 210 * seconds, "gpu_memcpy", 7, correlation=99),
    ]
    told = summarise(events, ["stage 1"])
    found = {(c["phase"], *c["range"], c["direction"], c["kind"]): (c["cpu"], c["device"]) for c in told["cells"]}
    assert found["forward", "stage 1", "forward", "matrix products"] == (1, 10)
    assert found["backward", "stage 1", "backward", "matrix products"] == (16, 25)
    assert found["backward", "stage 1", "backward", "launching kernels"] == (2, 0)
    assert found["backward", "", "waiting for the device"] == (15, 0)
    assert sum(cpu for cpu, _ in found.values()) == pytest.approx(100)
    device = told["device"]
    assert (device["seconds"], device["busy"], device["idle"]) == (100, 35, 65)
    assert (device["long_gaps"], device["long_gap_seconds"]) == (3, 65)
    (product,) = told["operators"][:1]
    assert (product["name"], product["count"], product["device"]) == ("aten::mm", 2, 35)


def test_a_rank_that_waits_for_others_communicates() -> None:
    """gloo's thread is at work from 20 to 60 s: the main thread does nothing in Python from 10 to 50 s."""
    events = [
        _range("step 1", 0, 100e6),
        _event("aten::mm", 0, 10e6),
        _event("aten::mm", 50e6, 100e6),
        _range("gloo:all_reduce", 20e6, 60e6, thread=5),
    ]
    kinds = {cell["kind"]: cell["cpu"] for cell in summarise(events, [])["cells"]}
    assert kinds == {"matrix products": 60, "communication": 30, "Python and waiting": 10}


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("aten::addmm", "matrix products"),
        ("aten::bmm", "matrix products"),
        ("sm90_xmma_gemm_bf16", "matrix products"),
        ("aten::_scaled_dot_product_flash_attention_for_cpu_backward", "attention"),
        ("aten::convolution_backward", "convolution"),
        ("aten::native_layer_norm", "normalisation"),
        ("aten::linalg_vector_norm", "elementwise and sums"),
        ("aten::gelu_backward", "elementwise and sums"),
        ("aten::_fused_adamw_", "elementwise and sums"),
        ("void at::native::vectorized_elementwise_kernel<4, at::native::AddFunctor>", "elementwise and sums"),
        ("aten::copy_", "copies and indexing"),
        ("aten::index_select", "copies and indexing"),
        ("aten::cat", "copies and indexing"),
        ("ncclDevKernel_AllReduce_Sum_f32_RING_LL", "communication"),
        ("aten::view", "other"),
        ("aten::empty_strided", "other"),
    ],
)
def test_kinds_of_operators(name: str, kind: str) -> None:
    assert kind_of(name) == kind


@pytest.mark.parametrize("text", ["", "{", "{}", '{"traceEvents": [{"ph": "X"}]}'])
def test_a_damaged_trace_is_told(tmp_path: Path, text: str) -> None:
    (tmp_path / "trace.json").write_text(text, encoding="utf-8")
    with pytest.raises(SwiftError, match="no trace of the profiler"):
        read_trace(tmp_path / "trace.json")


@pytest.mark.gpu
def test_kernels_of_a_real_gpu_are_given_to_modules(tmp_path: Path) -> None:
    device = torch.device("cuda", 0)
    world = World(0, 1, 0, 1, device)
    part = nn.Linear(1024, 1024, device=device)
    run, clock = RunDirectory(tmp_path, 1, world, None), Clock(device)
    with Profile("steps:1-2", run, world, {"part": part}).telling(lambda _: None, clock) as profile:
        for step in (1, 2):
            profile.begin(step)
            with clock.part("forward"):
                loss = part(torch.randn(1024, 1024, device=device)).square().sum()
            with clock.part("backward"):
                torch.autograd.backward(loss)
            profile.end(step)
    summary = _summary(tmp_path / "profile" / "attempt_1")
    told = summary["ranks"]["0"]
    assert summary["problems"] == []
    assert told["device"]["busy"] > 0
    products = {c["direction"]: c["device"] for c in told["cells"] if c["kind"] == "matrix products" and c["range"] == ["part"]}
    assert products["forward"] > 0
    assert products["backward"] > products["forward"]
