"""The door for the controller and the command line: start, orders, keys, state, end. I/O.

Orders are files; the tier's processes read them each tenth of a second, and at once when they are
nudged, which works on the gateway's own host only. Nothing here is in the way of a request.
"""

import contextlib
import fcntl
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable

from launcher.errors import BackendError, StateError
from launcher.files import make_private, open_log, read_document, write_document
from launcher.gateway.documents import (
    Keys,
    Member,
    MemberGoal,
    Orders,
    Owner,
    Settings,
    State,
)
from launcher.gateway.members import with_slots
from launcher.gateway.places import GatewayPaths
from launcher.gateway.processes import is_alive, tell

STARTS_WITHIN_S = 20.0
FRESH_S = 5.0
SILENT_AFTER_S = 20.0
DIES_WITHIN_S = 3.0


class Gateway:
    """The gateway of one fleet, whichever process looks after it.

    has_left: asks Slurm whether a job has certainly nothing on a node any more. Only who starts or
    ends gateways needs to know; for others a silent one on another host stays where it is.
    """

    def __init__(
        self, paths: GatewayPaths, has_left: Callable[[str, str], bool] | None = None
    ) -> None:
        self._paths = paths
        self._has_left = has_left
        self._child: subprocess.Popen[bytes] | None = None
        self._heard = (0.0, time.monotonic())  # what a far gateway's state said, and when it did

    # Running

    def is_supervised(self) -> bool:
        """Whether a supervisor lives, as far as that can be seen from this host."""
        owner = self.owner()
        if owner is None:
            return False
        if owner.host != socket.gethostname():
            return self._speaks()
        return is_alive(owner.supervisor)

    def is_running(self) -> bool:
        """Whether anything of it lives here, with or without its supervisor."""
        owner = self.owner()
        if owner is None or owner.host != socket.gethostname():
            return owner is not None
        return any(is_alive(one) for one in (owner.supervisor, owner.front, *owner.tier))

    def is_starting(self) -> bool:
        """Whether a supervisor that we started lives, though it may not have said so yet."""
        return self._child is not None and self._child.poll() is None

    def _is_gone(self, owner: Owner) -> bool:
        """Whether its processes ended with the Slurm job that they ran in. A host that is silent
        proves nothing; that its job is over, or elsewhere, does. Raises SlurmError."""
        if not owner.job or self._has_left is None:
            return False
        return self._has_left(owner.job, owner.node)

    def _speaks(self) -> bool:
        """Whether the state of a gateway on another host changes, watched on our own clock."""
        state = self.state()
        now = time.monotonic()
        if state is not None and state.at != self._heard[0]:
            self._heard = (state.at, now)
        return now - self._heard[1] < SILENT_AFTER_S

    def configure(self, settings: Settings) -> None:
        """What the gateway shall be; a running one follows by itself."""
        make_private(self._paths.root)
        if read_document(self._paths.settings, Settings) != settings:
            write_document(self._paths.settings, settings)

    def start(self) -> None:
        """Start a supervisor in the background, unless one lives. It adopts what runs. Raises
        BackendError where the gateway runs on another host: two would share its orders."""
        if self.is_supervised() or self.is_starting():
            return
        owner = self.owner()
        if owner is not None and owner.host != socket.gethostname():
            if not self._is_gone(owner):
                there = f"{owner.host} (Slurm job {owner.job})" if owner.job else owner.host
                raise BackendError(
                    f"the gateway runs on {there}, and its supervisor there says nothing",
                    where="gateway",
                    hint=f"`launcher gateway restart` on {owner.host}.",
                )
            self._paths.owner.unlink(missing_ok=True)
        try:
            self._paths.state.unlink(missing_ok=True)
            with open_log(self._paths.log) as handle:
                self._child = subprocess.Popen(
                    [sys.executable, "-m", "launcher.gateway.supervisor", str(self._paths.root)],
                    stdin=subprocess.DEVNULL,
                    stdout=handle,
                    stderr=handle,
                    start_new_session=True,
                    cwd="/",
                )
        except OSError as error:
            raise BackendError(f"cannot be started: {error}", where="gateway") from error

    def wait_until_up(self, timeout_s: float = STARTS_WITHIN_S) -> State:
        """The state of a gateway that takes requests. Raises BackendError that says why not."""
        deadline = time.monotonic() + timeout_s
        while time.monotonic() < deadline:
            state = self.state()
            if state is not None and state.problem:
                raise BackendError(state.problem, where="gateway")
            if state is not None and state.front == "up" and state.processes:
                return state
            time.sleep(0.05)
        raise BackendError(
            f"the gateway did not start within {timeout_s:.0f} s",
            where=str(self._paths.log),
            hint="Its log says how far it came.",
        )

    def renew(self) -> None:
        """Restart as the version that is installed now, without dropping a request."""
        self._signal(signal.SIGHUP)

    def stop(self, within_s: float) -> str:
        """Let it end what is under way, then itself, wherever it runs; wait. What is left, in
        words; empty when nothing is."""
        settings = read_document(self._paths.settings, Settings)
        if settings is None:
            return ""
        self.configure(settings.model_copy(update={"goal": "stopped"}))
        if self._forget_gone():
            return ""
        if self.is_running() and not self.is_supervised():
            self.start()  # another one ends what the last one left
        limit = time.monotonic() + within_s
        while time.monotonic() < limit:
            if self.owner() is None and not self.is_starting():
                return ""
            with contextlib.suppress(BackendError):
                self._signal(signal.SIGUSR1)  # look now
            time.sleep(0.1)
        return self._kill()

    def _forget_gone(self) -> bool:
        """Whether it went with its Slurm job, so that there is nobody who could end it."""
        owner = self.owner()
        if owner is None or owner.host == socket.gethostname():
            return False
        with contextlib.suppress(BackendError):  # Slurm cannot say: it is waited for
            if self._is_gone(owner):
                self._paths.owner.unlink(missing_ok=True)
                return True
        return False

    def _kill(self) -> str:
        owner = self.owner()
        if owner is None or self._forget_gone():
            return ""
        if owner.host != socket.gethostname():
            return f"the gateway on {owner.host}, port {owner.port}, did not answer"
        everyone = [owner.supervisor, owner.front, *owner.tier]
        for one in everyone:
            tell(one, signal.SIGKILL)
        limit = time.monotonic() + DIES_WITHIN_S
        while any(is_alive(one) for one in everyone) and time.monotonic() < limit:
            time.sleep(0.02)
        left = [str(one.pid) for one in everyone if one is not None and is_alive(one)]
        if left:
            return f"processes {', '.join(left)} of the gateway do not end"
        self._paths.owner.unlink(missing_ok=True)
        return ""

    def _signal(self, number: signal.Signals) -> None:
        owner = self.owner()
        if owner is None:
            return
        if owner.host != socket.gethostname():
            raise BackendError(
                f"the gateway runs on {owner.host}",
                where="gateway",
                hint=f"Run the command on {owner.host}.",
            )
        tell(owner.supervisor, number)

    # Orders

    def orders(self) -> Orders:
        return read_document(self._paths.orders, Orders) or Orders()

    def give(self, orders: Orders) -> Orders:
        """Write orders, if they differ from those that count, and nudge."""
        current = self.orders()
        wanted = orders.model_copy(update={"revision": current.revision})
        if wanted == current:
            return current
        make_private(self._paths.root)
        wanted = wanted.model_copy(update={"revision": current.revision + 1})
        write_document(self._paths.orders, wanted)
        self._nudge()
        return wanted

    def add(self, name: str, url: str, *, weight: float = 1.0, **more: str) -> Orders:
        """A member takes traffic from now on."""
        member = Member(name=name, slot=0, url=url, weight=weight, **more)  # type: ignore[arg-type]
        return self._change(lambda members: [*(m for m in members if m.name != name), member])

    def drain(self, name: str) -> Orders:
        """It gets no new request and ends those that it has."""
        return self._set_goal(name, "draining")

    def dead(self, name: str) -> Orders:
        """The verdict: requests that wait for it are freed at once."""
        return self._set_goal(name, "dead")

    def remove(self, name: str) -> Orders:
        return self._change(lambda members: [m for m in members if m.name != name])

    def _set_goal(self, name: str, goal: MemberGoal) -> Orders:
        return self._change(
            lambda members: [
                m.model_copy(update={"goal": goal}) if m.name == name else m for m in members
            ]
        )

    def _change(self, change: Callable[[list[Member]], list[Member]]) -> Orders:
        orders = self.orders()
        members = with_slots(orders.members, change(list(orders.members)))
        return self.give(orders.model_copy(update={"members": members}))

    def _nudge(self) -> None:
        """Tell the processes on this host to look now; the others look soon."""
        owner = self.owner()
        if owner is None or owner.host != socket.gethostname():
            return
        tell(owner.supervisor, signal.SIGUSR1)
        for one in owner.tier:
            path = f"{owner.run_folder}/admin-{one.pid}.sock"
            with contextlib.suppress(OSError), socket.socket(socket.AF_UNIX) as line:
                line.settimeout(0.5)
                line.connect(path)
                line.sendall(b"POST /look HTTP/1.1\r\nHost: tier\r\nContent-Length: 0\r\n\r\n")
                line.recv(4096)

    # Keys and state

    def keys(self) -> Keys:
        return read_document(self._paths.keys, Keys) or Keys()

    def change_keys(self, change: Callable[[Keys], Keys]) -> None:
        """Change the ring; who changes it at the same time waits, and sees the change."""
        make_private(self._paths.root)
        handle = os.open(self._paths.keys_lock, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX)
            before = self.keys()
            after = change(before)
            if after == before:
                return
            write_document(self._paths.keys, after)
        finally:
            os.close(handle)
        self._nudge()

    def state(self) -> State | None:
        """What the gateway said last; None where it never did. `at` tells how old it is."""
        return read_document(self._paths.state, State)

    def owner(self) -> Owner | None:
        """Who looks after it, with which processes; None where nobody does."""
        try:
            return read_document(self._paths.owner, Owner)
        except StateError:
            return None
