"""The daemons of a Slurm on one host: what they need, their settings, and processes that belong to them."""

import contextlib
import fcntl
import os
import random
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterable, Sequence
from pathlib import Path

PROGRAMS = {"slurmctld": "slurmctld", "slurmd": "slurmd", "sbatch": "slurm-client", "munged": "munge"}
"""Each program that is needed, and its package in Debian."""
SEARCH = os.pathsep.join([os.environ.get("PATH", os.defpath), "/usr/sbin", "/sbin"])
"""Where programs are looked for: daemons lie in folders that not every PATH holds."""
LONGEST_FOLDER = 60
"""Characters: sockets lie below the folder, and no path of a socket is longer than 107."""

SETTINGS = """\
ClusterName=local
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={port}
SlurmUser=root
AuthType=auth/munge
# A requeued job waits until its credentials have expired: two minutes by default.
AuthInfo=socket={folder}/munge/socket,cred_expire=5
CredType=cred/munge
MpiDefault=none
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SwitchType=switch/none
ReturnToService=2
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/%n.pid
SlurmdSpoolDir={folder}/spool/%n
StateSaveLocation={folder}/state
SlurmctldLogFile={folder}/log/slurmctld.log
SlurmdLogFile={folder}/log/%n.log
SlurmdParameters=config_overrides
SchedulerType=sched/backfill
SchedulerParameters=sched_interval=2,bf_interval=2,sched_min_interval=100000,requeue_delay=1
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
GresTypes=gpu
JobRequeue=1
KillWait=5
MinJobAge=86400
SlurmctldTimeout=120
SlurmdTimeout=10
Licenses=scratch:1000,cfs:1000
AccountingStorageType=accounting_storage/none
NodeName=DEFAULT CoresPerSocket=64 ThreadsPerCore=2
PartitionName=gpu Nodes=ALL Default=YES MaxTime=2-00:00:00 DefaultTime=10 OverSubscribe=NO
"""
NODE = "NodeName={name} NodeHostname={host} NodeAddr=127.0.0.1 Port={port} {kind}\n"
GPU_KIND = "Sockets=1 RealMemory=229992 Gres=gpu:a100:4 Feature=gpu,a100,hbm80g"
CPU_KIND = "Sockets=2 RealMemory=512000 Feature=cpu"
DEVICES = "NodeName={name} Name=gpu Type=a100 File={folder}/devices/nvidia[0-3]\n"
NO_CONTROL_GROUPS = "CgroupPlugin=cgroup/v1\nConstrainCores=no\nConstrainDevices=no\nConstrainRAMSpace=no\n"


def program(name: str) -> str:
    """Where a program is.

    Raises:
        FileNotFoundError: it is not installed.
    """
    found = shutil.which(name, path=SEARCH)
    if found is None:
        raise FileNotFoundError(f"{name} is not installed")
    return found


def lacking(install: bool = False) -> str | None:
    """Why no Slurm can be started here, in one line; None where one can.

    Args:
        install: whether missing Debian packages are to be installed first.
    """
    if os.geteuid() != 0:
        return "a local Slurm needs root: its daemons start jobs for their users"
    missing = [name for name in PROGRAMS if shutil.which(name, path=SEARCH) is None]
    packages = sorted({PROGRAMS[name] for name in missing})
    if not missing:
        return None
    if not install:
        return f"{', '.join(missing)} not installed (Debian: apt-get install {' '.join(packages)})"
    return installed(packages)


def installed(packages: Sequence[str]) -> str | None:
    """Install Debian packages; why that could not be, in one line, else None."""
    if os.geteuid() != 0 or shutil.which("apt-get") is None:
        return f"{' '.join(packages)} not installed, and only root with apt-get can do so"
    # Two sessions of tests may begin at once, and apt-get waits for nobody.
    with (Path(tempfile.gettempdir()) / "swiftv2-apt.lock").open("w", encoding="ascii") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        return _installed(packages)


