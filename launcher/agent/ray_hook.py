"""Every Python below `ray start` loads this as its sitecustomize: the twin makes Ray's processes.

Ray starts a fresh interpreter for each worker and helper. This one hands its words,
environment and output to the twin of the parked process (ray_twin.py), and stays in the place of
what was forked there: it passes signals on, and ends as that one ends. Where no twin takes it over
it goes on as if this file were not there. Standard library alone.
"""

import array
import contextlib
import importlib
import json
import os
import signal
import socket
import sys

_OF_RAY = (
    *("/_private/workers/default_worker.py", "/_private/workers/setup_worker.py"),
    *("/_private/log_monitor.py", "/dashboard/dashboard.py"),
)
_CLIENT_SERVER = ["-m", "ray.util.client.server"]
# A raylet's agents know by the end of their input that it is over; or else by their parent, which
# the twin would be.
_AGENTS = ("/dashboard/agent.py", "/_private/runtime_env/agent/main.py")
_BY_INPUT = "RAY_enable_pipe_based_agent_to_parent_health_check"
_WITHIN_S = 5.0


def hand_over(folder: str) -> None:
    """Does not come back where the twin took our place."""
    words = [word for word in sys.orig_argv[1:] if word != "-u"]
    if not is_known(words):
        return
    with contextlib.suppress(OSError, ValueError):
        twin = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        twin.settimeout(_WITHIN_S)
        twin.connect(f"{folder}/twin")
        order = {
            "words": words,
            "environment": dict(os.environ),
            "folder": os.getcwd(),  # noqa: PTH109
            "pids": os.readlink("/proc/self/ns/pid"),  # noqa: PTH115
            "oom_score_adj": read("/proc/self/oom_score_adj"),
        }
        text = json.dumps(order).encode() + b"\n"
        files = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", (0, 1, 2)))]
        sent = twin.sendmsg([text], files)
        twin.sendall(text[sent:])
        if twin.recv(1) != b"+":
            return
        twin.sendall(b"!")  # from here on it is one of us, and it is the twin's
        stay(twin)


def read(path: str) -> str:
    with open(path, encoding="ascii") as file:
        return file.read().strip()


def is_known(words: list[str]) -> bool:
    """Whether these are a process of Ray that runs Python: its words after the interpreter's."""
    if not words:
        return False
    if os.path.basename(words[0]) == "ray":  # noqa: PTH119
        return words[1:2] == ["start"]
    agents = _AGENTS if os.environ.get(_BY_INPUT) == "1" else ()
    scripts = tuple(f"/ray{name}" for name in (*_OF_RAY, *agents))
    return words[0].endswith(scripts) or words[:2] == _CLIENT_SERVER


def stay(twin: socket.socket) -> None:
    """Until the process that was forked for us is over. Does not come back."""
    twin.settimeout(None)
    for passed_on in (signal.SIGTERM, signal.SIGINT):
        signal.signal(passed_on, lambda number, _: twin.send(bytes([number])))
    for number in (0, 1, 2):
        os.close(number)  # who reads our output shall see its end when the other's is closed
    code = twin.recv(1)  # nothing: the twin is gone, and with it what it forked
    os._exit(code[0] if code else 1)


def _be_as_if_not_there(folder: str) -> None:
    """Load the sitecustomize that would have been loaded without us."""
    sys.path[:] = [one for one in sys.path if one != folder]
    ours = sys.modules.pop("sitecustomize", None)
    try:
        importlib.import_module("sitecustomize")
    except ModuleNotFoundError as error:
        if error.name != "sitecustomize":
            raise
    finally:
        if ours is not None:
            sys.modules.setdefault("sitecustomize", ours)


if __name__ == "sitecustomize":
    _folder = os.path.dirname(os.path.abspath(__file__))  # noqa: PTH100, PTH120
    hand_over(_folder)
    _be_as_if_not_there(_folder)
