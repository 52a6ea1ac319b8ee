"""The controller's keeper: starts it again when it has died. I/O but for `is_due`.

Controller and gateway look after each other: the controller starts the gateway's supervisor, and
the supervisor, which lives as long as the fleet serves, starts the controller. A fleet whose run
is over needs neither.
"""

import logging
import time

from launcher import driving
from launcher.errors import FleetError
from launcher.files import read_document
from launcher.paths import FleetPaths
from launcher.status import Status
from launcher.wish import is_driven, read_wish

LOOK_EVERY_S = 2.0
MISSING_FOR_S = 3.0  # one that has just been killed on purpose may have its successor already
PAUSES_S = (0.0, 5.0, 15.0, 60.0, 300.0)
FORGOTTEN_AFTER_S = 3600.0

log = logging.getLogger("launcher.gateway")


class Keeper:
    def __init__(self, paths: FleetPaths) -> None:
        self._paths = paths
        self._missing_since: float | None = None
        self._starts: list[float] = []

    def look(self) -> None:
        """Start the controller where it is wanted, missing, and not started too often. May wait
        for seconds when it ran on another host."""
        try:
            if not self.is_wanted() or is_driven(self._paths):
                self._missing_since = None
                return
            now = time.monotonic()
            self._missing_since = self._missing_since or now
            if now - self._missing_since < MISSING_FOR_S or not is_due(self._starts, now):
                return
            wish = read_wish(self._paths)
            if wish is not None:
                self._starts.append(now)
                log.warning("no controller drives the fleet; starting one")
                driving.start(self._paths, wish)
        except (FleetError, OSError) as error:
            log.error("the controller could not be looked after: %s", error)

    def is_wanted(self) -> bool:
        return is_wanted(self._paths)


def is_wanted(paths: FleetPaths) -> bool:
    """Whether there is a run that is not over. Raises StateError."""
    wish = read_wish(paths)
    if wish is None:
        return False
    status = read_document(paths.status, Status)
    return status is None or status.run != wish.run or not status.finished


def is_due(starts: list[float], now: float) -> bool:
    """Whether one may be started now: the more were needed of late, the longer it waits. Pure."""
    recent = [at for at in starts if now - at < FORGOTTEN_AFTER_S]
    pause_s = PAUSES_S[min(len(recent), len(PAUSES_S) - 1)]
    return not recent or now - recent[-1] >= pause_s
