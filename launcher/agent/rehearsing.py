"""The collective check beside the engine's start: run it, keep what it printed. I/O, threaded."""

import threading
from pathlib import Path

from launcher.agent.processes import Reaper
from launcher.documents import Rehearsal
from launcher.errors import StateError
from launcher.files import write_text

PRINTED_MAX = 20_000


class Rehearsing:
    """One run of the check; `printed` is None until it has ended, however it ends."""

    def __init__(
        self, rehearsal: Rehearsal, folder: Path, environment: dict[str, str], reaper: Reaper
    ) -> None:
        self.printed: str | None = None
        self._rehearsal = rehearsal
        self._script = folder / "collective.sh"
        self._environment = environment
        self._reaper = reaper
        threading.Thread(target=self._run, name="rehearsal", daemon=True).start()

    def _run(self) -> None:
        try:
            write_text(self._script, self._rehearsal.script, mode=0o700)
            _, output = self._reaper.run(
                ["/bin/bash", str(self._script)],
                self._environment,
                self._rehearsal.timeout_s,
                self._rehearsal.order.encode() + b"\n",
            )
        except (OSError, StateError) as error:
            output = f"cannot start: {error}"
        self.printed = output[-PRINTED_MAX:]
