"""The whole testbed: up, down, and the faults, as functions that tests and the CLI share."""

import contextlib
import os
import shutil
import signal
import socket
from pathlib import Path

from tests.cluster import faults, hardware, hosts, services
from tests.cluster.hosts import BED, address, names, run, wait_for

# Where hosts mount files of their own and the machine may have none.
MOUNT_POINTS = (Path("/run/nvml-stand-in"), Path("/etc/ld.so.preload"))
NEEDED = (
    "gcc",
    "ip",
    "nsenter",
    "unshare",
    "tc",
    "slurmctld",
    "slurmd",
    "munged",
    "ssh-keygen",
    "sshd",
)


def missing() -> str:
    """Why the testbed cannot run here; empty where it can."""
    if os.geteuid() != 0:
        return "the testbed needs root"
    absent = hosts.which(*NEEDED)
    return f"the testbed needs {', '.join(absent)} (see .ci/run)" if absent else ""


def up(count: int, *, with_slurm: bool = True) -> None:
    """Make the cluster; one that is there and whole is kept."""
    if why := missing():
        raise SystemExit(why)
    bed = hosts.load()
    if bed.nodes == count and all(hosts.alive(bed.pids.get(h)) for h in names(count)):
        return
    down()
    BED.mkdir(exist_ok=True)
    BED.chmod(0o755)
    bed = hosts.Bed(nodes=count)
    bed.save()
    for disk in ("/nvme0", "/nvme1"):
        Path(disk).mkdir(exist_ok=True)
    hardware.prepare(names(count))
    for point in MOUNT_POINTS:
        if not point.exists():
            point.touch() if point.name == "ld.so.preload" else point.mkdir()
    hosts.make_network(count)
    services.write_sshd(names(count))
    services.make_users(bed)
    if with_slurm:
        (BED / "with-slurm").touch()
        services.write_slurm(names(count))
        services.start_slurm(bed)
    for host in names(count):
        hosts.boot(bed, host)
    for host in names(count):
        wait_for(lambda host=host: _answers(address(host), 22), f"sshd on {host}")
    if with_slurm:
        services.wait_for_slurm(names(count))


def down() -> None:
    """Remove all of it. Harmless when repeated, and after a crash half-way."""
    bed = hosts.load()
    count = max(bed.nodes, _leftover_hosts())
    for pid in bed.pids.values():
        if hosts.alive(pid):
            os.kill(pid, signal.SIGKILL)
    for host in names(count):
        hardware.stop_ticking(hardware.tree(host))
    services.stop_daemons(bed)
    services.remove_users(bed)
    services.remove_slurm_files()
    hosts.remove_network(count)
    for disk in ("/nvme0", "/nvme1"):
        if Path(disk).is_dir() and not any(Path(disk).iterdir()):
            Path(disk).rmdir()
    for point in MOUNT_POINTS:
        with contextlib.suppress(OSError):
            if point.is_dir():
                point.rmdir()
            elif point.stat().st_size == 0:
                point.unlink()
    shutil.rmtree(BED, ignore_errors=True)


def status() -> str:
    bed = hosts.load()
    if not bed.nodes:
        return "no testbed; `python -m tests.cluster up --nodes 4` makes one"
    rows = [
        f"{host}  {address(host)}  {'up' if hosts.alive(bed.pids.get(host)) else 'off'}"
        for host in names(bed.nodes)
    ]
    rows += [f"{name}  {'up' if hosts.alive(pid) else 'off'}" for name, pid in bed.daemons.items()]
    if "slurmctld" in bed.daemons:
        rows.append(run("sinfo", check=False).stdout.strip())
    return "\n".join(rows)


def kill(host: str) -> None:
    hosts.kill(hosts.load(), host)


def start(host: str) -> None:
    hosts.start(hosts.load(), host)
    wait_for(lambda: _answers(address(host), 22), f"sshd on {host}")


def cut(host: str) -> None:
    hosts.cut(host)


