"""Evidence of a stall or a loss, kept before the engine is gone: what its processes did. I/O.

Files in NODE/evidence/g<generation>/, none with a secret: about.txt, processes.txt (state,
threads, where each waits in the kernel), commands.txt, the end of every log, health.json,
stacks.txt (by py-spy, where there is one). Gathered in a thread, which nobody awaits for longer
than WITHIN_S: a process that hangs may block even who only reads its command line, so that comes
late.
"""

import contextlib
import re
import shutil
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from launcher.agent import lastwords
from launcher.agent.suspects import name_and_state
from launcher.errors import StateError
from launcher.files import make_private, read_tail, write_text

WITHIN_S = 8.0
STACK_WITHIN_S = 3.0
KEPT = 5
LOG_LINES = 200
LINE_MAX = 2000
LOG_READ_BYTES = 1024 * 1024
FILE_READ_BYTES = 64 * 1024
PROCESSES_MAX = 128
THREADS_MAX = 512
STACKS_MAX = 16
SHORTEST_SECRET = 8
_SECRET_NAME = re.compile(r"(token|key|secret|password|passwd|credential)s?$", re.I)
_SECRET_WORD = re.compile(r"^(--?[\w.-]*(?:token|key|secret|password|passwd))(=.*)?$", re.I)

RunProgram = Callable[[list[str], float], tuple[int, str]]


@dataclass(frozen=True)
class Subject:
    """What to look at. `run` starts a short program (for stacks); None where there is no time."""

    folder: Path
    why: str
    pids: tuple[int, ...]
    logs: tuple[Path, ...] = ()
    health_json: str = ""
    secrets: dict[str, str] = field(default_factory=dict)
    run: RunProgram | None = None


class Bundle:
    """One folder of evidence, in the making."""

    def __init__(self, subject: Subject) -> None:
        self._subject = subject
        self._notes: list[str] = []
        self._began_at = time.monotonic()
        self._thread = threading.Thread(target=self._gather, name="bundle", daemon=True)
        self._seen = threading.Event()
        self.problem = ""

    @property
    def folder(self) -> Path:
        return self._subject.folder

    def start(self, within_s: float = 0.0) -> None:
        """Begin; returns once the processes were looked at, or after so many seconds."""
        self._began_at = time.monotonic()
        self._thread.start()
        self._seen.wait(within_s)

    @property
    def is_over(self) -> bool:
        """Whether it is made, or has had its time."""
        return not self._thread.is_alive() or self._left_s() <= 0

    def _left_s(self) -> float:
        return self._began_at + WITHIN_S - time.monotonic()

    def _gather(self) -> None:
        subject = self._subject
        processes = self._processes()
        self._seen.set()
        try:
            _make_room(subject.folder)
            self._write("processes.txt", processes)
            for log in subject.logs:
                end = lastwords.tail(read_tail(log, LOG_READ_BYTES), LOG_LINES, LINE_MAX)
                self._write(f"log-{log.name.removesuffix('.log')}.txt", end)
            if subject.health_json:
                self._write("health.json", subject.health_json)
            self._write("about.txt", self._about())
            self._write("commands.txt", "\n".join(map(_command, subject.pids)))
            if subject.run is not None:
                self._write("stacks.txt", self._stacks(subject.run))
            else:
                self._notes.append("stacks: no time, the engine was being ended already")
            self._write("about.txt", self._about())
        except (StateError, OSError) as error:
            self.problem = str(error)

    def _about(self) -> str:
        when = time.strftime("%Y-%m-%d %H:%M:%S %z")
        took_s = WITHIN_S - self._left_s()
        rows = [self._subject.why, f"written {when}, after {took_s:.1f} s", *self._notes]
        return "\n".join(rows)

    def _write(self, name: str, text: str) -> None:
        write_text(
            self._subject.folder / name, without_secrets(text, self._subject.secrets) + "\n"
        )

    def _processes(self) -> str:
        pids = self._subject.pids
        if not pids:
            self._notes.append("processes: none was there any more")
        if len(pids) > PROCESSES_MAX:
            self._notes.append(f"processes: the first {PROCESSES_MAX} of {len(pids)}")
        return "\n\n".join(_process(pid) for pid in pids[:PROCESSES_MAX])

    def _stacks(self, run: RunProgram) -> str:
        """Python stacks without stopping anybody: a stuck engine keeps still by itself."""
        parts = []
        for pid in [pid for pid in self._subject.pids if _is_python(pid)][:STACKS_MAX]:
            program = _py_spy(pid)
            left_s = min(STACK_WITHIN_S, self._left_s() - 0.5)
            if program is None:
                parts.append(f"== process {pid}: no py-spy on its PATH or on ours")
                continue
            if left_s <= 0:
                parts.append(f"== process {pid}: no time left")
                continue
            try:
                code, output = run([program, "dump", "--nonblocking", "--pid", str(pid)], left_s)
            except OSError as error:
                code, output = -1, str(error)
            parts.append(f"== process {pid}: py-spy ended with {code}\n{output.strip()}")
        return "\n\n".join(parts)


