"""A Slurm of two nodes on this machine, for as long as a test session: daemons of our own, no service, no root needed.

Debian builds Slurm so that several slurmds run on one host, each with a name and a port. The nodes are named by
loopback addresses, since Lightning and everybody else take MASTER_ADDR from the node list: 127.0.0.2 resolves without a
hosts file. Jobs are scheduled within a second; requeued ones start again after `cred_expire` seconds, elsewhere in two
minutes.
"""

from __future__ import annotations

import os
import secrets
import shutil
import signal
import socket
import subprocess
import time
from pathlib import Path

NODES = ("127.0.0.2", "127.0.0.3")
COMMANDS = ("munged", "slurmctld", "slurmd", "sbatch", "scontrol", "squeue", "setpriv")
STARTING, STOPPING = 30, 15  # seconds
SYSTEM = "/usr/sbin:/sbin"

CONF = """
ClusterName={name}
SlurmctldHost={host}({address})
SlurmctldPort={port}
SlurmUser={user}
SlurmdUser={user}
AuthType=auth/munge
CredType=cred/munge
AuthInfo=socket={folder}/munge.socket,cred_expire=5
{listen}
StateSaveLocation={folder}/controller
SlurmdSpoolDir={folder}/%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd.%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
PropagateResourceLimits=NONE
SlurmdParameters=config_overrides
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SchedulerParameters=sched_interval=1,sched_min_interval=0,bf_interval=1
FirstJobId={first}
KillWait=10
MinJobAge=3600
JobRequeue=1
ReturnToService=2
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
SlurmctldParameters=preempt_send_user_signal
MailProg=/bin/true
{nodes}
PartitionName=main Nodes=ALL Default=YES MaxTime=60 PriorityTier=1 GraceTime=30 State=UP
PartitionName=urgent Nodes=ALL MaxTime=60 PriorityTier=10 State=UP
"""


def missing() -> list[str]:
    """The commands that this machine lacks."""
    return [name for name in COMMANDS if not shutil.which(name, path=os.environ["PATH"] + ":" + SYSTEM)]


class Cluster:
    """Two nodes; `environment` is what its users need.

    Args:
        folder: for its configuration, logs and sockets; short, as a socket's name has a limit.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        self.environment = {"SLURM_CONF": str(folder / "slurm.conf")}
        self._processes: list[subprocess.Popen] = []

    def start(self) -> None:
        """Start the daemons, and wait until both nodes are idle."""
        try:
            self.folder.chmod(0o755)  # munged insists that everybody can reach its socket
            self._configure()
            (self.folder / "munge.key").write_bytes(secrets.token_bytes(128))
            (self.folder / "munge.key").chmod(0o600)
            files = {"key-file": "munge.key", "socket": "munge.socket", "pid-file": "munge.pid"}
            files |= {"log-file": "munge.log", "seed-file": "munge.seed"}
            self._run("munged", "--foreground", *(f"--{k}={self.folder / file}" for k, file in files.items()))
            self._wait(lambda: (self.folder / "munge.socket").exists(), "munged does not answer")
            self._run("slurmctld", "-D", "-c")
            for node in NODES:
                self._run("slurmd", "-D", "-c", "-N", node)
            self._wait(lambda: len(self.ask("sinfo", "-hN", "-t", "idle", "-p", "main").splitlines()) == 2, "no nodes")
        except BaseException:
            self.stop()
            raise

    def stop(self) -> None:
        """Cancel what runs, then stop the daemons, the last one started first."""
        try:
            if len(self._processes) > 1:  # there is a controller
                self.ask("scancel", "--full", f"--user={user()}")
                self._wait(lambda: not self.ask("squeue", "-h"), "jobs do not end")
        except (AssertionError, subprocess.SubprocessError) as error:
            print(f"the jobs could not be ended: {error}")
        for process in reversed(self._processes):
            process.send_signal(signal.SIGTERM)
            try:
                process.wait(STOPPING)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()

    def ask(self, *command: str) -> str:
        """What a command of Slurm prints; empty while the controller does not answer."""
        environment = os.environ | self.environment
        return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=20).stdout

    def logs(self) -> str:
        """The ends of the daemons' logs."""
        return "\n".join(f"{log.name}:\n{log.read_text()[-2000:]}" for log in sorted(self.folder.glob("*.log")))

    def _run(self, name: str, *arguments: str) -> None:
        """As a child that ends with us, however we end."""
        command = shutil.which(name, path=os.environ["PATH"] + ":" + SYSTEM)
        clean = {k: v for k, v in os.environ.items() if not k.startswith(("SLURM", "SBATCH"))} | self.environment
        output = (self.folder / f"{name}.out.log").open("ab")
        process = subprocess.Popen(
            ["setpriv", "--pdeathsig", "TERM", command, *arguments],
            env=clean,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
        )
        self._processes.append(process)

    def _wait(self, condition, what: str) -> None:
        deadline = time.monotonic() + STARTING
        while not condition():
            dead = [process.args for process in self._processes if process.poll() is not None]
            assert not dead, f"{dead} ended\n{self.logs()}"
            assert time.monotonic() < deadline, f"{what}\n{self.logs()}"
            time.sleep(0.2)

    def _configure(self) -> None:
        host = socket.gethostname().partition(".")[0]
        address = socket.gethostbyname(host)
        listen = "CommunicationParameters=NoCtldInAddrAny,NoInAddrAny"  # only on what the host's name resolves to
        if not address.startswith("127."):
            address, listen = "127.0.0.1", ""
        ports = free_ports(1 + len(NODES))
        node = "NodeName={} NodeHostname={} NodeAddr={} Port={} CPUs=4 RealMemory=4000 State=UNKNOWN"
        nodes = [node.format(name, host, address, port) for name, port in zip(NODES, ports[1:], strict=True)]
        values = {"name": secrets.token_hex(6), "host": host, "address": address, "port": ports[0], "listen": listen}
        # MASTER_PORT follows from the job's number: two such clusters on a machine must not begin with the same one
        values |= {"user": user(), "folder": self.folder, "first": 1 + os.getpid() % 9000, "nodes": "\n".join(nodes)}
        for inner in ("controller", *NODES):
            (self.folder / inner).mkdir()
        (self.folder / "slurm.conf").write_text(CONF.format(**values))
        if version() >= (23, 11):  # from there on slurmd looks for cgroups unless told not to
            (self.folder / "cgroup.conf").write_text("CgroupPlugin=disabled\n")


def user() -> str:
    return subprocess.run(["id", "-un"], capture_output=True, text=True, check=True).stdout.strip()


def version() -> tuple[int, int]:
    """Of Slurm."""
    command = shutil.which("slurmd", path=os.environ["PATH"] + ":" + SYSTEM)
    said = subprocess.run([command, "-V"], capture_output=True, text=True, check=True).stdout
    major, minor = said.split()[1].split(".")[:2]
    return int(major), int(minor)


def free_ports(count: int) -> list[int]:
    """Ports that nobody listens on, at this moment."""
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [each.getsockname()[1] for each in sockets]
    for each in sockets:
        each.close()
    return ports