def heal(host: str) -> None:
    hosts.heal(host)


def slow(host: str, rate: str) -> None:
    hosts.slow(host, rate)


def gpus(host: str, profile: str = "h100") -> None:
    """Give the host eight healthy simulated GPUs of this kind, with network and disks."""
    hardware.play(host, profile)


def fault(host: str, index: int, name: str) -> faults.Fault:
    return faults.give(host, index, name)


def clock_library() -> Path:
    """The library that shifts the wall clock of whoever loads it."""
    library = BED / "nvml/shifted-clock.so"
    source = Path(__file__).with_name("clock.c")
    if not library.exists() or library.stat().st_mtime < source.stat().st_mtime:
        run("gcc", "-O1", "-shared", "-fPIC", "-o", str(library), str(source), "-ldl")
    return library


def shift_clock(host: str, library: Path, seconds: int) -> None:
    """Every process that starts on this host from now on sees a clock that is wrong by this."""
    tree = hardware.tree(host)
    (tree / "nvml/clock").write_text(f"{seconds}\n")
    (tree / "preload").write_text(f"{library}\n" if seconds else "")


def stop_slurmctld() -> None:
    """Slurm's controller is away, at once; what it has saved counts when it is back."""
    bed = hosts.load()
    os.kill(bed.daemons["slurmctld"], signal.SIGKILL)
    wait_for(lambda: not hosts.alive(bed.daemons["slurmctld"]), "slurmctld to end")


def start_slurmctld() -> None:
    """It is there again, and knows its jobs."""
    bed = hosts.load()
    if not hosts.alive(bed.daemons["slurmctld"]):
        services.start_slurmctld(bed)


def stop_sshd(host: str, *, hang: bool) -> None:
    """Let sshd take connections and say nothing (SIGSTOP), or go on."""
    pid = int((BED / f"run/sshd_{host}.pid").read_text())
    number = "STOP" if hang else "CONT"
    run(*on(host, "kill", f"-{number}", str(pid)))


def clear() -> None:
    """End what an interrupted test run has left: its jobs, and processes below .testbed/tmp."""
    if "slurmctld" in hosts.load().daemons:
        run("scancel", "--state=RUNNING,PENDING", "--user=root", check=False)
    for folder in Path("/proc").iterdir():
        if folder.name.isdecimal() and int(folder.name) != os.getpid():
            try:
                words = (folder / "cmdline").read_bytes().decode(errors="replace")
            except OSError:
                continue
            if f"{BED}/tmp/" in words:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(int(folder.name), signal.SIGKILL)
    for host in names(hosts.load().nodes):
        if hosts.alive(hosts.load().pids.get(host)):
            run(*on(host, "sh", "-c", "rm -rf /tmp/fl-*"), check=False)


def repair(*, wait_idle: bool = True) -> None:
    """Every host up, every link whole, and (once its jobs are over) every Slurm node idle."""
    bed = hosts.load()
    if "slurmctld" in bed.daemons:
        start_slurmctld()
    for host in names(bed.nodes):
        start(host)
        heal(host)
        stop_sshd(host, hang=False)
    if wait_idle and "slurmctld" in bed.daemons:
        # After a cut slurmctld asks its slurmd again only minutes later; a boot registers at once.
        for host in services.not_responding():
            kill(host)
            start(host)
        services.wait_for_slurm(names(bed.nodes))


def on(host: str, *command: str, user: str | None = None) -> list[str]:
    """A command line that runs this command on that host."""
    return [*hosts.enter(hosts.load(), host, user), *command]


def _leftover_hosts() -> int:
    seen = run("ip", "netns", "list", check=False).stdout.split()
    numbers = [int(name[1:]) for name in seen if name[:1] == "h" and name[1:].isdecimal()]
    return max(numbers, default=0)


def _answers(ip: str, port: int) -> bool:
    with socket.socket() as probe:
        probe.settimeout(1.0)
        return probe.connect_ex((ip, port)) == 0