def without_secrets(text: str, secrets: dict[str, str]) -> str:
    """By value, as engines write strange things into their logs; the longest first."""
    for name, value in sorted(secrets.items(), key=lambda item: -len(item[1])):
        if len(value) >= SHORTEST_SECRET:
            text = text.replace(value, f"<secret {name}>")
    return text


def secrets_in(environment: dict[str, str]) -> dict[str, str]:
    """The variables of a user's environment that are secrets by their name."""
    return {name: value for name, value in environment.items() if _SECRET_NAME.search(name)}


def masked(words: list[str]) -> list[str]:
    """A command line without the values of arguments that are secrets by their name."""
    shown: list[str] = []
    hide_next = False
    for word in words:
        found = _SECRET_WORD.match(word)
        if hide_next and not word.startswith("-"):
            shown.append("<secret>")
            hide_next = False
            continue
        hide_next = bool(found and not found[2])
        shown.append(f"{found[1]}=<secret>" if found and found[2] else word)
    return shown


def _make_room(folder: Path) -> None:
    """A fresh folder; of earlier generations the newest stay."""
    make_private(folder.parent)
    shutil.rmtree(folder, ignore_errors=True)
    earlier = sorted(folder.parent.iterdir(), key=lambda one: one.stat().st_mtime, reverse=True)
    for old in earlier[KEPT - 1 :]:
        shutil.rmtree(old, ignore_errors=True)
    make_private(folder)


def _process(pid: int) -> str:
    seen = name_and_state(pid)
    if seen is None:
        return f"== process {pid} has ended"
    parts = [f"== process {pid} ({seen[1]}), state {seen[2]}"]
    parts += [
        f"-- {name}\n{_read(f'/proc/{pid}/{name}')}" for name in ("status", "wchan", "stack")
    ]
    parts.append("-- threads: id, name, state, where it waits in the kernel")
    threads: list[int] = []
    with contextlib.suppress(OSError):
        threads = sorted(int(folder.name) for folder in Path(f"/proc/{pid}/task").iterdir())
    for thread in threads[:THREADS_MAX]:
        one = name_and_state(pid, thread)
        if one is not None:
            where = _read(f"/proc/{pid}/task/{thread}/wchan")
            parts.append(f"{one[0]} {one[1]} {one[2]} {where}")
    return "\n".join(parts)


def _read(path: str) -> str:
    try:
        with open(path, "rb") as file:
            return file.read(FILE_READ_BYTES).decode("utf-8", "replace").strip()
    except OSError as error:
        return f"({error.strerror})"


def _command(pid: int) -> str:
    words = [word for word in _read(f"/proc/{pid}/cmdline").split("\0") if word]
    return f"{pid} {' '.join(masked(words)) or '(ended, or it hides its words)'}"


def _is_python(pid: int) -> bool:
    try:
        return "python" in Path(f"/proc/{pid}/exe").readlink().name
    except OSError:
        return False


def _py_spy(pid: int) -> str | None:
    """Where a py-spy is: on the process's own PATH (its venv is on it), or on ours."""
    rows = _read(f"/proc/{pid}/environ").split("\0")
    theirs = next((row.removeprefix("PATH=") for row in rows if row.startswith("PATH=")), "")
    return shutil.which("py-spy", path=theirs) or shutil.which("py-spy")
