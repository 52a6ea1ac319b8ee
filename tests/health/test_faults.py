"""Every fault that hardware can be given is found, named and classified; a healthy node is not."""

import pytest

from health.checks.base import Needs
from health.judge import BY_NAME, judge
from tests.cluster import faults

NEEDS = Needs(gpus=8)


def told(facts):
    return [(f.verdict, f.check, f.device, f.message) for f in facts.findings if f.message]


def hardware_findings(facts):
    """Without what the machine that runs the test has to say about itself."""
    return [row for row in told(facts) if not row[1].startswith(("host.", "disk."))]


def unfit_hardware(facts):
    return [f.device for f in facts.unfit if not f.check.startswith(("host.", "disk."))]


@pytest.mark.parametrize("kind", ["h100", "a100", "b200"])
def test_a_healthy_node_of_each_kind_has_no_finding(node, kind):
    from tests.cluster import hardware

    hardware.play_tree(node.root, kind, "n1")
    evidence = node.look()
    assert hardware_findings(judge(evidence, NEEDS)) == []
    assert {name: one.status for name, one in evidence.outcomes.items()} == {
        "gpus": "ok",
        "infiniband": "ok",
        "storage": "ok",
        "host": "ok",
        "kernel": "ok",
        "software": "absent",
    }
    assert evidence.took_s < 2.0


@pytest.mark.parametrize("name", sorted(faults.FAULTS))
def test_a_fault_is_found_named_and_classified(node, name):
    fault = faults.FAULTS[name]
    fault.change(node.root, 3)
    facts = judge(node.look(), NEEDS)
    found = {(f.check, f.device): f for f in facts.findings}
    expected = (fault.check, faults.device_of(fault, 3))
    assert expected in found, told(facts)
    assert found[expected].verdict == fault.verdict
    if fault.advice:
        assert found[expected].advice == fault.advice
    assert facts.verdict in ("unhealthy", fault.verdict)


def test_every_check_of_hardware_has_a_fault_that_trips_it():
    tripped = {fault.check for fault in faults.FAULTS.values()}
    hardware_checks = {name for name in BY_NAME if name.startswith(("gpu.", "ib.", "nvme."))} - {
        "gpu.present",
        "ib.physical",
        "ib.gpudirect",
        "nvme.smart",
    }  # tested below
    assert hardware_checks <= tripped


def test_a_pending_remap_does_not_end_a_serving_replica_and_a_lost_gpu_does(node):
    faults.FAULTS["ecc"].change(node.root, 1)
    serving = Needs(serving=True)
    assert unfit_hardware(judge(node.look(), serving)) == []
    faults.FAULTS["lost"].change(node.root, 1)
    assert unfit_hardware(judge(node.look(), serving)) == ["GPU 1"]


def test_a_hanging_library_costs_its_own_answer_only(node):
    faults.FAULTS["hang"].change(node.root, 0)
    evidence = node.look()
    assert evidence.outcomes["gpus"].status == "timeout"
    assert evidence.infiniband is not None
    assert evidence.took_s < 8


def test_gpus_that_support_no_call_at_all_are_not_covered_and_not_broken(node):
    (node.root / "nvml/state").write_text("gpus 8\n")
    facts = judge(node.look(), Needs())
    assert unfit_hardware(facts) == []
    state = {one.check: one.state for one in facts.coverage}
    assert state["gpu.remap_failed"] == "not applicable"


def test_a_node_without_gpus_is_told_as_not_applicable(node):
    from tests.cluster import hardware

    hardware.clear_tree(node.root)
    facts = judge(node.look(), Needs())
    state = {one.check: one.state for one in facts.coverage}
    assert state["gpu.lost"] == "not applicable"
    assert state["ib.state"] == "not applicable"
    assert state["host.memory"] == "covered"


def test_an_amd_node_is_told_as_not_applicable(node):
    from tests.cluster import hardware

    hardware.clear_tree(node.root)
    device = node.root / "pci/0000:01:00.0"
    device.mkdir()
    (device / "vendor").write_text("0x1002\n")
    (device / "class").write_text("0x120000\n")
    evidence = node.look()
    assert evidence.gpus.vendor == "amd"
    facts = judge(evidence, Needs())
    assert hardware_findings(facts) == []
    covered = {one.check: one for one in facts.coverage}
    assert covered["gpu.lost"].state == "not applicable"
    assert "amd" in covered["gpu.lost"].reason
