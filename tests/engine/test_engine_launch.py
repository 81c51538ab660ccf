"""Who am I: the environments of the launchers, and what is wrong with broken ones."""

import subprocess
from dataclasses import replace

import pytest
import torch
from ranks import environment as plain_environment
from ranks import worker
from torch import nn

from swiftv2.config.engine import EngineConfig
from swiftv2.config.model import OptimizerConfig
from swiftv2.engine.build import build_backend
from swiftv2.engine.launch import start, stop
from swiftv2.engine.optimizer import adamw, set_learning_rate
from swiftv2.engine.place import Place, find_place, first_host
from swiftv2.errors import SwiftError

TORCHRUN = {
    "RANK": "3",
    "WORLD_SIZE": "4",
    "LOCAL_RANK": "1",
    "LOCAL_WORLD_SIZE": "2",
    "MASTER_ADDR": "node1",
    "MASTER_PORT": "29500",
}
OPEN_MPI = {
    "OMPI_COMM_WORLD_RANK": "3",
    "OMPI_COMM_WORLD_SIZE": "4",
    "OMPI_COMM_WORLD_LOCAL_RANK": "1",
    "OMPI_COMM_WORLD_LOCAL_SIZE": "2",
}
MPICH = {"PMI_RANK": "3", "PMI_SIZE": "4", "MPI_LOCALRANKID": "1", "MPI_LOCALNRANKS": "2"}
JOB = {"SLURM_JOB_ID": "123456", "SLURM_JOB_NODELIST": "nid[001003-001004]", "SLURM_PROCID": "0", "SLURM_NTASKS": "4"}
STEP = JOB | {
    "SLURM_STEP_ID": "0",
    "SLURM_STEP_NUM_TASKS": "4",
    "SLURM_STEP_NODELIST": "nid[001003-001004]",
    "SLURM_STEP_TASKS_PER_NODE": "2(x2)",
    "SLURM_PROCID": "3",
    "SLURM_LOCALID": "1",
}


def test_nothing_set_is_alone() -> None:
    assert find_place({}) == Place("alone")


def test_torchrun() -> None:
    assert find_place(TORCHRUN) == Place("torchrun", 3, 4, 1, 2, "node1", 29500)


@pytest.mark.parametrize("environment", [OPEN_MPI, MPICH])
def test_mpirun_leaves_the_meeting_point_to_be_agreed(environment: dict[str, str]) -> None:
    assert find_place(environment) == Place("mpirun", 3, 4, 1, 2, None, None)


def test_srun_derives_a_meeting_point_that_all_ranks_know() -> None:
    place = find_place(STEP)
    assert (place.launcher, place.rank, place.size, place.local_rank, place.local_size) == ("srun", 3, 4, 1, 2)
    assert place.address == "nid001003"
    others = [find_place(STEP | {"SLURM_PROCID": str(r), "SLURM_LOCALID": str(r % 2)}) for r in range(4)]
    assert {(o.address, o.port) for o in others} == {("nid001003", place.port)}
    assert find_place(STEP | {"SLURM_STEP_ID": "1"}).port != place.port
    assert find_place(STEP | {"MASTER_ADDR": "here", "MASTER_PORT": "1234"}).address == "here"


def test_slurm_counts_only_inside_a_step() -> None:
    assert find_place(JOB) == Place("alone")
    assert find_place(JOB | {"SLURM_STEP_ID": "4294967291", "SLURM_LOCALID": "0"}) == Place("alone")


def test_the_innermost_launcher_wins() -> None:
    assert find_place(STEP | TORCHRUN).launcher == "torchrun"
    assert find_place(STEP | OPEN_MPI).launcher == "mpirun"
    # mpiexec inside an allocation starts its helpers by srun: one task a node, whose variables its ranks inherit
    assert find_place(STEP | MPICH | {"SLURM_STEP_NUM_TASKS": "2", "SLURM_PROCID": "1"}).launcher == "mpirun"
    # srun --mpi=pmi2 sets both, alike: no MPI is needed
    assert find_place(STEP | MPICH).launcher == "srun"


@pytest.mark.parametrize(
    ("environment", "part"),
    [
        ({"RANK": "0"}, "WORLD_SIZE is not set"),
        ({k: v for k, v in TORCHRUN.items() if k != "MASTER_PORT"}, "MASTER_PORT is not"),
        (TORCHRUN | {"RANK": "4"}, "rank 4 of 4"),
        (TORCHRUN | {"WORLD_SIZE": "four"}, "WORLD_SIZE='four' is not a number"),
        (TORCHRUN | {"MASTER_PORT": "x"}, "MASTER_PORT='x'"),
        ({k: v for k, v in OPEN_MPI.items() if "SIZE" not in k}, "OMPI_COMM_WORLD_SIZE is not set"),
        ({k: v for k, v in STEP.items() if "NODELIST" not in k}, "set MASTER_ADDR"),
    ],
)
def test_a_broken_environment_is_one_line(environment: dict[str, str], part: str) -> None:
    with pytest.raises(SwiftError, match=part) as caught:
        find_place(environment)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("nodes", "host"),
    [
        ("nid001003", "nid001003"),
        ("nid[001003-001006,001010],login1", "nid001003"),
        ("a,b", "a"),
        ("rack[0-1]node[7,9]", "rack0node7"),
    ],
)
def test_the_first_host_of_a_node_list(nodes: str, host: str) -> None:
    assert first_host(nodes) == host


