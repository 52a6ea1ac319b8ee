"""How a question is put to a node, the same for every backend: command and environment. Pure."""

from launcher.backends.base import Question

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
