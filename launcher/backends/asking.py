"""How a question is put to a node, the same for every backend. `answer_here` does I/O."""

import os
import subprocess
import sys
from pathlib import Path

from launcher.backends.base import Question
from launcher.files import write_text

PROBES = "probes"


def command(question: Question, python: str) -> list[str]:
    """The words to run in the question's folder."""
    if question.program == PROBES:
        return [python, "-m", "health.collect"]
    return ["/bin/bash", question.program]


def environment(question: Question, folder: str, node: str) -> dict[str, str]:
    """What rendered scripts read; no fleet runs yet, so all of it is one scratch folder."""
    return {
        "LAUNCHER_NODE": node,
        "LAUNCHER_TMP": folder,
        "LAUNCHER_BASE": folder,
        "LAUNCHER_CACHE": folder,
        **question.environment,
    }


def answer_here(question: Question, folder: str, node: str, deadline_s: float) -> tuple[str, str]:
    """Run the program on this machine; what it printed, and its errors.

    Raises subprocess.TimeoutExpired and StateError.
    """
    for name, text in question.files.items():
        write_text(Path(folder) / name, text, mode=0o700)
    result = subprocess.run(
        command(question, sys.executable),
        input=question.input,
        env={**os.environ, **environment(question, folder, node)},
        cwd=folder,
        capture_output=True,
        text=True,
        errors="replace",
        timeout=deadline_s,
        check=False,
    )
    return result.stdout, result.stderr
