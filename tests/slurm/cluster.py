"""A SLURM cluster of two nodes on this host, as root and without systemd: real daemons, everything in one folder.

Written for Debian's slurm-wlm 22.05. Both nodes have this host's name, and an address and a daemon each.
"""

from __future__ import annotations

import contextlib
import os
import re
import secrets
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "sinfo", "scontrol")
PACKAGES = "slurm-wlm munge"
_PATH = f"/usr/sbin:/sbin:{os.environ['PATH']}"


def missing() -> str | None:
    """Says why no cluster can be started here; None when one can."""
    lacking = [name for name in PROGRAMS if shutil.which(name, path=_PATH) is None]
    if lacking:
        return f"{', '.join(lacking)} not found: install Debian's {PACKAGES} (make test-slurm does as root)"
    return None if os.geteuid() == 0 else "the daemons of a cluster on one host need root"


@dataclass(frozen=True)
class Cluster:
    """A running cluster."""

    folder: Path

    @property
    def environment(self) -> dict[str, str]:
        kept = {name: value for name, value in os.environ.items() if not name.startswith(("SLURM_", "OPD_MEGATRON_"))}
        return kept | {"SLURM_CONF": str(self.folder / "slurm.conf"), "PATH": _PATH}

    def run(self, *command: str, cwd: Path | None = None, **variables: str) -> str:
        """Runs one of SLURM's commands; returns what it prints."""
        done = subprocess.run(
            command, env=self.environment | variables, cwd=cwd, capture_output=True, text=True, timeout=60, check=False
        )
        assert done.returncode == 0, f"{command}: {done.stdout}{done.stderr}"
        return done.stdout

    def submit(self, *words: str, cwd: Path, **variables: str) -> int:
        """Submits a batch job from `cwd`; returns its number."""
        return int(self.run("sbatch", "--parsable", *words, cwd=cwd, **variables))

    def show(self, job: int) -> dict[str, str]:
        """What SLURM knows of a job: JobState, Restarts, ..."""
        return dict(re.findall(r"(\w+)=(\S*)", self.run("scontrol", "show", "job", str(job))))

    def wait(self, job: int, *states: str, seconds: float = 120) -> dict[str, str]:
        """Waits until a job is in one of these states."""
        until = time.monotonic() + seconds
        while (known := self.show(job))["JobState"] not in states:
            assert time.monotonic() < until, f"job {job} is {known['JobState']} ({known.get('Reason')}), not {states}"
            time.sleep(0.3)
        return known

    def start_again(self, job: int) -> None:
        """Starts a requeued job without the two minutes that SLURM lets it wait for.

        Those are there for a reason: its nodes refuse a job that starts in the second in which its last run was ended
        ("credential revoked"), and it cannot be changed while that is being cleared away.
        """
        self.wait(job, "PENDING", seconds=60)
        time.sleep(3)
        until = time.monotonic() + 60
        while self.show(job)["JobState"] == "PENDING":
            try:
                self.run("scontrol", "update", f"jobid={job}", "StartTime=now")
            except AssertionError:
                assert time.monotonic() < until, f"job {job} cannot be started again: {self.show(job)}"
            time.sleep(0.5)

    def kill_node(self, name: str) -> None:
        """Kills a node: its daemon, and all that runs there, as when its power is cut."""
        daemon = int((self.folder / f"slurmd.{name}.pid").read_text())
        for pid in [daemon, *_descendants(daemon), *_with_variable(f"SLURMD_NODENAME={name}")]:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)

    def start_node(self, name: str) -> None:
        conf = str(self.folder / "slurm.conf")
        subprocess.run(["slurmd", "-f", conf, "-N", name], env=self.environment, check=True, timeout=30)

    def wait_for_nodes(self) -> None:
        until = time.monotonic() + 60
        while (states := self.run("sinfo", "-h", "-N", "-p", "low", "-o", "%T").split()) != ["idle", "idle"]:
            assert time.monotonic() < until, f"nodes are {states}: {self.logs()}"
            time.sleep(0.2)

    def logs(self) -> str:
        return "\n".join(path.read_text(errors="replace")[-2000:] for path in self.folder.glob("*.log"))


@contextlib.contextmanager
def cluster(folder: Path) -> Iterator[Cluster]:
    """Starts a cluster of two nodes, and ends it with everything that it started."""
    folder.mkdir(parents=True, exist_ok=True)
    _write(folder)
    made = Cluster(folder)
    munge = folder / "munge"
    files = [f"--{kind}={munge}/{name}" for kind, name in (
        ("key-file", "key"), ("socket", "socket"), ("pid-file", "pid"), ("log-file", "log"), ("seed-file", "seed"),
    )]  # fmt: skip
    try:
        subprocess.run(["munged", "--force", *files], env=made.environment, check=True, timeout=30)
        subprocess.run(["slurmctld", "-f", str(folder / "slurm.conf")], env=made.environment, check=True, timeout=30)
        for name in ("n1", "n2"):
            made.start_node(name)
        made.wait_for_nodes()
        yield made
    finally:
        with contextlib.suppress(AssertionError, subprocess.TimeoutExpired):
            made.run("scancel", "--user=root")
            time.sleep(1)
        _end(folder)


def _write(folder: Path) -> None:
    """Writes the configuration and a key."""
    host, ports = socket.gethostname(), _free_ports(3)
    (folder / "munge").mkdir(mode=0o755)
    key = folder / "munge" / "key"
    key.write_bytes(secrets.token_bytes(1024))
    key.chmod(0o400)
    nodes = "\n".join(
        f"NodeName=n{i} NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[i]} CPUs=1 RealMemory=2000" for i in (1, 2)
    )
    (folder / "slurm.conf").write_text(f"""\
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={ports[0]}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge/socket
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool.%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd.%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerType=sched/backfill
SchedulerParameters=bf_interval=5,sched_interval=5,batch_sched_delay=0
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
SlurmctldParameters=preempt_send_user_signal
JobRequeue=1
ReturnToService=2
KillWait=10
MpiDefault=none
SlurmdTimeout=10
{nodes}
PartitionName=low Nodes=n1,n2 Default=YES PriorityTier=1 PreemptMode=REQUEUE GraceTime=60 MaxTime=30 State=UP
PartitionName=high Nodes=n1,n2 PriorityTier=10 PreemptMode=OFF MaxTime=30 State=UP
""")
    # Not "disabled": slurmd of 22.05 does not start then.
    (folder / "cgroup.conf").write_text("CgroupAutomount=no\nCgroupPlugin=cgroup/v1\n")
    (folder / "state").mkdir()


def _free_ports(count: int) -> list[int]:
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        return [int(each.getsockname()[1]) for each in sockets]


def _end(folder: Path) -> None:
    for path in [*folder.glob("*.pid"), folder / "munge" / "pid"]:
        with contextlib.suppress(OSError, ValueError):
            os.kill(int(path.read_text()), signal.SIGTERM)


def _descendants(pid: int) -> list[int]:
    found = subprocess.run(["pgrep", "-P", str(pid)], capture_output=True, text=True, check=False).stdout.split()
    return [each for child in map(int, found) for each in (child, *_descendants(child))]


def _with_variable(line: str) -> list[int]:
    found = []
    for path in Path("/proc").glob("[0-9]*/environ"):
        with contextlib.suppress(OSError):
            if f"\0{line}\0".encode() in b"\0" + path.read_bytes():
                found.append(int(path.parent.name))
    return found
