"""The node's preflight: what it finds out about itself before it takes work. I/O, in a thread."""

import threading
from pathlib import Path

from health import engine, gpu, host
from health.report import Finding, NodeFacts
from launcher.agent.processes import Reaper
from launcher.documents import Checks
from launcher.files import write_text

PROBE_TIMEOUT_S = 60.0


class Preflight:
    """Runs the checks of one assignment once; `facts` is None until it is done."""

    def __init__(self, revision: int, checks: Checks, address: str) -> None:
        self.revision = revision
        self.facts: NodeFacts | None = None
        self._checks = checks
        self._address = address

    def start(self, reaper: Reaper, node_folder: Path, environment: dict[str, str]) -> "Preflight":
        threading.Thread(
            target=self._run,
            args=(reaper, node_folder, environment),
            name="preflight",
            daemon=True,
        ).start()
        return self

    def _run(self, reaper: Reaper, node_folder: Path, environment: dict[str, str]) -> None:
        try:
            self.facts = self._look(reaper, node_folder, environment)
        except Exception as error:  # a broken check must be reported, whatever broke it
            broken = Finding(check="preflight", verdict="unknown", message=repr(error)[:300])
            self.facts = NodeFacts(findings=(broken,))

    def _look(self, reaper: Reaper, node_folder: Path, environment: dict[str, str]) -> NodeFacts:
        checks = self._checks
        findings = [
            host.check_disk(node_folder),
            host.check_shared_memory(host.SHM_NEED_BYTES, only_warn=checks.only_warn),
            host.check_ports(self._address, checks.ports),
        ]
        if checks.model_folder:
            findings.append(host.check_model_folder(checks.model_folder))
        gpus = gpu.count_gpus()
        findings.append(gpu.check_gpu_count(gpus, checks.gpus))
        script = node_folder / "engine-probe.sh"
        write_text(script, checks.probe_script, mode=0o700)
        code, output = reaper.run(["/bin/bash", str(script)], environment, PROBE_TIMEOUT_S)
        versions = engine.parse_probe(output) if code == 0 else None
        findings += engine.judge_engine(versions, checks.executor, output)
        return NodeFacts(findings=tuple(findings), versions=versions or {}, gpus=gpus)
