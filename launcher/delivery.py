"""One notice to one receiver: a command or a webhook, with a deadline. I/O.

Nothing here tells an address: it may hold a secret, and what went wrong ends in the journal.
"""

import asyncio
import contextlib
import os
import signal
import subprocess

from launcher.notices import Notice

DEADLINE_S = 10.0


def run_command(command: tuple[str, ...], notice: Notice) -> str:
    """Run it with the notice on stdin and in its environment; why that failed, empty if not."""
    told = notice.model_dump(mode="json")
    fields = {f"LAUNCHER_{name.upper()}": _one_word(value) for name, value in told.items()}
    try:
        child = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
            env={**os.environ, **fields},
            cwd="/",
        )
    except OSError as error:
        return f"cannot be started: {error.strerror}"
    try:
        child.communicate(notice.model_dump_json().encode() + b"\n", timeout=DEADLINE_S)
    except subprocess.TimeoutExpired:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(child.pid, signal.SIGKILL)
        child.wait()
        return f"did not end within {DEADLINE_S:.0f} s"
    return f"exited with code {child.returncode}" if child.returncode else ""


def post(url: str, notice: Notice) -> str:
    """POST it as JSON; why that failed, empty if it did not."""
    return asyncio.run(_post(url, notice))


async def _post(url: str, notice: Notice) -> str:
    import aiohttp  # only where there is a webhook: it is large

    limit = aiohttp.ClientTimeout(total=DEADLINE_S)
    try:
        async with aiohttp.ClientSession(timeout=limit, trust_env=True) as session:
            # A redirect would take the notice, and what is secret in its address, elsewhere.
            async with session.post(
                url, json=notice.model_dump(mode="json"), allow_redirects=False
            ) as answer:
                return "" if answer.status < 300 else f"answered {answer.status}"
    except TimeoutError:
        return f"did not answer within {DEADLINE_S:.0f} s"
    except (aiohttp.ClientError, OSError, ValueError) as error:
        return f"cannot be asked ({type(error).__name__})"


def _one_word(value: object) -> str:
    return str(value).replace("\0", " ")
