"""Put the agent onto bare hosts: a wheel of ourselves and the few packages it needs. I/O.

The hosts need Python 3.11 and SSH; no package index. Wheels are gathered here once for each
version (or given by --wheels), sent by SFTP and installed into a venv that is swapped in whole.
"""

import hashlib
import importlib.metadata
import json
import secrets
import subprocess
import sys
from pathlib import Path
from urllib.parse import unquote, urlparse

from launcher import __version__, quoting
from launcher.backends.ssh_lines import INSTALL_FOLDER
from launcher.errors import BackendError, RemoteError
from launcher.files import make_private
from launcher.paths import state_root
from launcher.remote import Fleet, Host
from launcher.render import template

# What `launcher.agent` imports, and what these import in turn.
AGENT_NEEDS = (
    "pydantic",
    "pydantic-core",
    "annotated-types",
    "typing-extensions",
    "typing-inspection",
    "psutil",
    "nvidia-ml-py",
)
DISTRIBUTION = "fleet-launcher"
PIP_TIMEOUT_S = 600
HOST_DEADLINE_S = 600.0


def gather_wheels() -> Path:
    """A folder with our wheel and those of AGENT_NEEDS, in the versions that run here."""
    folder = make_private(state_root() / "cache" / f"wheels-{__version__}")
    source = _source_folder()
    pinned = [f"{name}=={importlib.metadata.version(name)}" for name in AGENT_NEEDS]
    ours = str(source) if source else f"{DISTRIBUTION}=={__version__}"
    for old in folder.glob("fleet_launcher-*.whl"):
        old.unlink()  # a source tree changes without a new version
    _pip("wheel", "--no-deps", "--wheel-dir", str(folder), ours)
    have = {wheel.name.split("-")[0].lower().replace("_", "-") for wheel in folder.glob("*.whl")}
    missing = [pin for pin in pinned if pin.split("==")[0] not in have]
    if missing:
        _pip("wheel", "--no-deps", "--wheel-dir", str(folder), *missing)
    return folder


def checksum(wheels: Path) -> str:
    """One line that is equal for equal sets of wheels."""
    whole = hashlib.sha256()
    for wheel in sorted(wheels.glob("*.whl")):
        whole.update(wheel.name.encode() + b"\0" + hashlib.sha256(wheel.read_bytes()).digest())
    return whole.hexdigest()


def install(fleet: Fleet, names: list[str], wheels: Path) -> dict[str, str | RemoteError]:
    """Install on all named hosts in parallel; "installed", "present" or the error, for each."""
    files = {wheel.name: wheel.read_bytes() for wheel in sorted(wheels.glob("*.whl"))}
    if not any(name.startswith("fleet_launcher-") for name in files):
        raise BackendError("holds no wheel of fleet-launcher", where=str(wheels))
    total = checksum(wheels)

    def one(host: Host) -> str:
        # Homes may be shared, and two may install at once: each sends to a folder of its own.
        staging = f"{INSTALL_FOLDER}/wheels-{host.node.name}-{secrets.token_hex(4)}"
        home = host.home()
        for name, content in files.items():
            host.write(f"{home}/{staging}/{name}", content)
        host.write(f"{home}/{staging}/SUM", total.encode())
        script = f"{home}/{staging}/bootstrap.sh"
        host.write(script, template("bootstrap.sh").encode(), mode=0o700)
        command = quoting.line(["bash", script, INSTALL_FOLDER, __version__, staging])
        answer = host.run(
            f"{command}; code=$?; cd && rm -rf -- {quoting.word(staging)}; exit $code",
            timeout_s=HOST_DEADLINE_S,
        )
        if answer.code != 0:
            said = answer.errors.strip()[-500:] or f"exit code {answer.code}"
            raise RemoteError("failed", f"bootstrap failed: {said}", where=host.node.name)
        return answer.output.strip()

    return fleet.each(names, one, HOST_DEADLINE_S)


def _pip(*arguments: str) -> None:
    command = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check", *arguments]
    try:
        result = subprocess.run(
            command, capture_output=True, text=True, timeout=PIP_TIMEOUT_S, check=False
        )
    except subprocess.TimeoutExpired as error:
        raise BackendError("pip did not end in time", where="bootstrap") from error
    if result.returncode:
        raise BackendError(
            f"wheels could not be gathered: {result.stderr.strip()[-500:]}",
            where="bootstrap",
            hint="Without a package index here, name a folder of wheels with --wheels.",
        )


def _source_folder() -> Path | None:
    """The source tree that this installation points to, if it is an editable one."""
    text = importlib.metadata.distribution(DISTRIBUTION).read_text("direct_url.json")
    if not text:
        return None
    url = json.loads(text).get("url", "")
    folder = Path(unquote(urlparse(url).path))
    return folder if url.startswith("file:") and (folder / "pyproject.toml").is_file() else None
