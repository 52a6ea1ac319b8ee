"""API keys by name: made, revoked, found. Pure; what is kept of a key is its SHA-256."""

import hashlib

from launcher.errors import UsageError
from launcher.gateway.documents import KEYS_MAX, Key, Keys


def digest(secret: str) -> str:
    return hashlib.sha256(secret.encode()).hexdigest()


def added(keys: Keys, name: str, secret: str, now: float, waiting_max: int | None = None) -> Keys:
    """The ring with one more key. Raises UsageError where its name is taken or it is full."""
    if any(key.name == name for key in keys.keys):
        raise UsageError(
            f"there is a key named {name}", where="key", hint="Revoke it first, or name another."
        )
    free = sorted(set(range(KEYS_MAX)) - {key.slot for key in keys.keys})
    if not free:
        raise UsageError(f"there are {KEYS_MAX} keys already", where="key", hint="Revoke some.")
    try:
        made = Key(
            name=name, sha256=digest(secret), slot=free[0], waiting_max=waiting_max, made_at=now
        )
    except ValueError:
        raise UsageError(
            f"{name!r} is no name for a key",
            where="key",
            hint="Letters, digits and _ . @ - only, 64 at most.",
        ) from None
    return keys.model_copy(update={"keys": (*keys.keys, made)})


def revoked(keys: Keys, name: str) -> Keys:
    """The ring without this key. Raises UsageError where there is none of that name."""
    if all(key.name != name for key in keys.keys):
        known = ", ".join(key.name for key in keys.keys) or "none"
        raise UsageError(f"there is no key named {name}", where="key", hint=f"There are: {known}.")
    return keys.model_copy(update={"keys": tuple(k for k in keys.keys if k.name != name)})


def with_default(keys: Keys, secret: str, now: float) -> Keys:
    """The ring with the fleet's own key, `default`, as the file of it is now; unless revoked."""
    held = next((key for key in keys.keys if key.name == "default"), None)
    if held is not None and held.sha256 == digest(secret):
        return keys
    rest = keys if held is None else revoked(keys, "default")
    return added(rest, "default", secret, now)


def as_map(keys: Keys) -> str:
    """The file in which the front looks a key up."""
    return "".join(f"{key.sha256} {key.name}\n" for key in keys.keys)
