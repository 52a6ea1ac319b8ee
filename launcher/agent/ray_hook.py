"""Every Python below `ray start` loads this as its sitecustomize: the twin makes Ray's workers.

Ray starts a fresh interpreter for each worker. This one hands its words, environment and output to
the twin of the parked process (ray_twin.py) and waits for the end of what was forked there. Where
no twin takes them it goes on as if this file were not there. Standard library alone.
"""

import array
import contextlib
import importlib
import json
import os
import socket
import sys

_WORKER = "/ray/_private/workers/default_worker.py"
_WITHIN_S = 5.0


def hand_over(folder: str) -> None:
    """Does not come back where the twin took our place."""
    words = sys.orig_argv[1:]
    if not words or not words[0].endswith(_WORKER):
        return
    with contextlib.suppress(OSError, ValueError):
        twin = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        twin.settimeout(_WITHIN_S)
        twin.connect(f"{folder}/twin")
        order = {"words": words, "environment": dict(os.environ), "folder": os.getcwd()}  # noqa: PTH109
        text = json.dumps(order).encode() + b"\n"
        files = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", (0, 1, 2)))]
        sent = twin.sendmsg([text], files)
        twin.sendall(text[sent:])
        if twin.recv(1) != b"+":
            return
        for number in (0, 1, 2):
            os.close(number)  # who reads our output shall see its end when the worker's is closed
        twin.settimeout(None)
        code = twin.recv(4)  # nothing: the twin is gone, and with it the worker
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
