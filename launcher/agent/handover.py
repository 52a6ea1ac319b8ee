"""May a parked process become this engine? What a script told, and what differs. Pure.

Both scripts tell what they are about to start, in the same shell and before any container: so the
difference of the two is what the parked process has to change, wherever it runs.
"""

import contextlib
import json
from collections.abc import Mapping
from dataclasses import dataclass

_TELL, _TOLD = b"LAUNCHER-TELL\0", b"LAUNCHER-TOLD\0"
# Read when an engine starts and not when its modules are imported: looked up in vLLM 0.32, torch
# 2.13, gloo, NCCL and Ray 2.60. Whatever else differs may have been read already.
READ_LATE = frozenset(
    {
        *("VLLM_HOST_IP", "VLLM_PORT", "VLLM_API_KEY", "PYTHONPATH"),
        *("RAY_ADDRESS", "GLOO_SOCKET_IFNAME", "TP_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"),
    }
)
_OURS = "LAUNCHER_"
# By these a process was given the folder of its compile caches when it was parked.
_READ_AT_ONCE = ("LAUNCHER_MODEL", "LAUNCHER_CACHE")
_OF_THE_SHELL = frozenset({"_", "SHLVL", "PWD", "OLDPWD"})
_NAMED = 3


@dataclass(frozen=True)
class Told:
    """The words of a command and its environment."""

    words: tuple[str, ...]
    environment: dict[str, str]


@dataclass(frozen=True)
class Change:
    """How one environment becomes another; `refused` are variables that were read already."""

    put: dict[str, str]
    removed: tuple[str, ...]
    refused: tuple[str, ...]


def split_told(output: bytes) -> tuple[Told, bytes] | None:
    """What a script told and the output after it; None as long as that is not there."""
    _, begun, rest = output.partition(_TELL)
    inner, ended, after = rest.partition(_TOLD)
    if not begun or not ended:
        return None
    parts = [part.decode("utf-8", "surrogateescape") for part in inner.split(b"\0")[:-1]]
    if not parts or not parts[0].isdecimal():
        return None
    count = int(parts[0])
    variables = (part.partition("=") for part in parts[count + 1 :])
    environment = {name: value for name, found, value in variables if found}
    return Told(tuple(parts[1 : count + 1]), environment), after


def change(parked: Mapping[str, str], wanted: Mapping[str, str]) -> Change:
    """From the environment in which a process was parked to that of a start."""
    names = {n for n in {*parked, *wanted} if parked.get(n) != wanted.get(n)}
    names -= {
        n for n in names if n in _OF_THE_SHELL or n.startswith(("LAUNCHER_PARK", "LAUNCHER_TELL"))
    }
    ours = {n for n in names if n.startswith(_OURS) and not n.startswith(_READ_AT_ONCE)}
    late = ours | (names & READ_LATE)
    return Change(
        put={n: wanted[n] for n in sorted(late) if n in wanted},
        removed=tuple(n for n in sorted(late) if n not in wanted),
        refused=tuple(sorted(names - late)),
    )


def refusal(found: Change) -> str:
    """Why not, in words; nothing where nothing is refused. Names only: values may be secret."""
    if not found.refused:
        return ""
    more = f" and {len(found.refused) - _NAMED} more" if len(found.refused) > _NAMED else ""
    return f"{', '.join(found.refused[:_NAMED])}{more} changed since it was parked"


def order(told: Told, found: Change, folder: str, log: str) -> bytes:
    """The one line that a parked process waits for."""
    text = {
        "argv": told.words,
        "set": found.put,
        "unset": found.removed,
        "folder": folder,
        "log": log,
    }
    return json.dumps(text).encode("ascii") + b"\n"


def workers(record: str) -> str:
    """How Ray's workers came to be, in words, from what their twin wrote line by line."""
    told = []
    for line in record.splitlines():
        with contextlib.suppress(ValueError):
            told.append(json.loads(line))
    parked = sum(one.get("started") == "parked" for one in told)
    plain = [one for one in told if one.get("started") == "plain"]
    words = [f"{parked} parked"] if parked else []
    words += [f"{len(plain)} plain: {plain[-1].get('reason', '')}"] if plain else []
    return ", ".join(words)
