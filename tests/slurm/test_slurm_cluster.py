"""What the launchers rely on, asked of a real Slurm."""

import re
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from cluster import READY, Cluster, ClusterError, remove
from daemons import name_of

Write = Callable[[str], Path]
NODES = ["nid000001", "nid000002"]


@pytest.fixture
def script(tmp_path: Path) -> Write:
    """Writes a batch script whose output is below the test's folder."""

    def write(body: str) -> Path:
        path = tmp_path / "job.sh"
        header = f"#SBATCH --time=5 --open-mode=append --requeue --output={tmp_path}/job.out"
        path.write_text(f"#!/bin/bash\n{header}\n{body}", encoding="utf-8")
        return path

    return write


def test_a_job_runs_on_two_nodes_under_names_of_their_own(cluster: Cluster, script: Write) -> None:
    job = cluster.submit(
        script('srun bash -c \'echo "$SLURM_PROCID $SLURMD_NODENAME $1 $MARK"\' _ "$1"\n'),
        "a word",
        env={"MARK": "x"},
        options=["--nodes=2"],
    )
    cluster.wait(job, "COMPLETED")
    assert sorted(cluster.output(job).splitlines()) == ["0 nid000001 a word x", "1 nid000002 a word x"]


def test_a_node_has_four_gpus_for_its_ranks_to_share(cluster: Cluster, script: Write) -> None:
    options = ["--gpus-per-node=4", "--ntasks-per-node=2", "--constraint=gpu&hbm80g"]
    job = cluster.submit(script("srun printenv CUDA_VISIBLE_DEVICES\n"), options=options)
    cluster.wait(job, "COMPLETED")
    assert cluster.output(job).split() == ["0,1,2,3", "0,1,2,3"]


def test_the_end_of_a_job_is_for_slurm_to_tell_and_not_in_its_environment(cluster: Cluster, script: Write) -> None:
    asked = 'SLURM_TIME_FORMAT=%s squeue --noheader --jobs "$SLURM_JOB_ID" --format %e'
    job = cluster.submit(script(f'echo "${{SLURM_JOB_END_TIME:-unset}} $(( $({asked}) - $(date +%s) ))"\n'))
    cluster.wait(job, "COMPLETED")
    told, left = cluster.output(job).split()
    assert told == "unset"
    assert 240 < int(left) <= 300


def test_an_empty_variable_takes_a_constraint_of_the_header_away(cluster: Cluster, script: Write) -> None:
    path = script("#SBATCH --constraint=nosuch\ntrue\n")
    with pytest.raises(ClusterError, match="Invalid feature"):
        cluster.submit(path)
    job = cluster.submit(path, env={"SBATCH_CONSTRAINT": ""})
    assert cluster.wait(job, "COMPLETED") == "COMPLETED"


REQUEUES_ITSELF = """\
echo "attempt ${SLURM_RESTART_COUNT:-0} of $SLURM_JOB_ID on $SLURMD_NODENAME"
[ -n "$SLURM_RESTART_COUNT" ] && exit 0
trap '' TERM
scontrol requeue "$SLURM_JOB_ID" && scontrol update "JobId=$SLURM_JOB_ID" "ExcNodeList=$SLURMD_NODENAME" && echo both
sleep 60
echo never
"""


@pytest.mark.slow
def test_a_job_requeues_itself_under_its_own_id_and_leaves_its_node_out(cluster: Cluster, script: Write) -> None:
    job = cluster.submit(script(REQUEUES_ITSELF))
    cluster.wait(job, "COMPLETED", restarts=1)
    lines = [line for line in cluster.output(job).splitlines() if not line.startswith("slurmstepd")]
    assert lines == [f"attempt 0 of {job} on nid000001", "both", f"attempt 1 of {job} on nid000002"]


TRAPS = """\
trap 'echo batch $?' USR1
srun bash -c 'trap "echo rank; exit 75" USR1; echo ready; while :; do sleep 0.1; done' &
wait $!
echo "srun $?"
"""


def test_a_signal_to_a_job_reaches_its_ranks_and_not_its_batch_script(cluster: Cluster, script: Write) -> None:
    job = cluster.submit(script(TRAPS))
    _until(lambda: "ready" in cluster.output(job))
    cluster.cancel(job, "USR1")
    cluster.wait(job, "COMPLETED")
    said = cluster.output(job)
    assert "batch" not in said
    assert "rank\n" in said
    assert "srun 75" in said


