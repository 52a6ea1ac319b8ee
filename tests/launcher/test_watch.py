"""The agent's look at its own node: what it does when something of it is missing."""

import os

import pytest

from health.evidence import NodeEvidence, Outcome, Xid
from launcher.agent.checks import Watch
from launcher.agent.processes import Reaper
from launcher.documents import Checks
from tests.launcher.fleets import eventually

CHECKS = Checks(
    probe_script="#!/bin/bash\nexit 1\n",
    executor="mp",
    model_folder=None,
    ports=(),
    gpus=1,
    shares_machine=True,
)


@pytest.fixture
def watch():
    made = Watch(Reaper(), dict(os.environ), "n1", "no-mark")
    yield made
    made.stop()


def test_xids_count_where_the_kernel_log_may_not_be_read(watch):
    """An ordinary user learns of them by NVML only."""
    refused = Outcome(status="error", detail="PermissionError: /dev/kmsg")
    evidence = NodeEvidence(
        node="n1",
        boot_id="b",
        level="passive",
        taken_at=100.0,
        took_s=0.1,
        outcomes={"kernel": refused},
    )
    watch._xids = [Xid(at=99.0, code=79, gpu="3")]
    (finding,) = watch._judged(evidence, watch._needs).unfit
    assert (finding.check, finding.device, finding.advice) == ("gpu.xid", "GPU 3", "reboot")


def test_a_folder_that_cannot_be_written_is_the_nodes_fault_and_ends_nothing(watch, tmp_path):
    watch.preflight(1, CHECKS, "127.0.0.1", tmp_path / "gone")
    assert eventually(lambda: not watch.is_looking)
    (finding,) = watch.facts.unfit
    assert finding.check == "disk.free"
    watch.preflight(2, CHECKS, "127.0.0.1", tmp_path)
    assert eventually(lambda: not watch.is_looking)
    assert "engine" in {finding.check for finding in watch.facts.unfit}


def test_probes_that_were_killed_are_started_again(watch, tmp_path):
    assert eventually(lambda: watch._child is not None)
    watch._child.kill()
    watch._child.wait()
    watch.preflight(1, CHECKS, "127.0.0.1", tmp_path)
    assert eventually(lambda: not watch.is_looking)
    assert "engine" in {finding.check for finding in watch.facts.unfit}
