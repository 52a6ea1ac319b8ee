"""The controller's herald: tells a command or a webhook what happens to the fleet. I/O.

In a thread of its own: a receiver that hangs delays no round. What cannot be told after some tries
is forgotten, and the journal says so once.
"""

import random
import threading
from collections import deque
from collections.abc import Callable

from launcher import delivery
from launcher.errors import FleetError
from launcher.files import read_document
from launcher.journal import Journal
from launcher.notices import Notice, dated, notices
from launcher.paths import FleetPaths
from launcher.secretstore import WEBHOOK_FILE
from launcher.spec import FleetSpec, Notify
from launcher.status import Status

QUEUE_MAX = 64
PAUSES_S = (2.0, 6.0)  # before the second and the third try, on average
ENDS_WITHIN_S = 12.0


class Herald:
    """One per controller. What the last one had seen is in status.json."""

    def __init__(
        self,
        paths: FleetPaths,
        run: int,
        journal: Journal,
        pauses_s: tuple[float, ...] = PAUSES_S,
    ) -> None:
        self._paths = paths
        self._spec_file = paths.run(run).spec
        self._journal = journal
        self._pauses_s = pauses_s
        self._queue: deque[Notice] = deque(maxlen=QUEUE_MAX)
        self._change = threading.Condition()
        self._is_busy = False
        self._closing = threading.Event()
        self._thread: threading.Thread | None = None
        self._troubled: set[str] = set()
        self._last = self._left_by_the_last_one(run)

    def look(self, status: Status) -> Status:
        """Tell what has changed since the last status; this one, with its history."""
        status = dated(self._last, status)
        for notice in notices(self._last, status):
            self.tell(notice)
        self._last = status
        return status

    def tell(self, notice: Notice) -> None:
        """Put it into the queue, whose oldest gives way when it is full."""
        if self._receivers() is None:
            return
        with self._change:
            self._queue.append(notice)
            self._change.notify_all()
        if self._thread is None:
            self._thread = threading.Thread(target=self._run, name="herald", daemon=True)
            self._thread.start()

    def close(self, within_s: float = ENDS_WITHIN_S) -> None:
        """Wait until all is told, as long as that is bearable; then tell nothing more."""
        with self._change:
            self._change.wait_for(lambda: not self._queue and not self._is_busy, within_s)
            self._queue.clear()
            self._closing.set()
            self._change.notify_all()

    def _run(self) -> None:
        while True:
            with self._change:
                self._is_busy = False
                self._change.notify_all()
                self._change.wait_for(lambda: self._queue or self._closing.is_set())
                if self._closing.is_set():
                    return
                notice = self._queue.popleft()
                self._is_busy = True
            try:
                self._deliver(notice)
            except (FleetError, OSError) as error:
                self._fails("notify", str(error))

    def _deliver(self, notice: Notice) -> None:
        notify = self._receivers()
        if notify is None:
            return
        if notify.command:
            command = notify.command
            self._try("command", lambda: delivery.run_command(command, notice), notice)
        if notify.webhook:
            url = notify.webhook.url or (self._paths.secrets / WEBHOOK_FILE).read_text().strip()
            self._try("webhook", lambda: delivery.post(url, notice), notice)

    def _try(self, receiver: str, deliver: Callable[[], str], notice: Notice) -> None:
        problem = ""
        for pause_s in (0.0, *self._pauses_s):
            if self._closing.wait(pause_s * random.uniform(0.5, 1.5)):
                return
            problem = deliver()
            if not problem:
                self._troubled.discard(receiver)
                self._journal.write("told", receiver=receiver, about=notice.event)
                return
        self._fails(receiver, problem)

    def _fails(self, receiver: str, problem: str) -> None:
        """Into the journal, once until it works again."""
        if receiver in self._troubled:
            return
        self._troubled.add(receiver)
        try:
            self._journal.write("failed", step=f"notify ({receiver})", error=problem)
        except FleetError:
            return  # a full disk: nobody can be told of that here

    def _receivers(self) -> Notify | None:
        """The spec's, as it is now: it may change while the fleet runs."""
        try:
            spec = read_document(self._spec_file, FleetSpec)
        except FleetError:
            return None
        return spec.notify if spec else None

    def _left_by_the_last_one(self, run: int) -> Status | None:
        try:
            status = read_document(self._paths.status, Status)
        except FleetError:
            return None
        return status if status is not None and status.run == run else None