def test_two_groups_of_parameters_never_one_each() -> None:
    module = nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4), nn.Linear(4, 2))
    parameters = dict(module.named_parameters())
    optimizer = adamw(parameters, {"0.weight", "2.weight"}, OptimizerConfig(lr=0.1, weight_decay=0.3))
    decayed, spared = optimizer.param_groups
    assert [id(p) for p in decayed["params"]] == [id(module[0].weight), id(module[2].weight)]
    assert (decayed["weight_decay"], spared["weight_decay"], len(spared["params"])) == (0.3, 0.0, 4)
    set_learning_rate(optimizer, 0.5)
    assert {group["lr"] for group in optimizer.param_groups} == {0.5}
    assert len(adamw(parameters, set(), OptimizerConfig()).param_groups) == 1
    with pytest.raises(SwiftError, match="cannot decay nothing"):
        adamw(parameters, {"nothing"}, OptimizerConfig())


def test_rates_of_their_own_make_groups_and_leave_the_decay_as_it_is() -> None:
    module = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 4), nn.Linear(4, 2))
    parameters = dict(module.named_parameters())
    weights = {f"{i}.weight" for i in range(3)}
    optimizer = adamw(parameters, weights, OptimizerConfig(lr=0.1, weight_decay=0.3), {"1.weight": 0.25})
    assert len(optimizer.param_groups) == 3
    set_learning_rate(optimizer, 0.08)
    rates = {
        id(p): (group["lr"], group["lr"] * group["weight_decay"]) for group in optimizer.param_groups for p in group["params"]
    }
    assert rates[id(module[1].weight)] == pytest.approx((0.02, 0.08 * 0.3))
    assert rates[id(module[0].weight)] == pytest.approx((0.08, 0.08 * 0.3))
    assert rates[id(module[1].bias)] == pytest.approx((0.08, 0.0))
    with pytest.raises(SwiftError, match="cannot set the rate of nothing"):
        adamw(parameters, weights, OptimizerConfig(), {"nothing": 0.5})


def test_decay_leaves_the_others_alone() -> None:
    module = nn.Linear(2, 2)
    before = module.bias.detach().clone()
    optimizer = adamw(dict(module.named_parameters()), {"weight"}, OptimizerConfig(lr=0.1, weight_decay=0.5))
    weight = module.weight.detach().clone()
    for parameter in module.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    torch.testing.assert_close(module.weight.detach(), weight * 0.95)
    assert torch.equal(module.bias.detach(), before)


@pytest.mark.parametrize(
    ("values", "part"),
    [
        ({"zero_stage": 0}, "zero_stage=0 with precision=bf16 cannot sum gradients in fp32"),
        ({"precision": "fp32", "gradient_accumulation_dtype": "bf16"}, "needs precision=bf16"),
    ],
)
def test_combinations_that_do_not_exist_are_refused(values: dict[str, object], part: str) -> None:
    with pytest.raises(ValueError, match=part):
        EngineConfig.model_validate(values)


def test_a_missing_gpu_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SwiftError, match="PyTorch finds no GPU"):
        start(EngineConfig(device="cuda"))


def test_alone_needs_no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("LOCAL_RANK", "DS_ACCELERATOR"):  # start() sets them: take them back afterwards
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    world = start(EngineConfig(device="cpu"))
    try:
        assert (world.rank, world.size, world.launcher, world.device.type) == (0, 1, "alone", "cpu")
        assert torch.distributed.is_initialized()
    finally:
        stop()
    assert not torch.distributed.is_initialized()


@pytest.mark.slow
def test_deepspeed_takes_the_device_of_this_rank_not_that_of_its_number(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where a launcher binds one GPU to each task, local rank 3 sees its own as number 0."""
    for name in ("LOCAL_RANK", "DS_ACCELERATOR"):
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    world = replace(start(EngineConfig(device="cpu")), local_rank=3, local_size=4)
    monkeypatch.setenv("LOCAL_RANK", "3")
    from deepspeed.accelerator import get_accelerator

    taken: list[int] = []
    monkeypatch.setattr(get_accelerator(), "set_device", taken.append)
    module = nn.Linear(2, 2)
    try:
        build_backend(EngineConfig(precision="fp32"), OptimizerConfig(), module, {"weight"}, world, 1, 1).close()
    finally:
        stop()
    assert set(taken) == {0}


@pytest.mark.slow
def test_a_rank_leaves_in_order_while_gloo_still_lets_go_of_tensors() -> None:
    # An interpreter that ends while a thread of gloo waits for it is aborted: exit status -6, hence 1 of the launcher.
    done = subprocess.run(
        worker(2, "leaving.py"), env=plain_environment(), capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
