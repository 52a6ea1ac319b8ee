"""What a host is told by SSH: folders below its user's home, and command lines. Pure."""

from launcher import __version__, quoting
from launcher.agent.processes import MARK_VARIABLE
from launcher.backends import asking
from launcher.backends.base import Allocation, Question

# Below the host's home: one venv for each version, so that fleets of two versions can coexist.
INSTALL_FOLDER = f".local/share/launcher/{__version__}"
_PYTHON = f"{INSTALL_FOLDER}/venv/bin/python"


def _from_home(arguments: list[str]) -> str:
    """From the home folder, where a non-interactive SSH session begins."""
    return f"cd && {quoting.line(arguments)}"


VERSION = _from_home([_PYTHON, "-m", "launcher.agent", "--version"])


def base(allocation: Allocation, node: str) -> str:
    """Below the host's home, with the node's name, for homes may be shared between hosts; and with
    the mark, for a fleet of the same name may have another state folder."""
    mark = allocation.config.mark[:6]
    own = f"{allocation.run}.{allocation.owner}.a{allocation.number}.{mark}"
    return f".local/state/launcher/{allocation.fleet}/on-{node}/{own}"


def start(allocation: Allocation, node: str) -> str:
    """Start the agent in a session of its own, with the login environment of its user."""
    folder = base(allocation, node)
    log = f"{folder}/nodes/{node}/agent.log"
    agent = [_PYTHON, "-m", "launcher.agent", "--base", folder, "--node", node]
    marked = ["env", f"{MARK_VARIABLE}={allocation.config.mark}/agent", *agent]
    run = f"exec setsid {quoting.line(marked)} </dev/null >>{quoting.word(log)} 2>&1"
    inner = f"cd && umask 077 && {run}"
    return f"nohup bash -lc {quoting.word(inner)} </dev/null >/dev/null 2>&1 &"


def sweep(allocation: Allocation, node: str, folder: str) -> str:
    """End and remove what an allocation left on a host, its folder included."""
    words = [_PYTHON, "-m", "launcher.agent", "--sweep", allocation.config.mark]
    words += ["--base", folder, "--node", node]
    return f"{_from_home(words)}; rm -rf -- {quoting.word(folder)}"


def ask(question: Question) -> str:
    """Put a question that needs no files."""
    feed = quoting.line(["printf", "%s", question.input])
    return f"cd && {feed} | {quoting.line(asking.command(question, _PYTHON))}"


def ask_in(folder: str, question: Question, home: str, node: str) -> str:
    """Put a question whose files lie in this folder."""
    feed = quoting.line(["printf", "%s", question.input])
    variables = asking.environment(question, folder, node)
    words = asking.command(question, f"{home}/{_PYTHON}")
    run = quoting.line(["env", *(f"{key}={value}" for key, value in variables.items()), *words])
    return f"cd {quoting.word(folder)} && {feed} | {run}"
