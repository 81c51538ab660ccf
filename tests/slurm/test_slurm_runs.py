"""The launchers on a real Slurm: whatever ends a job, it goes on by itself, with one writer, to the same weights."""

import os
import signal
import stat
import subprocess
import sys
import tarfile
import venv
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml
from cluster import Cluster, remove
from endings import assert_same_end
from launched import GEOMETRY, ROOT, Launched, environment
from ranks import swiftv2_run

from swiftv2.records import METRICS, newest_step, read_holder, read_metrics

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

TRAINED = 90.0
"""Seconds that the run that is ended four times has to go on for: Slurm takes half of them to see that its time is over."""
SAVES = ("train.save_every=100", "train.save_minutes=0.04", "train.keep_last=2", "train.deepspeed_files=false")
TWO_NODES = ("--nodes=2", "--ntasks-per-node=1")
ONE_NODE = ("--nodes=1", "--ntasks-per-node=1")


@pytest.fixture
def spare_cluster(cluster: Cluster) -> Iterator[Cluster]:
    """Another Slurm, of three nodes: one can be left out."""
    spare = Cluster(cluster.folder.with_name(f"{cluster.folder.name}-spare"), 3)
    try:
        spare.up()
        yield spare
    finally:
        remove(spare)


@pytest.mark.timeout(1200)
def test_a_run_that_is_ended_in_every_way_comes_to_the_weights_of_one_that_is_not(
    cluster: Cluster, real_store: Path, tmp_path: Path
) -> None:
    """5M over two nodes: its time limit, `scontrol requeue`, `scancel --signal`, a killed rank."""
    begin = ["pretrain", str(ROOT / "configs/pretrain/5M.yaml"), *GEOMETRY, f"data.store={real_store}"]
    tried = swiftv2_run([*begin, "train.max_steps=30", "train.save_minutes=0", f"run.dir={tmp_path / 'tried'}"], ranks=2)
    assert tried.returncode == 0, tried.stderr
    steps = max(150, round(TRAINED / read_metrics(tmp_path / "tried" / METRICS)[-1]["step_seconds"]))
    run = Launched(cluster, tmp_path / "run")
    run.submit(real_store, *SAVES, f"train.max_steps={steps}", options=TWO_NODES)
    run.goes_on(8)
    # Slurm looks at limits every half minute, and sends the header's USR1 at its first look.
    cluster.end_in(run.job, 120)
    cluster.wait(run.job, "PENDING", 90, restarts=1)
    # The limit stays with the job, and is now shorter than the warning before it.
    cluster.run("scontrol", "update", f"JobId={run.job}", "TimeLimit=2-00:00:00")
    cluster.wait(run.job, "RUNNING", 60, restarts=1)
    assert [row["signal"] for row in run.events("stopped")] == ["SIGUSR1"]
    run.goes_on(8)

    cluster.requeue(run.job)
    cluster.wait(run.job, "RUNNING", 60, restarts=2)
    run.goes_on(8)

    cluster.cancel(run.job, "USR1")
    cluster.wait(run.job, "RUNNING", 60, restarts=3)
    run.goes_on(8)

    os.kill(run.ranks("nid000002")[0], signal.SIGKILL)
    cluster.wait(run.job, "RUNNING", 90, restarts=4)
    cluster.wait(run.job, "COMPLETED", 3 * TRAINED)

    starts = run.events("job")
    assert [row["restart"] for row in starts] == [0, 1, 2, 3, 4]
    assert {row["job"] for row in starts} == {run.job}
    assert [row["restart"] for row in run.events("requeued")] == [0, 2, 3], "the operator's requeue was none of ours"
    assert [row["checkpoint"] for row in starts] == sorted(row["checkpoint"] for row in starts)
    assert len(run.events("start")) == 5
    assert len({row["nodes"] for row in starts}) == 1

    done = swiftv2_run(
        [*begin, *SAVES, f"train.max_steps={steps}", f"run.dir={tmp_path / 'undisturbed'}"], ranks=2, timeout=600
    )
    assert done.returncode == 0, done.stderr
    assert_same_end(run.run, tmp_path / "undisturbed", steps)


def test_a_run_whose_node_slurm_has_lost_sight_of_has_one_writer(cluster: Cluster, real_store: Path, tmp_path: Path) -> None:
    """The slurmd is killed, the rank lives on: it and its batch script end when the next start takes the run over."""
    run = Launched(cluster, tmp_path / "run")
    run.submit(real_store, *SAVES, "train.max_steps=100000", options=ONE_NODE)
    run.goes_on(8)
    node = cluster.record(run.job)["NodeList"]
    (orphan,) = run.ranks()
    cluster.kill_slurmd(node)
    cluster.set_down(node)
    cluster.wait(run.job, "RUNNING", 90, restarts=1)
    assert cluster.record(run.job)["NodeList"] != node
    run.until(lambda: len(run.events("start")) == 2, 90)
    run.until(lambda: not Path(f"/proc/{orphan}/stat").exists() or _is_zombie(orphan), 30)
    begun = run.events("start")[1]["time"]
    run.goes_on(8)
    late = [row for row in _rows(run) if row["attempt"] == 1 and row["time"] > begun]
    assert not late, "the former start wrote into the run of its successor"
    holder = read_holder(run.run / "lease.json")
    assert holder is not None
    assert (holder.attempt, holder.restart) == (2, 1)
    # Its batch script must not ask for another start of the job that now runs elsewhere.
    assert not run.events("requeued")
    assert int(cluster.record(run.job)["Restarts"]) == 1
    cluster.cancel(run.job)
    cluster.wait(run.job, "CANCELLED", 60)
    assert int(cluster.record(run.job)["Restarts"]) == 1, "who cancels a job does not want it back"


