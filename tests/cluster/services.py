"""What runs on the virtual hosts: sshd with own keys, munge and Slurm, two user accounts."""

import os
import pwd
import shutil
import signal
import stat
import subprocess
from pathlib import Path

from tests.cluster.hosts import BED, CONTROL_ADDRESS, Bed, address, alive, run, wait_for

USERS = ("lta", "ltb")
GPUS = 8
SLURM_FOLDER = Path("/etc/slurm")
MARK = "# launcher testbed"
# Not below the checkout: slurmd runs a user's batch script from here, and the checkout may lie
# where only its owner can enter.
SPOOL = Path("/var/tmp/launcher-testbed")


def write_sshd(hosts: list[str]) -> None:
    """A key pair for the clients; a host key, a config and a known_hosts line for every host."""
    key = BED / "id_ed25519"
    if not key.exists():
        run("ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(key))
    authorized = BED / "authorized_keys"
    shutil.copy(key.with_suffix(".pub"), authorized)
    authorized.chmod(0o644)
    Path("/run/sshd").mkdir(exist_ok=True)
    known = []
    for host in hosts:
        host_key = BED / f"hostkey_{host}"
        if not host_key.exists():
            run("ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(host_key))
        known.append(f"{host},{address(host)} {host_key.with_suffix('.pub').read_text().strip()}")
        (BED / f"sshd_{host}.conf").write_text(
            f"ListenAddress {address(host)}\nPort 22\nHostKey {host_key}\n"
            f"AuthorizedKeysFile {authorized}\nStrictModes no\nUsePAM no\n"
            "PasswordAuthentication no\nPermitRootLogin yes\nUseDNS no\nMaxStartups 100:30:200\n"
            f"PidFile {BED}/run/sshd_{host}.pid\n"
            "Subsystem sftp /usr/lib/openssh/sftp-server\n"
        )
    (BED / "known_hosts").write_text("\n".join(known) + "\n")
    (BED / "ssh_config").write_text(
        "Host h*\n"
        f"  IdentityFile {key}\n"
        "  IdentitiesOnly yes\n"
        f"  UserKnownHostsFile {BED}/known_hosts\n"
        "  StrictHostKeyChecking yes\n"
        + "".join(f"Host {host}\n  HostName {address(host)}\n" for host in hosts)
    )
    last = hosts[-1].removeprefix("h")
    (BED / "inventory.yaml").write_text(
        "# The testbed's hosts, for examples/ssh.yaml; made by `python -m tests.cluster up`.\n"
        "version: 1\nssh_config: ssh_config\n"
        "defaults: {gpus: 8, nvme: [/nvme0, /nvme1]}\n"
        f"pools:\n  default:\n    - h[1-{last}]\n"
    )


def make_users(bed: Bed) -> None:
    """Two real accounts without a password; each may use the testbed's key."""
    for user in USERS:
        try:
            home = Path(pwd.getpwnam(user).pw_dir)
        except KeyError:
            run("useradd", "--create-home", "--shell", "/bin/bash", user)
            bed.users.append(user)
            bed.save()
            home = Path(pwd.getpwnam(user).pw_dir)
        ssh = home / ".ssh"
        ssh.mkdir(mode=0o700, exist_ok=True)
        shutil.copy(BED / "id_ed25519", ssh / "id_testbed")
        (ssh / "id_testbed").chmod(0o600)
        (ssh / "config").write_text(
            (BED / "ssh_config")
            .read_text()
            .replace(str(BED / "id_ed25519"), str(ssh / "id_testbed"))
        )
        run("chown", "-R", f"{user}:", str(ssh))


def remove_users(bed: Bed) -> None:
    for user in bed.users:
        run("pkill", "-KILL", "-u", user, check=False)
        run("userdel", "--remove", user, check=False)


def write_slurm(hosts: list[str]) -> None:
    """slurm.conf and its companions, where the tools look for them by default."""
    existing = SLURM_FOLDER / "slurm.conf"
    if existing.exists() and MARK not in existing.read_text():
        raise RuntimeError(f"{existing} belongs to another cluster; the testbed leaves it alone")
    SLURM_FOLDER.mkdir(exist_ok=True)
    spool = SPOOL
    spool.mkdir(mode=0o755, exist_ok=True)
    for index in range(GPUS):
        device = Path(f"/dev/fgpu{index}")
        if not device.exists():
            os.mknod(device, stat.S_IFCHR | 0o666, os.makedev(1, 3))
    nodes = f"h[1-{len(hosts)}]"
    rows = "\n".join(
        f"NodeName={host} NodeAddr={address(host)} CPUs=16 RealMemory=16000 Gres=gpu:{GPUS} "
        "State=UNKNOWN"
        for host in hosts
    )
    existing.write_text(
        f"""{MARK}
ClusterName=testbed
SlurmctldHost=ctl({CONTROL_ADDRESS})
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
MpiDefault=none
ReturnToService=2
SlurmdTimeout=20
SlurmctldTimeout=20
KillWait=10
MinJobAge=300
InactiveLimit=0
Waittime=0
SchedulerType=sched/backfill
SchedulerParameters=batch_sched_delay=0,sched_interval=1
SlurmdParameters=config_overrides
GresTypes=gpu
StateSaveLocation={spool}/state
SlurmdSpoolDir={spool}/%n
SlurmctldPidFile={spool}/slurmctld.pid
SlurmdPidFile={spool}/slurmd_%n.pid
SlurmctldLogFile={BED}/slurmctld.log
SlurmdLogFile={BED}/slurmd_%n.log
{rows}
PartitionName=gpu Nodes={nodes} Default=YES MaxTime=INFINITE OverSubscribe=NO State=UP
"""
    )
    (SLURM_FOLDER / "gres.conf").write_text(
        f"{MARK}\nNodeName={nodes} Name=gpu File=/dev/fgpu[0-{GPUS - 1}]\n"
    )
    (SLURM_FOLDER / "cgroup.conf").write_text(
        f"{MARK}\nCgroupPlugin=cgroup/v1\nCgroupMountpoint=/sys/fs/cgroup\n"
    )


def start_slurm(bed: Bed) -> None:
    """munged and a fresh slurmctld; the slurmds start with their hosts."""
    run("install", "-d", "-o", "munge", "-g", "munge", "-m", "0755", "/run/munge")
    if not Path("/etc/munge/munge.key").exists():
        run("mungekey", "--create")
        run("chown", "munge:", "/etc/munge/munge.key")
    if run("munge", "-n", check=False).returncode:
        run("runuser", "-u", "munge", "--", "/usr/sbin/munged", "--force")
        wait_for(lambda: run("munge", "-n", check=False).returncode == 0, "munged")
        bed.daemons["munged"] = int(Path("/run/munge/munged.pid").read_text())
    start_slurmctld(bed, "-c")


def start_slurmctld(bed: Bed, *options: str) -> None:
    with (BED / "slurmctld.out").open("a") as log:
        outer = subprocess.Popen(
            [
                "unshare",
                "-u",
                "--fork",
                "--kill-child",
                "sh",
                "-c",
                f"hostname ctl; exec slurmctld -D {' '.join(options)}",
            ],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            start_new_session=True,
            cwd="/",
        )
    bed.daemons["slurmctld"] = outer.pid
    bed.save()


def wait_for_slurm(hosts: list[str]) -> None:
    def idle() -> bool:
        seen = run("sinfo", "-h", "-N", "-o", "%N %T", check=False).stdout.split("\n")
        return sum(row.endswith(" idle") for row in set(seen)) == len(hosts)

    wait_for(idle, "all Slurm nodes to be idle", 60.0)


def not_responding() -> set[str]:
    """Hosts that Slurm takes for dead."""
    rows = run("sinfo", "-h", "-N", "-o", "%N %T", check=False).stdout.splitlines()
    return {row.split()[0] for row in rows if row.rstrip().endswith(("*", "down"))}


def stop_daemons(bed: Bed) -> None:
    for name, pid in bed.daemons.items():
        if not alive(pid):
            continue
        os.kill(pid, signal.SIGKILL if name == "slurmctld" else signal.SIGTERM)
        wait_for(lambda pid=pid: not alive(pid), f"{name} to end")


def remove_slurm_files() -> None:
    shutil.rmtree(SPOOL, ignore_errors=True)
    for name in ("slurm.conf", "gres.conf", "cgroup.conf"):
        path = SLURM_FOLDER / name
        if path.exists() and MARK in path.read_text():
            path.unlink()
    for index in range(GPUS):
        Path(f"/dev/fgpu{index}").unlink(missing_ok=True)