def _installed(packages: Sequence[str]) -> str | None:
    # RUNLEVEL=1 keeps packages from starting services of their own.
    quiet = os.environ | {"DEBIAN_FRONTEND": "noninteractive", "RUNLEVEL": "1"}
    for words in (["update"], ["install", "--yes", "--no-install-recommends", *packages]):
        command = ["apt-get", "-qq", "-o", "Acquire::http::Timeout=20", *words]
        try:
            done = subprocess.run(command, env=quiet, capture_output=True, text=True, timeout=300, check=False)
        except subprocess.TimeoutExpired:
            return f"{' '.join(packages)} not installed: `apt-get {words[0]}` took longer than 300 s"
        if done.returncode:
            last = (done.stderr.strip() or done.stdout.strip() or f"exit status {done.returncode}").splitlines()[-1]
            return f"{' '.join(packages)} not installed: `apt-get {words[0]}` says {last}"
    return None


def free_ports(count: int) -> list[int]:
    """Ports of this host that nobody listens on, below those that the kernel gives to outgoing connections."""
    found: list[int] = []
    with contextlib.ExitStack() as held:
        for port in random.SystemRandom().sample(range(20000, 32000), 200):
            one = held.enter_context(socket.socket())
            with contextlib.suppress(OSError):
                one.bind(("127.0.0.1", port))
                found.append(port)
            if len(found) == count:
                break
    return sorted(found)


def configure(folder: Path, gpu_nodes: Sequence[str], cpu_nodes: Sequence[str]) -> None:
    """Write settings, a key and pretended devices for so many nodes below a folder, on ports that are free now."""
    nodes = [*gpu_nodes, *cpu_nodes]
    for name in ("etc", "log", "state", "munge", "devices", "jobs", *(f"spool/{node}" for node in nodes)):
        (folder / name).mkdir(parents=True, exist_ok=True)
    for index in range(4):
        device = folder / "devices" / f"nvidia{index}"
        if not device.is_symlink():
            device.symlink_to("/dev/null")
    key = folder / "munge" / "key"
    key.unlink(missing_ok=True)
    key.touch(mode=0o600)
    key.write_bytes(os.urandom(128))
    port, *ports = free_ports(1 + len(nodes))
    host = socket.gethostname().split(".")[0]
    settings = SETTINGS.format(folder=folder, host=host, port=port)
    for name, its_port in zip(nodes, ports, strict=True):
        kind = GPU_KIND if name in gpu_nodes else CPU_KIND
        settings += NODE.format(name=name, host=host, port=its_port, kind=kind)
    devices = "AutoDetect=off\n" + "".join(DEVICES.format(name=name, folder=folder) for name in gpu_nodes)
    (folder / "etc" / "gres.conf").write_text(devices, encoding="utf-8")
    (folder / "etc" / "cgroup.conf").write_text(NO_CONTROL_GROUPS, encoding="utf-8")
    (folder / "etc" / "slurm.conf").write_text(settings, encoding="utf-8")


def variables(pid: int) -> dict[str, str]:
    """The environment that a process was started with; empty when it is gone."""
    try:
        pairs = Path(f"/proc/{pid}/environ").read_bytes().decode(errors="replace").split("\0")
    except OSError:
        return {}
    return dict(pair.split("=", 1) for pair in pairs if "=" in pair)


def name_of(pid: int) -> str:
    """The program that a process runs; empty when it is gone or only waits for its parent to notice its end."""
    try:
        comm, _, rest = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8").partition("(")[2].rpartition(")")
    except OSError:
        return ""
    return "" if rest.split()[0] in {"Z", "X"} else comm


def parent(pid: int) -> int:
    """The process that started this one; 0 when there is none or it is gone."""
    try:
        return int(Path(f"/proc/{pid}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()[1])
    except OSError:
        return 0


def all_processes() -> list[int]:
    """Every process of this host that this one can see."""
    return [int(entry.name) for entry in Path("/proc").iterdir() if entry.name.isdigit()]


def stop(pids: Iterable[int], seconds: float = 5.0) -> None:
    """End processes: SIGTERM, and SIGKILL for those that live so many seconds later (0: SIGKILL at once)."""
    left = list(pids)
    for number, patience in ((signal.SIGTERM, seconds), (signal.SIGKILL, 5.0)):
        if patience:
            for pid in left:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, number)
        end = time.monotonic() + patience
        while (left := [pid for pid in left if name_of(pid)]) and time.monotonic() < end:
            time.sleep(0.05)