def test_a_run_that_comes_no_further_is_not_started_again(cluster: Cluster, real_store: Path, tmp_path: Path) -> None:
    run = Launched(cluster, tmp_path / "run")
    run.submit(real_store, "train.max_steps=100000", "train.save_minutes=0", "train.save_every=100000", options=ONE_NODE)
    run.until(lambda: run.step() > 5, 90)
    os.kill(run.ranks()[0], signal.SIGKILL)
    cluster.wait(run.job, "FAILED", 60)
    assert "no checkpoint was made since the job began" in cluster.output(run.job)
    assert newest_step(run.run) == 0


def test_a_run_is_started_again_at_most_so_often(cluster: Cluster, real_store: Path, tmp_path: Path) -> None:
    run = Launched(cluster, tmp_path / "run")
    run.submit(real_store, *SAVES, "train.max_steps=100000", options=ONE_NODE, env={"SWIFTV2_MOST_REQUEUES": "1"})
    run.goes_on(8)
    cluster.cancel(run.job, "USR1")
    cluster.wait(run.job, "RUNNING", 60, restarts=1)
    run.goes_on(8)
    cluster.cancel(run.job, "USR1")
    cluster.wait(run.job, "FAILED", 60)
    assert "as often as is allowed" in cluster.output(run.job)
    # What starts it once more stands in its folder.
    script = run.run / "resume.sh"
    again = cluster.run("bash", script, folder=tmp_path)
    run.job = again.stdout.split()[-1]
    run.goes_on(5)


def test_a_run_whose_warning_was_not_heard_goes_on_behind_its_limit(cluster: Cluster, real_store: Path, tmp_path: Path) -> None:
    """All that comes is Slurm's TERM at the limit."""
    run = Launched(cluster, tmp_path / "run")
    run.submit(real_store, *SAVES, "train.max_steps=100000", options=(*ONE_NODE, "--signal=CONT@1"))
    run.goes_on(8)
    cluster.end_in(run.job, 1)
    cluster.wait(run.job, "PENDING", 90, restarts=1)
    assert [row["signal"] for row in run.events("stopped")] == ["SIGTERM"]
    assert len(run.events("requeued")) == 1
    cluster.cancel(run.job)


def test_a_wrong_word_ends_the_job_before_its_ranks(cluster: Cluster, real_store: Path, tmp_path: Path) -> None:
    run = Launched(cluster, tmp_path / "run")
    for words, said in {
        ("train.max_step=3",): "did you mean train.max_steps?",
        ("train.global_batch=3", "train.micro_batch=null"): "cannot be split over 2 ranks",
    }.items():
        run.submit(real_store, *words, options=TWO_NODES)
        cluster.wait(run.job, "FAILED", 60)
        lines = cluster.output(run.job).splitlines()
        assert len(lines) == 1, lines
        assert said in lines[0]
        assert cluster.record(run.job)["ExitCode"] == "2:0"
        assert not run.run.exists()


def test_a_host_that_doctor_calls_sick_is_left_out(real_store: Path, tmp_path: Path, spare_cluster: Cluster) -> None:
    """Three nodes, of which the first does not see the store: the job goes on under its own id on the other two."""
    blind = tmp_path / "python"
    blind.write_text(
        f"""#!/bin/bash
case "$SLURMD_NODENAME $*" in
"nid000001 "*" doctor "*) set -- "$@" data.store={tmp_path}/no.zarr ;;
esac
exec {sys.executable} "$@"
"""
    )
    blind.chmod(blind.stat().st_mode | stat.S_IXUSR)
    run = Launched(spare_cluster, tmp_path / "run")
    run.submit(
        real_store,
        "train.max_steps=3",
        options=TWO_NODES,
        env={"SWIFTV2_PYTHON": str(blind), "SWIFTV2_DOCTOR": "quick"},
    )
    spare_cluster.wait(run.job, "COMPLETED", 150, restarts=1)
    (requeued,) = run.events("requeued")
    assert requeued["excluded"] == ["nid000001"]
    assert "store" in requeued["reason"]
    record = spare_cluster.record(run.job)
    assert (record["ExcNodeList"], record["NodeList"]) == ("nid000001", "nid[000002-000003]")
    assert len(run.events("finished")) == 1


