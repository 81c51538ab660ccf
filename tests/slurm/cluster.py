"""A real Slurm (Debian's slurm-wlm 22.05) on one host: nodes shaped like Perlmutter's GPU nodes, all below one folder.

    python tests/slurm/cluster.py up [--folder F] [--install]
    python tests/slurm/cluster.py status | down [--folder F]

What was found about it, and holds for tests: a requeued job starts again after about 10 s (KillWait, then the 5 s until its
credentials have expired). A node whose slurmd is gone is DOWN about 25 s later, whatever SlurmdTimeout says. Time limits are
whole minutes, but `end_in` moves the end of a running job to the second; slurmctld looks at ends every 30 s, so that a limit
takes effect up to 30 s late, and `--signal=USR1@N` at the first look with less than N + 30 s to go. Accounts and QOS are taken
as they come, unenforced. There is no accounting: sacct does not answer.
"""

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from datetime import datetime, timedelta
from pathlib import Path

import daemons

ENDED = {"COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "OUT_OF_MEMORY", "BOOT_FAIL", "DEADLINE", "PREEMPTED"}
READY = {"idle", "mixed", "allocated"}
OF_SLURM = ("SLURM", "SBATCH_", "SRUN_", "SQUEUE_", "SINFO_", "SCANCEL_", "SCONTROL_", "SALLOC_")
PREFIX = "swiftv2-slurm-"
FIELD = re.compile(r"(?:^| )([A-Z][\w:/&]*)=")


class ClusterError(RuntimeError):
    """A Slurm command failed, or something did not happen in time; the message holds what the logs say."""


class Cluster:
    """One Slurm below a folder; any number can run side by side, each on ports of its own."""

    def __init__(self, folder: Path, nodes: int = 2, cpu_nodes: int = 0) -> None:
        self.folder = folder.absolute()
        self.gpu_nodes = [f"nid{index:06}" for index in range(1, 1 + nodes)]
        self.cpu_nodes = [f"nid{index:06}" for index in range(4001, 4001 + cpu_nodes)]
        self.nodes = [*self.gpu_nodes, *self.cpu_nodes]
        self.conf = self.folder / "etc" / "slurm.conf"

    # Daemons

    def up(self, install: bool = False) -> None:
        """Start what does not run yet, and wait until every node is there: about a second.

        Args:
            install: whether missing Debian packages are to be installed first.

        Raises:
            ClusterError: something lacks, a daemon did not start, or a node did not come.
        """
        if reason := daemons.lacking(install):
            raise ClusterError(reason)
        if len(str(self.folder)) > daemons.LONGEST_FOLDER:
            raise ClusterError(
                f"{self.folder} is too long for the sockets below it: {daemons.LONGEST_FOLDER} characters at most"
            )
        running = self._running("slurmctld.pid", "slurmctld")
        if not running:
            self.down()
            shutil.rmtree(self.folder / "state", ignore_errors=True)
            shutil.rmtree(self.folder / "spool", ignore_errors=True)
            daemons.configure(self.folder, self.gpu_nodes, self.cpu_nodes)
        if not self._running("munge/pid", "munged"):
            files = {"key-file": "munge/key", "socket": "munge/socket", "pid-file": "munge/pid", "seed-file": "munge/seed"}
            places = [f"--{option}={self.folder / name}" for option, name in files.items()]
            self._start("munged", "--force", *places, f"--log-file={self.folder}/log/munged.log")
        if not running:
            self._start("slurmctld", "-f", str(self.conf))
        for node in self.nodes:
            self._start_node(node)
        self._until(self._complete, 30, "the nodes did not come up")

    def _complete(self) -> bool:
        """Whether every node has come and answers."""
        states = self.run("sinfo", "--noheader", "--Node", "--format=%T", check=False).stdout.split()
        return len(states) == len(self.nodes) and all(state.isalpha() and state != "unknown" for state in states)

    def down(self) -> None:
        """End all that belongs to this cluster, jobs included; what others started stays."""
        ours = [self._running("slurmctld.pid", "slurmctld"), *(self._running(f"{node}.pid", "slurmd") for node in self.nodes)]
        daemons.stop(pid for pid in ours if pid)
        while left := self.processes():
            daemons.stop(left, 0)
        munged = self._running("munge/pid", "munged")
        daemons.stop([munged] if munged else [])

    def _running(self, pid_file: str, name: str) -> int | None:
        try:
            pid = int((self.folder / pid_file).read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return None
        # The number may by now be that of another program, or of another cluster's daemon.
        ours = daemons.name_of(pid) == name and daemons.variables(pid).get("SLURM_CONF") == str(self.conf)
        return pid if ours else None

    def _start(self, name: str, *words: str) -> None:
        done = subprocess.run(
            [daemons.program(name), *words],
            env=self.environment(),
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=30,
            check=False,
        )
        if done.returncode:
            raise ClusterError(f"{name} did not start: {(done.stderr or done.stdout).strip()}\n{self.logs()}")

    def _start_node(self, node: str) -> None:
        if not self._running(f"{node}.pid", "slurmd"):
            self._start("slurmd", "-N", node, "-f", str(self.conf))

    # Commands

    def environment(self) -> dict[str, str]:
        """This process's environment without another Slurm's variables, and with this cluster's."""
        kept = {name: value for name, value in os.environ.items() if not name.startswith(OF_SLURM)}
        return kept | {"SLURM_CONF": str(self.conf), "PATH": daemons.SEARCH}

    def run(
        self,
        *command: str | Path,
        seconds: float = 30.0,
        env: Mapping[str, str] | None = None,
        folder: Path | None = None,
        check: bool = True,
    ) -> subprocess.CompletedProcess[str]:
        """Run any command against this cluster.

        Args:
            command: its words.
            seconds: how long it may take.
            env: variables beside the environment's.
            folder: working directory; by default one of the cluster's own.
            check: whether a status other than 0 is an error.

        Raises:
            ClusterError: it failed; the message holds what it said.
            subprocess.TimeoutExpired: it took longer.
        """
        words = [str(word) for word in command]
        done = subprocess.run(
            words,
            env=self.environment() | dict(env or {}),
            cwd=folder or self.folder / "jobs",
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=seconds,
            check=False,
        )
        if check and done.returncode:
            raise ClusterError(f"`{' '.join(words)}` ended with {done.returncode}: {(done.stderr or done.stdout).strip()}")
        return done

    def submit(
        self,
        script: Path,
        *words: str,
        env: Mapping[str, str] | None = None,
        options: Sequence[str] = (),
        folder: Path | None = None,
    ) -> str:
        """Hand a batch script to sbatch.

        Args:
            script: the file.
            words: what the script gets.
            env: variables beside the environment's; sbatch passes all of them on to the job.
            options: words for sbatch itself, such as `--nodes=2`; they go before a header's.
            folder: where sbatch is called: the job's SLURM_SUBMIT_DIR, and where its output goes by default.

        Returns:
            The job's id.
        """
        return self.run("sbatch", "--parsable", *options, script, *words, env=env, folder=folder).stdout.strip().split(";")[0]

    # Jobs

    def records(self, job: str) -> list[dict[str, str]]:
        """What Slurm knows of a job: for an array one record for each element that has started, and one for those that wait."""
        lines = self.run("scontrol", "show", "job", "--oneliner", job).stdout.splitlines()
        return [_fields(line) for line in lines if line.strip()]

    def record(self, job: str) -> dict[str, str]:
        """What Slurm knows of one job, such as JobState, Restarts, NodeList, BatchHost, StdOut, EndTime, ExcNodeList."""
        return self.records(job)[0]

    def state(self, job: str) -> str:
        """PENDING, RUNNING, COMPLETING, COMPLETED, FAILED, CANCELLED, TIMEOUT, NODE_FAIL ..."""
        return self.record(job)["JobState"]

    def output(self, job: str) -> str:
        """What the job's batch script and ranks have printed so far, over all attempts that appended to the file."""
        try:
            return Path(self.record(job)["StdOut"]).read_text(encoding="utf-8", errors="replace")
        except OSError:
            return ""

    def wait(self, job: str, states: str | Collection[str], seconds: float = 60.0, restarts: int = 0) -> str:
        """Wait until a job is in one of these states.

        Args:
            job: its id.
            states: one or several, such as "RUNNING".
            seconds: how long at most.
            restarts: only from the attempt on that Slurm has restarted so often.

        Returns:
            The state reached.

        Raises:
            ClusterError: the time is over, or the job came to another end; the message holds its output.
        """
        wanted = {states} if isinstance(states, str) else set(states)
        end = time.monotonic() + seconds
        while True:
            record = self.record(job)
            state = record["JobState"]
            if state in wanted and int(record["Restarts"]) >= restarts:
                return state
            if state in ENDED:
                raise ClusterError(f"job {job} is {state}, not {' or '.join(sorted(wanted))}\n{self.report(job)}")
            if time.monotonic() > end:
                raise ClusterError(f"job {job} is {state} after {seconds:.0f} s: {record.get('Reason')}\n{self.report(job)}")
            time.sleep(0.2)

    def requeue(self, job: str) -> None:
        """What an operator's `scontrol requeue` does: TERM, KILL after KillWait (5 s), and the same id again."""
        self.run("scontrol", "requeue", job)

    def cancel(self, job: str, signal: str | None = None, options: Sequence[str] = ()) -> None:
        """End a job, or send a signal, such as "USR1", to its ranks (`--batch`: to its batch script, `--full`: to both)."""
        self.run("scancel", *([f"--signal={signal}"] if signal else []), *options, job)

    def end_in(self, job: str, seconds: float) -> None:
        """Move a running job's end: the limit takes effect 0 to 30 s after it, `--signal=USR1@N` N to N + 30 s before."""
        end = datetime.now().astimezone() + timedelta(seconds=seconds)
        self.run("scontrol", "update", f"JobId={job}", f"EndTime={end:%Y-%m-%dT%H:%M:%S}")

    def processes(self, job: str | None = None, node: str | None = None) -> list[int]:
        """Living processes of jobs, or of one job or node; without either also Slurm's own that watch over them."""
        found = []
        for pid in daemons.all_processes():
            about = daemons.variables(pid)
            if about.get("SLURM_CONF") != str(self.conf) or not (name := daemons.name_of(pid)):
                continue
            watcher = name.startswith("slurmstepd") and job is None and node is None
            of_job = "SLURM_JOB_ID" in about and job in {None, about["SLURM_JOB_ID"]}
            if watcher or (of_job and node in {None, about.get("SLURMD_NODENAME")}):
                found.append(pid)
        return found

    # Nodes

    def node_state(self, node: str) -> str:
        """Such as idle, mixed, allocated, completing, down, drained; `*` after it where the node does not answer."""
        return self.run("sinfo", "--noheader", f"--nodes={node}", "--format=%T").stdout.strip()

    def wait_node(self, node: str, states: str | Collection[str], seconds: float = 60.0) -> None:
        """Wait until a node is in one of these states, such as "idle" or "down"; `*` does not count."""
        wanted = {states} if isinstance(states, str) else set(states)
        message = f"{node} was {self.node_state(node)}, and never {' or '.join(sorted(wanted))}"
        self._until(lambda: self.node_state(node).rstrip("*") in wanted, seconds, message)

    def kill_slurmd(self, node: str) -> None:
        """SIGKILL to a node's slurmd alone, as when a node is cut off: the ranks there, and a batch script, live on."""
        pid = self._running(f"{node}.pid", "slurmd")
        daemons.stop([pid] if pid else [], 0)

    def lose_node(self, node: str) -> None:
        """SIGKILL to all that runs on a node, as when its power fails."""
        self.kill_slurmd(node)
        self._clear(node)

    def set_down(self, node: str) -> None:
        """Tell Slurm that a node is down, which it would find out by itself some 25 s after `kill_slurmd`."""
        self.run("scontrol", "update", f"NodeName={node}", "State=DOWN", "Reason=lost")

    def start_slurmd(self, node: str) -> None:
        """Bring a node back as after a reboot: what earlier jobs left there is gone, and it takes jobs again.

        A slurmd that finds processes of a job's earlier attempt refuses the next one, which then ends as FAILED.
        """
        if not self._running(f"{node}.pid", "slurmd"):
            self._clear(node)
            self._start_node(node)
            self._until(lambda: not self.node_state(node).endswith("*"), 30, f"{node} did not come back")

        def takes_jobs() -> bool:
            if not self.node_state(node).startswith(("down", "drain")):
                return True
            # Slurm may take it back by itself meanwhile, and then refuses the word.
            self.run("scontrol", "update", f"NodeName={node}", "State=RESUME", check=False)
            return False

        self._until(takes_jobs, 30, f"{node} takes no jobs")

    def _clear(self, node: str) -> None:
        while left := self.processes(node=node):
            watchers = {above for pid in left if daemons.name_of(above := daemons.parent(pid)).startswith("slurmstepd")}
            daemons.stop([*watchers, *left], 0)

    # For tests

    def calm(self) -> None:
        """Cancel all jobs, bring all nodes back and wait until nothing is left of any: so each test begins."""
        self.run("scancel", f"--user={os.getuid()}", check=False)
        daemons.stop((pid for pid in self.processes() if not daemons.name_of(pid).startswith("slurmstepd")), 0)
        for node in self.nodes:
            self.start_slurmd(node)
        # A node that is asked often may be told of as `mixed` long after its last job: jobs tell when all is over.
        self._until(lambda: not self._busy(), 60, "jobs did not end")

    def _busy(self) -> str:
        """Jobs that wait, run or are being ended, and nodes that do not answer or take no jobs."""
        jobs = self.run("squeue", "--noheader", "--format=%i %T").stdout
        nodes = (f"{node} {state}" for node in self.nodes if (state := self.node_state(node)) not in READY)
        return f"{jobs}{' '.join(nodes)}".strip()

    def report(self, job: str) -> str:
        """A job's record, the end of its output and of the logs, for the message of a failed test."""
        told = "\n".join(" ".join(f"{key}={value}" for key, value in record.items()) for record in self.records(job))
        return f"{told}\n--- output\n{_end(self.output(job))}\n{self.logs()}"

    def logs(self) -> str:
        """The ends of the daemons' logs."""
        files = sorted((self.folder / "log").glob("*.log"))
        return "\n".join(f"--- {file.name}\n{_end(file.read_text(encoding='utf-8', errors='replace'), 15)}" for file in files)

    def _until(self, condition: Callable[[], bool], seconds: float, message: str) -> None:
        end = time.monotonic() + seconds
        while not condition():
            if time.monotonic() > end:
                raise ClusterError(f"{message} within {seconds:.0f} s\n{self.logs()}")
            time.sleep(0.1)


def _fields(line: str) -> dict[str, str]:
    """The fields of a line of `scontrol --oneliner`; values may hold blanks."""
    parts = FIELD.split(line.strip())
    return dict(zip(parts[1::2], (value.strip() for value in parts[2::2]), strict=True))


def _end(text: str, lines: int = 40) -> str:
    return "\n".join(text.splitlines()[-lines:])


def of_session(nodes: int = 2, cpu_nodes: int = 0) -> Cluster:
    """A cluster for this process, in a folder that names it; what processes that are gone left running is ended first."""
    place = Path(tempfile.gettempdir())
    for old in place.glob(f"{PREFIX}*-*"):
        number = old.name.removeprefix(PREFIX).partition("-")[0]
        if number.isdigit() and not daemons.name_of(int(number)):
            remove(Cluster(old))
    return Cluster(Path(tempfile.mkdtemp(prefix=f"{PREFIX}{os.getpid()}-", dir=place)), nodes, cpu_nodes)


def remove(cluster: Cluster) -> None:
    """End a cluster and delete its folder."""
    cluster.down()
    shutil.rmtree(cluster.folder, ignore_errors=True)


def main(words: Sequence[str]) -> int:
    """The command line; 0 where it could do what was asked, for `status` where every node answers."""
    parser = argparse.ArgumentParser(description="a Slurm of two pretended GPU nodes on this host, as root")
    parser.add_argument("do", choices=("up", "down", "status"))
    parser.add_argument(
        "--folder", type=Path, default=Path(tempfile.gettempdir()) / "swiftv2-slurm", help="where all of it lies"
    )
    parser.add_argument("--install", action="store_true", help="install missing Debian packages first, by apt-get")
    arguments = parser.parse_args(words)
    cluster = Cluster(arguments.folder)
    try:
        if arguments.do == "down":
            cluster.down()
            return 0
        if arguments.do == "up":
            cluster.up(arguments.install)
        done = cluster.run("sinfo", "--Node", "--format=%N %T %c %m %G %f", folder=Path("/"))
    except (ClusterError, OSError, subprocess.TimeoutExpired) as error:
        sys.stderr.write(f"cluster: {error}\n")
        return 1
    sys.stdout.write(f"{done.stdout}export SLURM_CONF={cluster.conf}\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
