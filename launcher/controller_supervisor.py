"""Inside the controller's Slurm job: `python -m launcher.controller_supervisor FLEET`, exec'ed by
the batch script.

When the batch process ends, Slurm ends all that the job has. So this one lives as long as the job
does, starts the controller again when it dies, lets a successor take over before the walltime, and
ends with the run. It decides nothing about the fleet.
"""

import logging
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import psutil

from launcher import controller_job
from launcher.agent.processes import become_subreaper
from launcher.controller_job import Heir
from launcher.errors import FleetError
from launcher.files import read_document, write_document
from launcher.gateway.door import Gateway
from launcher.gateway.keeper import is_due, is_wanted
from launcher.gateway.processes import is_alive, tell
from launcher.paths import FleetPaths
from launcher.slurm_tools.jobs import own_place
from launcher.spec import FleetSpec
from launcher.succession import hand_over, is_superfluous
from launcher.wish import Wish, is_driven, read_wish

TURN_S = 1.0
ASK_EVERY_S = 5.0
CONTROLLER_ENDS_WITHIN_S = 10.0
GATEWAY_SLACK_S = 10.0
DIES_WITHIN_S = 3.0

log = logging.getLogger("launcher.job")


class Supervisor:
    def __init__(self, paths: FleetPaths, job: str) -> None:
        self._paths = paths
        self._job = job
        self._controller: subprocess.Popen[bytes] | None = None
        self._starts: list[float] = []
        self._asked_at = float("-inf")
        self._trouble = ""
        self._told_to_end = False
        self._is_warned = False
        self._woken = threading.Event()

    def run(self) -> int:
        """Until the run is over, a successor is at our place, or Slurm ends the job."""
        become_subreaper()  # the gateway outlives its controller, and must not outlive the job
        signal.signal(signal.SIGTERM, self._on_term)
        signal.signal(signal.SIGUSR1, self._on_warning)
        log.info("job %s looks after the controller", self._job)
        while not self._told_to_end:
            try:
                if not is_wanted(self._paths):
                    log.info("the run is over")
                    self._let_nobody_follow()
                    break
                if self._turn():
                    break
                self._trouble = ""
            except (FleetError, OSError) as error:  # what cannot be seen now is looked at again
                if str(error) != self._trouble:
                    log.error("%s", error)
                self._trouble = str(error)
            self._woken.wait(TURN_S)
            self._woken.clear()
        self._end()
        return 0

    def _turn(self) -> bool:
        """Look after the controller; True when this job is not needed any more."""
        self._reap()
        wish = read_wish(self._paths)
        if self._controller is None and wish is not None:
            if is_driven(self._paths):
                return self._stand_by()
            now = time.monotonic()
            if not self._told_to_end and is_due(self._starts, now):
                self._start(now)
        if self._is_warned and wish is not None and self._is_time_to_ask():
            return self._hand_over(wish)
        return False

    def _start(self, now: float) -> None:
        self._starts.append(now)
        log.info("starting the controller, for the %d. time", len(self._starts))
        self._controller = subprocess.Popen(
            [sys.executable, "-m", "launcher.controller", str(self._paths.root)],
            stdin=subprocess.DEVNULL,
            start_new_session=True,
            cwd="/",
        )

    def _reap(self) -> None:
        """Bury who has ended: the controller, and what it left to us."""
        while True:
            try:
                ended = os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT)
            except ChildProcessError:
                return
            if ended is None:
                return
            if self._controller is not None and ended.si_pid == self._controller.pid:
                log.info("the controller has ended with %d", self._controller.wait())
                self._controller = None
            else:
                os.waitpid(ended.si_pid, 0)

    def _stand_by(self) -> bool:
        """Somebody else drives: say that we wait; True where we wait in vain."""
        heir = read_document(self._paths.heir, Heir)
        if heir is None or heir.job != self._job:
            log.info("another controller drives the fleet; waiting for it to leave")
            write_document(self._paths.heir, Heir(job=self._job))
        if not self._is_time_to_ask():
            return False
        if is_superfluous(controller_job.find(self._paths), self._job):
            log.info("a later job drives the fleet; this one is not needed")
            return True
        return False

    def _hand_over(self, wish: Wish) -> bool:
        """The end of this job is near: see to a successor; True when it is at our place."""
        heir = read_document(self._paths.heir, Heir)
        found = controller_job.find(self._paths)
        match hand_over(found, self._job, heir.job if heir else ""):
            case "submit":
                spec = read_document(self._paths.run(wish.run).spec, FleetSpec)
                if spec is not None and spec.controller_job is not None:
                    log.info("the job ends soon; asking for a successor")
                    job = spec.controller_job
                    controller_job.submit(spec, job, self._paths, wish.run, own=self._job)
            case "leave":
                log.info("the successor waits for the wheel; leaving it")
                return True
        return False

    def _is_time_to_ask(self) -> bool:
        """Slurm's controller is shared by all users: it is asked now and then."""
        now = time.monotonic()
        if now - self._asked_at < ASK_EVERY_S:
            return False
        self._asked_at = now
        return True

    def _let_nobody_follow(self) -> None:
        """A successor that still waits in the queue would start for nothing, and end."""
        try:
            controller_job.withdraw(self._paths)
        except FleetError as error:
            log.error("%s", error)

    def _end(self) -> None:
        """The controller, then the gateway, which ends what is under way; then what is left."""
        log.info("leaving: %s", "Slurm ends the job" if self._told_to_end else "not needed")
        if self._controller is not None:
            self._controller.terminate()
            try:
                self._controller.wait(CONTROLLER_ENDS_WITHIN_S)
            except subprocess.TimeoutExpired:
                self._controller.kill()
        try:
            self._end_gateway()
        except (FleetError, OSError) as error:
            log.error("%s", error)
        left = psutil.Process().children(recursive=True)
        for process in left:
            try:
                process.kill()
            except psutil.Error:
                continue
        psutil.wait_procs(left, timeout=DIES_WITHIN_S)

    def _end_gateway(self) -> None:
        """Only ours: a successor on this very node may have its own already."""
        owner = Gateway(self._paths.gateway).owner()
        below = {process.pid for process in psutil.Process().children(recursive=True)}
        if owner is None or owner.supervisor.pid not in below:
            return
        wish = read_wish(self._paths)
        spec = read_document(self._paths.run(wish.run).spec, FleetSpec) if wish else None
        drain_s = spec.limits.drain if spec else 0
        deadline = time.monotonic() + drain_s + GATEWAY_SLACK_S
        tell(owner.supervisor, signal.SIGTERM)
        while is_alive(owner.supervisor) and time.monotonic() < deadline:
            time.sleep(0.1)

    def _on_term(self, number: int, frame: object) -> None:
        """Slurm ends the job. The controller is told at once: there may be little time."""
        self._told_to_end = True
        if self._controller is not None and self._controller.poll() is None:
            self._controller.terminate()
        self._woken.set()

    def _on_warning(self, number: int, frame: object) -> None:
        self._is_warned = True
        self._woken.set()


def main() -> int:
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(name)s %(message)s")
    place = own_place()
    if place is None:
        print("this runs inside a Slurm job", file=sys.stderr)
        return 2
    return Supervisor(FleetPaths(Path(sys.argv[1])), place.job).run()


if __name__ == "__main__":
    sys.exit(main())