def test_packages_are_read_from_the_node_itself(cluster: Cluster, real_store: Path, tmp_path: Path) -> None:
    """What every interpreter imports first leaves a trace of where it was read."""
    (tmp_path / "sitecustomize.py").write_text(
        "import os, pathlib\n"
        f"path = pathlib.Path({str(tmp_path)!r}) / f'read-on-{{os.environ[\"SLURMD_NODENAME\"]}}-{{os.getpid()}}'\n"
        "path.write_text(__file__)\n"
    )
    packages = tmp_path / "packages.tar"
    with tarfile.open(packages, "w") as tar:
        tar.add(tmp_path / "sitecustomize.py", "sitecustomize.py")
    local = tmp_path / "local"
    run = Launched(cluster, tmp_path / "run")
    extra = {"SWIFTV2_PACKAGES": str(packages), "SWIFTV2_NODE_LOCAL": str(local)}
    run.submit(real_store, "train.max_steps=2", options=TWO_NODES, env=extra)
    cluster.wait(run.job, "COMPLETED", 90)
    for node in ("nid000001", "nid000002"):
        origins = {path.read_text() for path in tmp_path.glob(f"read-on-{node}-*")}
        assert origins == {str(local / f"swiftv2-{run.job}" / node / "packages" / "sitecustomize.py")}
    run.submit(real_store, options=ONE_NODE, env=extra | {"SWIFTV2_PACKAGES": str(tmp_path / "none.tar")})
    cluster.wait(run.job, "FAILED", 30)
    assert "none.tar is not there" in cluster.output(run.job)


def test_an_interpreter_without_the_packages_is_told_in_one_line(cluster: Cluster, real_store: Path, tmp_path: Path) -> None:
    bare = tmp_path / "bare" / "bin" / "python"
    venv.create(bare.parents[1], with_pip=False)
    run = Launched(cluster, tmp_path / "run")
    run.submit(real_store, options=ONE_NODE, env={"SWIFTV2_PYTHON": str(bare)})
    cluster.wait(run.job, "FAILED", 30)
    (line,) = cluster.output(run.job).splitlines()
    assert "lacks packages of swiftv2" in line
    assert "SWIFTV2_PYTHON" in line


def test_an_element_of_an_array_is_requeued_alone(cluster: Cluster, real_store: Path, tmp_path: Path) -> None:
    """The last one, too, whose job has the number of the whole array."""
    sweep = {
        "config": "5M",
        "folder": "runs",
        "common": [*GEOMETRY, *SAVES, f"data.store={real_store}", "train.max_steps=100000"],
        "grid": {"run.seed": [0, 1]},
    }
    (tmp_path / "sweep.yaml").write_text(yaml.safe_dump(sweep))
    options = ("--array=0-1", *ONE_NODE)
    script = ROOT / "slurm" / "sweep.sh"
    job = cluster.submit(script, str(tmp_path / "sweep.yaml"), env=environment(), options=options, folder=tmp_path)
    runs = [Launched(cluster, tmp_path / "runs" / f"seed_{seed}") for seed in (0, 1)]
    for index, run in enumerate(runs):
        run.job = f"{job}_{index}"
    for run in runs:
        run.goes_on(5)
    cluster.cancel(f"{job}_1", "USR1")
    cluster.wait(f"{job}_1", "RUNNING", 60, restarts=1)
    runs[1].until(lambda: len(runs[1].events("start")) == 2, 60)
    assert int(cluster.record(f"{job}_0")["Restarts"]) == 0
    assert len(runs[0].events("start")) == 1


def test_a_store_is_built_by_ranks_of_mpi_and_goes_on(cluster: Cluster, tmp_path: Path) -> None:
    import nitime

    files = tmp_path / "files"
    files.mkdir()
    for index in (1, 2):
        (files / f"sub-{index}_bold.nii.gz").symlink_to(Path(nitime.__file__).parent / "data" / f"fmri{index}.nii.gz")
    words = (f"{files}/*.nii.gz", str(tmp_path / "real.zarr"), "--cohort", "nitime", "--tr", "1.35", "--salt", "0" * 32)
    grid = ("grid.kind=source", "grid.mask=box", "grid.space=native-nitime")
    script = ROOT / "slurm" / "store_build.sh"
    options = ("--ntasks-per-node=2",)
    job = cluster.submit(script, *words, *grid, env=environment(), options=options, folder=tmp_path)
    cluster.wait(job, "COMPLETED", 90)
    assert "built: 2 runs" in cluster.output(job)
    assert (
        subprocess.run(
            [sys.executable, "-m", "swiftv2", "store", "verify", str(tmp_path / "real.zarr")],
            cwd=ROOT,
            check=False,
            timeout=60,
        ).returncode
        == 0
    )
    job = cluster.submit(script, f"{files}/*.nii.gz", "--cohort", "nitime", env=environment(), options=options, folder=tmp_path)
    cluster.wait(job, "FAILED", 60)
    assert "give source and store first" in cluster.output(job)


def _rows(run: Launched) -> list[dict[str, float]]:
    from swiftv2.records import EVENTS, METRICS, read_lines

    return [*read_lines(run.run / METRICS), *read_lines(run.run / EVENTS)]


def _is_zombie(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()[0] == "Z"
    except OSError:
        return True
