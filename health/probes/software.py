"""The engine's own environment and the model, as this node sees them. I/O."""

import contextlib
import hashlib
import subprocess
from pathlib import Path

from health.engine import parse_probe
from health.evidence import Asked, Software

PROBE_TIMEOUT_S = 60.0
_END_BYTES = 1024**2
_CONFIGS = ("config.json", "model.safetensors.index.json", "tokenizer_config.json")


def read_software(asked: Asked) -> Software | None:
    """Versions from the engine's interpreter, and a fingerprint of the model's small files."""
    if not asked.probe_script and not asked.model_folder:
        return None
    versions, tail, model_error = None, "", ""
    if asked.probe_script:
        result = subprocess.run(
            ["/bin/bash", asked.probe_script],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            timeout=PROBE_TIMEOUT_S,
            check=False,
        )
        output = result.stdout.decode(errors="replace")
        versions = parse_probe(output) if result.returncode == 0 else None
        tail = output[-2000:]
    if asked.model_folder:
        try:
            fingerprint = model_fingerprint(Path(asked.model_folder))
            versions = {**versions, "model": fingerprint} if versions is not None else None
        except OSError as error:
            model_error = error.strerror or str(error)
    if asked.image and versions is not None:
        with contextlib.suppress(OSError):  # the engine's probe has said that it is not there
            versions = {**versions, "image": image_fingerprint(Path(asked.image))}
    return Software(versions=versions, tail=tail, model_error=model_error)


def image_fingerprint(image: Path) -> str:
    """A short hash of an image's size and both ends: whole images have tens of gigabytes, and two
    builds differ in their headers and tables. Raises OSError."""
    size = image.stat().st_size
    digest = hashlib.sha256(str(size).encode())
    with image.open("rb") as file:
        digest.update(file.read(_END_BYTES))
        file.seek(max(0, size - _END_BYTES))
        digest.update(file.read(_END_BYTES))
    return digest.hexdigest()[:12]


def model_fingerprint(folder: Path) -> str:
    """A short hash of the configuration and the weights' names and sizes: revision, not content.
    Raises OSError where config.json is not there or cannot be read."""
    digest = hashlib.sha256((folder / "config.json").read_bytes())
    for name in _CONFIGS[1:]:
        if (folder / name).is_file():
            digest.update((folder / name).read_bytes())
    for path in sorted(folder.glob("*.safetensors")):
        digest.update(f"{path.name} {path.stat().st_size}\n".encode())
    return digest.hexdigest()[:12]
