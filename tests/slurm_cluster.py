"""A real Slurm of two nodes, n1 and n2, on this one machine: made, started and removed by a test.

slurmctld, two slurmd and munged of Debian's packages run on ports of their own, from a folder of their own, in a
mount namespace whose /etc/hosts knows the nodes; nothing on the machine is changed. It needs root.
"""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

from waiting import PATIENCE, until

PROGRAMS = ("slurmctld", "slurmd", "srun", "sbatch", "scontrol", "munged", "unshare", "setpriv")
_FOLDERS = "/usr/sbin:/sbin"  # of daemons, which a PATH may lack

CONF = """\
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={ports[0]}
SlurmUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket
CryptoType=crypto/munge
CredType=cred/munge
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd-%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SwitchType=switch/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SlurmdParameters=config_overrides
ReturnToService=2
JobRequeue=1
FirstJobId={first_job}
KillWait=20
AccountingStorageType=accounting_storage/none
JobAcctGatherType=jobacct_gather/none
NodeName=n1 NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[1]} CPUs=2 RealMemory=1000
NodeName=n2 NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[2]} CPUs=2 RealMemory=1000
PartitionName=P Nodes=n1,n2 Default=YES State=UP MaxTime=INFINITE
"""


def why_not() -> str | None:
    """What this machine lacks for a Slurm of its own; None where it can have one."""
    if os.geteuid() != 0:
        return "a Slurm of its own needs root"
    missing = [name for name in PROGRAMS if shutil.which(name, path=f"{os.environ['PATH']}:{_FOLDERS}") is None]
    if missing:
        return f"not installed: {', '.join(missing)} (Debian: slurm-wlm, munge, util-linux)"
    trial = subprocess.run(["unshare", "--mount", "true"], capture_output=True, text=True)
    return None if trial.returncode == 0 else f"no mount namespaces here: {trial.stderr.strip()}"


def first_job() -> int:
    """Jobs take their port from their number (scripts/slurm/launch.sh), and each worker of xdist may have a Slurm."""
    return 1 + 50 * (os.getpid() % 40)


def free_ports(count: int) -> list[int]:
    """Ports that are free at this moment: above those of jobs, below the range that the kernel gives away by itself."""
    found: list[int] = []
    first = 30001 + 25 * (os.getpid() % 60)  # two workers of xdist, which have neighbouring numbers, do not share them
    for port in range(first, 32000):
        with socket.socket() as probe:
            try:
                probe.bind(("0.0.0.0", port))
            except OSError:
                continue
        found.append(port)
        if len(found) == count:
            return found
    raise RuntimeError("no free ports")


class Cluster:
    """`with Cluster(folder) as cluster: cluster.run("srun", "-N2", ...)`"""

    def __init__(self, folder: Path):
        self.folder = folder
        self._daemons: list[subprocess.Popen] = []
        path = f"{os.environ['PATH']}:{_FOLDERS}"
        inherited = {name: value for name, value in os.environ.items() if not name.startswith("SLURM")}
        self.environment = inherited | {"SLURM_CONF": str(folder / "slurm.conf"), "PATH": path}

    def __enter__(self) -> Cluster:
        try:
            self._start()
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        if self._daemons:
            self.run("scancel", "--full", "--signal=KILL", "--state=RUNNING", check=False)
            time.sleep(0.5)
        for daemon in reversed(self._daemons):
            daemon.send_signal(signal.SIGTERM)
        for daemon in reversed(self._daemons):
            try:
                daemon.wait(10)
            except subprocess.TimeoutExpired:
                daemon.kill()
                daemon.wait()

    def run(self, *command: object, check: bool = True, **options: object) -> subprocess.CompletedProcess:
        """A client command with its output as text; `environment` adds to its environment."""
        environment = self.environment | dict(options.pop("environment", {}))
        done = subprocess.run(
            [str(word) for word in command],
            **{"capture_output": True, "text": True, "timeout": PATIENCE, "cwd": self.folder} | options,
            env=environment,
        )
        if check and done.returncode:
            raise AssertionError(f"{command} ended with {done.returncode}:\n{done.stdout}\n{done.stderr}")
        return done

    def submit(self, *words: object) -> str:
        """The number of a batch job."""
        return self.run("sbatch", "--parsable", *words).stdout.strip()

    def wait(self, number: str, states: tuple[str, ...] = ("COMPLETED",), seconds: float = PATIENCE) -> dict[str, str]:
        """The job once it is in one of the states. AssertionError where it ends in another, or not in time."""
        ended = {"COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL"}
        deadline = time.monotonic() + seconds  # not `sbatch --wait`, which looks every half minute
        while (job := self.job(number))["JobState"] not in states:
            if job["JobState"] in ended or time.monotonic() > deadline:
                output = Path(job["StdOut"])
                text = output.read_text(errors="replace") if output.exists() else ""
                raise AssertionError(f"{text}\njob {number} is {job['JobState']}, not {' or '.join(states)}: {job}")
            time.sleep(0.2)
        return job

    def until_idle(self) -> None:
        """Waits until both nodes have nothing left to do, not even to clean up."""

        def idle() -> bool:
            return self.run("sinfo", "-h", "-o", "%T %D", check=False).stdout.split() == ["idle", "2"]

        self._until("both nodes are idle", idle)

    def job(self, number: str) -> dict[str, str]:
        """The fields of `scontrol show job`."""
        shown = self.run("scontrol", "show", "job", "-o", number).stdout
        return dict(word.split("=", 1) for word in shown.split() if "=" in word)

    def _start(self) -> None:
        host = socket.gethostname().partition(".")[0]
        for name in ("state", "spool-n1", "spool-n2"):
            (self.folder / name).mkdir()
        hosts = self.folder / "hosts"
        hosts.write_text(f"127.0.0.1 localhost {host} n1 n2\n")
        (self.folder / "slurm.conf").write_text(
            CONF.format(host=host, folder=self.folder, ports=free_ports(3), first_job=first_job()), encoding="utf-8"
        )
        key = self.folder / "munge.key"
        key.write_bytes(os.urandom(128))
        key.chmod(0o600)
        files = {"socket": "munge.socket", "pid-file": "munge.pid", "log-file": "munge.log", "seed-file": "munge.seed"}
        options = [f"--{option}={self.folder / name}" for option, name in files.items()]
        self._daemon("munged", "--foreground", "--force", f"--key-file={key}", *options)
        self._until("munged listens", lambda: (self.folder / "munge.socket").exists())
        self._daemon("slurmctld", "-D")
        for node in ("n1", "n2"):
            self._daemon("slurmd", "-D", "-N", node)
        self.until_idle()

    def _daemon(self, *command: str) -> None:
        mount = f'mount --bind "{self.folder}/hosts" /etc/hosts && exec "$@"'
        with (self.folder / "daemons.log").open("ab") as log:
            self._daemons.append(
                subprocess.Popen(
                    ["setpriv", "--pdeathsig", "KILL", "unshare", "--mount", "sh", "-c", mount, "sh", *command],
                    stdin=subprocess.DEVNULL, stdout=log, stderr=log, env=self.environment, cwd=self.folder,
                )
            )  # fmt: skip

    def _until(self, what: str, holds: Callable[[], bool]) -> None:
        def logs() -> str:
            return "\n".join(file.read_text(errors="replace")[-2000:] for file in sorted(self.folder.glob("*.log")))

        until(what, holds, told=logs)
