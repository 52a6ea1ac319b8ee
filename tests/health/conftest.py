"""A node on which every probe finds something: simulated GPUs, ports, drives, a kernel log."""

import json
import os
import shutil
import subprocess
import sys

import pytest

from health.evidence import Asked, NodeEvidence
from tests.cluster import hardware


class SimulatedNode:
    """A tree of hardware, looked at by the real probes in a process of their own."""

    def __init__(self, root) -> None:
        self.root = root
        for name in ("nvml", "infiniband", "pci", "nvme"):
            (root / name).mkdir(parents=True)
        (root / "sys/bus/pci").mkdir(parents=True)
        (root / "sys/class").mkdir()
        (root / "sys/module/nvidia_peermem").mkdir(parents=True)
        (root / "sys/bus/pci/devices").symlink_to(root / "pci")
        (root / "sys/class/infiniband").symlink_to(root / "infiniband")
        (root / "sys/class/nvme").symlink_to(root / "nvme")
        (root / "kmsg").write_text("")
        hardware.play_tree(root, "h100", "n1")

    def look(self, **more) -> NodeEvidence:
        asked = Asked(
            node="n1", sysfs=str(self.root / "sys"), kernel_log=str(self.root / "kmsg"), **more
        )
        environment = {
            **os.environ,
            "LD_LIBRARY_PATH": hardware.library_path(),
            "LAUNCHER_TEST_NVML": str(self.root / "nvml/state"),
        }
        answer = subprocess.run(
            [sys.executable, "-m", "health.collect"],
            input=asked.model_dump_json() + "\n",
            env=environment,
            capture_output=True,
            text=True,
            timeout=60,
        )
        assert answer.returncode == 0, answer.stderr
        return NodeEvidence.model_validate(json.loads(answer.stdout))


@pytest.fixture
def node(tmp_path):
    if shutil.which("gcc") is None:
        why = "the stand-in for NVML is compiled, and there is no gcc"
        pytest.fail(why) if os.environ.get("CI") else pytest.skip(why)
    made = SimulatedNode(tmp_path / "hardware")
    yield made
    hardware.stop_ticking(made.root)