LIVES_ON = """\
echo "attempt ${SLURM_RESTART_COUNT:-0} on $SLURMD_NODENAME"
[ -n "$SLURM_RESTART_COUNT" ] && exit 0
srun sleep 120
record=$(scontrol show job --oneliner "$SLURM_JOB_ID")
echo "first attempt: $(grep -oE 'JobState=[A-Z]*' <<<"$record") $(grep -oE 'Restarts=[0-9]*' <<<"$record")"
sleep 120
"""


@pytest.mark.slow
def test_a_node_whose_slurmd_is_killed_goes_down_and_its_job_starts_again_elsewhere(cluster: Cluster, script: Write) -> None:
    job = cluster.submit(script(LIVES_ON))
    _until(lambda: "sleep" in map(name_of, cluster.processes(job)))
    cluster.kill_slurmd("nid000001")
    cluster.wait(job, "COMPLETED", 120, restarts=1)
    # Slurm gave the job another node while rank and batch script of its first attempt live on where it lost sight of them ...
    assert [name_of(pid) for pid in cluster.processes(job, "nid000001")].count("sleep") == 2
    # ... and srun there ends. That this is no longer the job's attempt can be asked, and must be.
    said = cluster.output(job)
    told = re.search(r"first attempt: JobState=(\w+) Restarts=(\d+)", said)
    assert told is not None
    assert told.groups() != ("RUNNING", "0")
    assert said.splitlines()[-1] == "attempt 1 on nid000002"


@pytest.mark.slow
def test_a_node_without_power_loses_its_processes_and_comes_back(cluster: Cluster, script: Write) -> None:
    body = 'echo "attempt ${SLURM_RESTART_COUNT:-0}"\n[ -n "$SLURM_RESTART_COUNT" ] || srun sleep 120\n'
    job = cluster.submit(script(body), options=["--nodes=2"])
    _until(lambda: len(_nodes_of(cluster, job)) == len(NODES))
    cluster.lose_node("nid000002")
    assert _nodes_of(cluster, job) == {"nid000001"}
    cluster.set_down("nid000002")
    cluster.wait(job, "PENDING", restarts=1)
    cluster.start_slurmd("nid000002")
    cluster.wait(job, "COMPLETED")
    assert cluster.output(job).splitlines()[-1] == "attempt 1"


def test_ranks_of_mpi_find_each_other_under_srun(cluster: Cluster, script: Write) -> None:
    if "pmi2" not in cluster.run("srun", "--mpi=list").stdout:
        pytest.skip("this srun knows no pmi2")
    program = "from mpi4py.MPI import COMM_WORLD as world; print(world.allgather(world.rank))"
    job = cluster.submit(script(f"srun --mpi=pmi2 '{sys.executable}' -c '{program}'\n"), options=["--nodes=2"])
    cluster.wait(job, "COMPLETED")
    assert cluster.output(job).splitlines() == ["[0, 1]", "[0, 1]"]


def test_a_job_can_end_within_a_minute(cluster: Cluster, script: Write) -> None:
    job = cluster.submit(script("exec sleep 120\n"))
    cluster.wait(job, "RUNNING")
    cluster.end_in(job, 3)
    asked = cluster.run("squeue", "--noheader", f"--jobs={job}", "--format=%e", env={"SLURM_TIME_FORMAT": "%s"})
    assert abs(int(asked.stdout) - time.time()) < 5


def test_a_second_cluster_does_not_meddle_and_leaves_nothing(cluster: Cluster, tmp_path: Path) -> None:
    other = Cluster(cluster.folder.with_name(f"{cluster.folder.name}-other"), nodes=1)
    try:
        other.up()
        (tmp_path / "sleep.sh").write_text("#!/bin/bash\nsleep 120\n", encoding="utf-8")
        job = other.submit(tmp_path / "sleep.sh", folder=tmp_path)
        other.wait(job, "RUNNING")
        _until(lambda: other.processes(job) != [])
        left = [pid for pid in other.processes() if name_of(pid)]
        other.down()
        assert left
        assert not [pid for pid in left if name_of(pid)]
        assert {cluster.node_state(node) for node in NODES} <= READY
    finally:
        remove(other)


def _nodes_of(cluster: Cluster, job: str) -> set[str]:
    return {node for node in NODES if cluster.processes(job, node)}


def _until(condition: Callable[[], bool], seconds: float = 30.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.1)
