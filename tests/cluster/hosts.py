"""Virtual hosts: make, kill (power failure), start again, cut, heal, slow. Needs root."""

import contextlib
import json
import os
import shutil
import signal
import subprocess
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
BED = ROOT / ".testbed"
STATE = BED / "state.json"
BRIDGE = "ltb0"
NETWORK = "10.77.0"
CONTROL_ADDRESS = f"{NETWORK}.1"
INIT = Path(__file__).with_name("init.sh")
HOSTS_BEGIN, HOSTS_END = "# launcher testbed begin", "# launcher testbed end"


@dataclass
class Bed:
    """What is running now; kept in .testbed/state.json so that any process can go on."""

    nodes: int = 0
    pids: dict[str, int] = field(default_factory=dict)  # PID 1 of each host, seen from outside
    daemons: dict[str, int] = field(default_factory=dict)
    users: list[str] = field(default_factory=list)

    def save(self) -> None:
        BED.mkdir(exist_ok=True)
        scratch = STATE.with_suffix(".tmp")
        scratch.write_text(json.dumps(asdict(self), indent=1))
        scratch.replace(STATE)


def load() -> Bed:
    try:
        return Bed(**json.loads(STATE.read_text()))
    except (OSError, ValueError, TypeError):
        return Bed()


def names(count: int) -> list[str]:
    return [f"h{number}" for number in range(1, count + 1)]


def address(host: str) -> str:
    return f"{NETWORK}.{10 + int(host[1:])}"


def run(*command: str, check: bool = True, **options: object) -> subprocess.CompletedProcess[str]:
    result = subprocess.run(command, text=True, capture_output=True, **options)
    if check and result.returncode:
        raise RuntimeError(
            f"{' '.join(command)}: {result.stderr.strip() or result.stdout.strip()}"
        )
    return result


def make_network(count: int) -> None:
    run("ip", "link", "add", BRIDGE, "type", "bridge")
    run("ip", "addr", "add", f"{CONTROL_ADDRESS}/24", "dev", BRIDGE)
    run("ip", "link", "set", BRIDGE, "up")
    for host in names(count):
        run("ip", "netns", "add", host)
        run("ip", "link", "add", f"v{host}", "type", "veth", "peer", "name", "eth0", "netns", host)
        run("ip", "link", "set", f"v{host}", "master", BRIDGE, "up")
        inside = ("ip", "-n", host)
        run(*inside, "addr", "add", f"{address(host)}/24", "dev", "eth0")
        run(*inside, "link", "set", "eth0", "up")
        run(*inside, "link", "set", "lo", "up")
        run(*inside, "route", "add", "default", "via", CONTROL_ADDRESS)
    _write_names([f"{CONTROL_ADDRESS} ctl"] + [f"{address(host)} {host}" for host in names(count)])


def boot(bed: Bed, host: str) -> None:
    """Start PID 1 of this host and with it its daemons."""
    if alive(bed.pids.get(host)):
        return
    log = (BED / f"{host}.log").open("a")
    outer = subprocess.Popen(
        [
            *("nsenter", f"--net=/run/netns/{host}"),
            *("unshare", "-u", "-m", "-i", "--pid", "--fork", "--mount-proc", "--kill-child"),
            *("bash", str(INIT), host, str(BED)),
        ],
        stdin=subprocess.DEVNULL,
        stdout=log,
        stderr=log,
        start_new_session=True,
        env={
            "PATH": "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin",
            "HOME": "/root",
        },
        cwd="/",
    )
    log.close()
    bed.pids[host] = wait_for(lambda: _only_child(outer.pid), f"PID 1 of {host}")
    bed.save()


def kill(bed: Bed, host: str) -> None:
    """Power failure: everything of this host ends at once, its peers hear nothing."""
    run("ip", "link", "set", f"v{host}", "down")
    pid = bed.pids.get(host)
    if alive(pid):
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
        wait_for(lambda: not alive(pid), f"the end of {host}")


def start(bed: Bed, host: str) -> None:
    run("ip", "link", "set", f"v{host}", "up")
    boot(bed, host)


def cut(host: str) -> None:
    run("ip", "link", "set", f"v{host}", "down")


def heal(host: str) -> None:
    run("ip", "link", "set", f"v{host}", "up")
    run("tc", "qdisc", "del", "dev", f"v{host}", "root", check=False)
    run("ip", "netns", "exec", host, "tc", "qdisc", "del", "dev", "eth0", "root", check=False)


def slow(host: str, rate: str) -> None:
    """Shape the host's link in both directions: `slow h2 100mbit`."""
    shape = ("root", "tbf", "rate", rate, "burst", "256kb", "latency", "50ms")
    run("tc", "qdisc", "replace", "dev", f"v{host}", *shape)
    run("ip", "netns", "exec", host, "tc", "qdisc", "replace", "dev", "eth0", *shape)


def enter(bed: Bed, host: str, user: str | None = None) -> list[str]:
    """The words in front of a command that runs it on this host."""
    pid = str(bed.pids[host])
    words = ["nsenter", "-t", pid, "-n", "-u", "-m", "-i", "-p", "--"]
    return [*words, "runuser", "-u", user, "--"] if user else words


def remove_network(count: int) -> None:
    for host in names(count):
        run("ip", "netns", "del", host, check=False)
        run("ip", "link", "del", f"v{host}", check=False)
    run("ip", "link", "del", BRIDGE, check=False)
    _write_names([])


def alive(pid: int | None) -> bool:
    if not pid:
        return False
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return False
    return state != "Z"


def wait_for(observe, what: str, timeout_s: float = 30.0):
    """The first true answer of `observe`; TimeoutError names what did not come."""
    deadline = time.monotonic() + timeout_s
    while time.monotonic() < deadline:
        answer = observe()
        if answer:
            return answer
        time.sleep(0.05)
    raise TimeoutError(f"waited {timeout_s:.0f} s for {what}")


def _only_child(pid: int) -> int | None:
    """`unshare --fork` has one child: PID 1 of the host."""
    try:
        text = Path(f"/proc/{pid}/task/{pid}/children").read_text()
    except OSError as error:
        raise RuntimeError(f"the host did not start; see {BED}") from error
    return int(text.split()[0]) if text.split() else None


def _write_names(lines: list[str]) -> None:
    """Our block in /etc/hosts, replaced whole; other lines stay."""
    path = Path("/etc/hosts")
    kept, inside = [], False
    for line in path.read_text().splitlines():
        if line == HOSTS_BEGIN:
            inside = True
        if not inside:
            kept.append(line)
        if line == HOSTS_END:
            inside = False
    block = [HOSTS_BEGIN, *lines, HOSTS_END] if lines else []
    path.write_text("\n".join([*kept, *block]) + "\n")


def which(*programs: str) -> list[str]:
    """Those of the programs that are missing."""
    path = os.environ.get("PATH", "") + ":/usr/sbin:/sbin"
    return [program for program in programs if shutil.which(program, path=path) is None]
