"""What a dead engine said: the line of its log that names the cause, and its last lines. Pure."""

import re

# vLLM prefixes its lines with "(EngineCore pid=12) ERROR 11-21 13:00:00 [core.py:1] ".
_PREFIX = re.compile(r"^(\([^)]*\)\s*)?((INFO|WARNING|ERROR|DEBUG)\s[\d\- :]+\[[^\]]*\]\s*)?")
_CAUSE = re.compile(
    r"^([A-Za-z_][\w.]*(Error|Exception|Interrupt)\b.*|.*\bout of memory\b.*"
    r"|vllm: error: .*|.*error: (unrecognized|argument|invalid).*|.*address already in use.*"
    r"|launcher: .*|.*: command not found|.*No such file or directory.*|.*Permission denied.*"
    r"|.*No space left on device.*)",
    re.I,
)
_HEADING = re.compile(r"\d+ validation errors? for \S+$")
# These only report that something else failed before.
_ECHO = re.compile(
    r"RayTaskError|See root cause above|EngineDeadError|Executor failed"
    r"|WorkerProc initialization failed"
    r"|Engine core initialization failed|resource_tracker|SystemExit|KeyboardInterrupt"
    r"|e\.g\., out of memory"  # Ray's guess about an agent of its own that was killed
)
_COLOURS = re.compile(r"\x1b\[[\d;]*m")  # Ray's
# The access log tells of what the gateway and we ask all the time.
_OWN_QUESTION = re.compile(r'"GET /(metrics|health) HTTP')
CAUSE_MAX = 400


def cause(log: str) -> str:
    """The first line that names an error which is not the echo of another; empty if none does."""
    lines = [_PREFIX.sub("", raw).strip() for raw in _COLOURS.sub("", log).splitlines()]
    for number, text in enumerate(lines):
        if _CAUSE.match(text) and not _ECHO.search(text):
            # Below a heading stands what is wrong.
            told = lines[number : number + 2] if _HEADING.search(text) else [text]
            return " ".join(told)[:CAUSE_MAX]
    return ""


def tail(log: str, lines: int = 20, width: int = 500) -> str:
    """Its last lines, but for empty ones and those about our own questions."""
    kept = [
        line.rstrip()[:width]
        for line in _COLOURS.sub("", log).splitlines()
        if line.strip() and not _OWN_QUESTION.search(line)
    ]
    return "\n".join(kept[-lines:])
