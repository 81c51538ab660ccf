"""The files of slurm/: clean shell, headers that Slurm takes, and nodes that hold the model."""

import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from cluster import Cluster, of_session, remove
from daemons import SEARCH, installed, lacking

from swiftv2.config.load import find_preset, load
from swiftv2.config.pretrain import PretrainConfig
from swiftv2.plan.machines import gpu, machine_of
from swiftv2.plan.memory import rank_memory
from swiftv2.plan.run import check_machine
from swiftv2.recipes.planning import find_window, layout, passes

SLURM = Path(__file__).parents[2] / "slurm"
PRETRAINING = ("5M", "51M", "202M", "806M", "837M_new", "3.2B")
LAUNCHERS = (*(f"pretrain_{size}" for size in PRETRAINING), "store_build", "sweep", "finetune", "tune", "embed")
SHELL = sorted(path.relative_to(SLURM).as_posix() for path in (*SLURM.glob("*.sh"), *SLURM.glob("sites/*.env")))
BODY = 'exec bash "${SWIFTV2_ROOT:-$SLURM_SUBMIT_DIR}/slurm/body.sh"'
OWN_TO_A_SIZE = {"job-name", "nodes", "constraint"}


def header(launcher: str) -> dict[str, str]:
    """The options of a launcher's #SBATCH lines; a flag has an empty value."""
    found = re.findall(r"^#SBATCH --([a-z-]+)(?:=(.*))?$", _text(launcher), flags=re.MULTILINE)
    assert len(found) == len(dict(found)), f"{launcher}: an option is given twice"
    return dict(found)


def _text(launcher: str) -> str:
    return (SLURM / f"{launcher}.sh").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def shellcheck() -> str:
    if shutil.which("shellcheck", path=SEARCH) is None and (reason := installed(["shellcheck"])):
        pytest.skip(reason)
    return shutil.which("shellcheck", path=SEARCH) or "shellcheck"


@pytest.mark.parametrize("name", SHELL)
def test_shellcheck_finds_nothing(name: str, shellcheck: str) -> None:
    done = subprocess.run(
        [shellcheck, "--shell=bash", name], cwd=SLURM, capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_a_launcher_is_a_header_and_one_line(launcher: str) -> None:
    first, *rest = _text(launcher).splitlines()
    assert first == "#!/bin/bash"
    ours = [line for line in rest if line.startswith("#SBATCH ")]
    assert rest[: len(ours)] == ours
    assert len(rest) == len(ours) + 1
    assert rest[-1].startswith(f"{BODY} ")
    assert rest[-1].endswith(' "$@"')


@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_a_launcher_goes_on_after_its_limit_and_loses_no_output(launcher: str) -> None:
    options = header(launcher)
    name, _, seconds = options["signal"].partition("@")
    assert name in {"USR1", "TERM"}, "the ranks get it, not the batch script (`B:`), which would hear it after srun"
    assert int(seconds) >= 60, "Slurm sends it up to a minute early or late"
    assert options["requeue"] == ""
    assert options["open-mode"] == "append"
    assert "%j" in options["output"] or "%A_%a" in options["output"]
    assert options["job-name"] == launcher


@pytest.mark.parametrize("size", PRETRAINING)
def test_pretraining_differs_in_nodes_alone(size: str) -> None:
    def shared(launcher: str) -> dict[str, str]:
        return {name: value for name, value in header(launcher).items() if name not in OWN_TO_A_SIZE}

    launcher = f"pretrain_{size}"
    assert shared(launcher) == shared("pretrain_806M")
    assert _text(launcher).splitlines()[-1] == f'{BODY} pretrain {size} "$@"'
    options = header(launcher)
    machine = machine_of("a100-40")
    assert int(options["ntasks-per-node"]) == int(options["gpus-per-node"]) == machine.gpus_per_node
    assert int(options["ntasks-per-node"]) * int(options["cpus-per-task"]) == 128
    assert options["constraint"] in {"gpu", "gpu&hbm80g"}


@pytest.mark.slow
@pytest.mark.parametrize("size", PRETRAINING)
def test_the_nodes_of_a_launcher_hold_its_model(size: str) -> None:
    options = header(f"pretrain_{size}")
    name = "a100-80" if "hbm80g" in options["constraint"] else "a100-40"
    config = load(PretrainConfig, find_preset("pretrain", size), [])
    ranks, micro_batch, accumulation = check_machine(config, int(options["nodes"]), name)
    assert ranks * micro_batch * accumulation == config.train.global_batch
    held = passes(config, find_window(config))
    for stage in (config.engine.zero_stage, 1):  # Perlmutter's site file asks for stage 1.
        engine = config.engine.model_copy(update={"zero_stage": stage})
        memory = rank_memory(held, layout(config), engine, ranks, micro_batch, accumulation)
        assert memory.total <= gpu(name).memory_bytes, stage


@pytest.fixture(scope="module")
def perlmutter() -> Iterator[Cluster]:
    """As many nodes as the largest launcher wants, and one without GPUs."""
    if reason := lacking(install=True):
        pytest.skip(reason)
    nodes = max(int(header(path.stem)["nodes"]) for path in SLURM.glob("*.sh") if "#SBATCH" in path.read_text(encoding="utf-8"))
    slurm = of_session(nodes, cpu_nodes=1)
    try:
        slurm.up()
        yield slurm
    finally:
        remove(slurm)


@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_slurm_takes_a_launcher_as_it_is(launcher: str, perlmutter: Cluster) -> None:
    account = {"SBATCH_ACCOUNT": "m1234", "SBATCH_QOS": "regular"}
    done = perlmutter.run("sbatch", "--test-only", SLURM / f"{launcher}.sh", "data.store=cohort.zarr", env=account, check=False)
    assert done.returncode == 0, done.stderr
    options = header(launcher)
    on = re.search(r"using (\d+) processors on nodes (\S+)", done.stderr)
    assert on is not None
    hosts = perlmutter.run("scontrol", "show", "hostnames", on[2]).stdout.split()
    assert len(hosts) == int(options["nodes"])
    assert set(hosts) <= set(perlmutter.cpu_nodes if options["constraint"] == "cpu" else perlmutter.gpu_nodes)
    assert int(on[1]) == len(hosts) * int(options["ntasks-per-node"]) * int(options["cpus-per-task"])


def test_slurm_does_not_take_what_is_not_there(perlmutter: Cluster) -> None:
    more = f"--nodes={len(perlmutter.gpu_nodes) + 1}"
    done = perlmutter.run("sbatch", "--test-only", more, SLURM / "pretrain_5M.sh", check=False)
    assert done.returncode != 0
    assert "not available" in done.stderr
