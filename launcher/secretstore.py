"""A fleet's secrets: files of mode 0600, never in argv, scripts, logs or reports. I/O."""

import os
import secrets
import stat
from pathlib import Path

from launcher.errors import SpecError
from launcher.files import make_private, write_text
from launcher.spec import FleetSpec, SecretSource

SECRET_MAX_BYTES = 64 * 1024
WEBHOOK_FILE = "webhook-url"  # no variable of a user's secret can have this name


def provide(spec: FleetSpec, folder: Path) -> None:
    """Put every secret that the fleet needs into its folder. Raises SpecError for a missing one.

    The API key is the clients' and stays the same for the fleet's life. The engines have one of
    their own, which only the gateway knows; it and the other tokens are made anew for each run.
    """
    make_private(folder)
    if not (folder / "api_key").is_file():
        write_text(folder / "api_key", f"sk-{secrets.token_urlsafe(32)}\n")
    for name in ("engine_key", "agent_token", "ray_token"):
        write_text(folder / name, secrets.token_hex(32))
    for name, source in spec.secrets.items():
        write_text(folder / name, _value(name, source) + "\n")
    provide_changed(spec, folder)


def provide_changed(spec: FleetSpec, folder: Path) -> None:
    """The secrets that may change while the fleet runs, as the spec names them now: the key of
    the fallback, the address of the webhook."""
    fallback, notify = spec.gateway.fallback, spec.notify
    _follow(folder, "fallback_key", fallback.key if fallback else None)
    webhook = notify.webhook.source if notify and notify.webhook else None
    _follow(folder, WEBHOOK_FILE, webhook)


def _follow(folder: Path, name: str, source: SecretSource | None) -> None:
    path = folder / name
    if source is None:
        path.unlink(missing_ok=True)  # of an earlier one: another receiver must not see it
        return
    value = _value(name, source)
    if name == WEBHOOK_FILE and not value.startswith(("https://", "http://")):
        raise SpecError("what is there is no http(s) address", where="notify.webhook")
    write_text(path, value + "\n")


def _value(name: str, source: SecretSource) -> str:
    if source.env is None:
        return _read_secret_file(Path(source.file or ""), name).strip()
    value = os.environ.get(source.env)
    if not value:
        raise SpecError(
            f"the variable {source.env} is not set here",
            where=f"secrets.{name}",
            hint=f"export {source.env}=… and run the command again.",
        )
    return value.strip()


def _read_secret_file(path: Path, name: str) -> str:
    where = f"secrets.{name}: {path}"
    try:
        found = path.stat()
        if found.st_size > SECRET_MAX_BYTES:
            raise SpecError("is too large for a secret", where=where)
        if found.st_mode & (stat.S_IRWXG | stat.S_IRWXO):
            raise SpecError("can be read by others", where=where, hint=f"chmod 600 {path}")
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise SpecError(f"cannot be read: {error}", where=where) from error
