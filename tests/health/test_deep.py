"""What the deep level printed, and what is concluded from it."""

import json
import subprocess
import sys
from pathlib import Path

from health import deep
from health.deep import Burned
from health.thresholds import Thresholds

LIMITS = Thresholds()
GOOD = {"flops": 1e12, "products": 10, "differing": 0, "memory_changed": 0}


def burned(**changes):
    return Burned(devices={"cuda:0": {**GOOD, **changes}}, done=True)


def conclude(node, rates=None):
    peers = {"b": burned(), "c": burned(), "d": burned()}
    found = deep.conclude({"a": node, **peers}, rates or {}, LIMITS)
    return {node: [(f.check, f.device, f.verdict) for f in all_] for node, all_ in found.items()}


def test_four_equal_nodes_have_no_finding():
    assert conclude(burned()) == {}


def test_a_product_that_changes_and_memory_that_forgets_are_broken():
    assert conclude(burned(differing=1)) == {"a": [("deep.compute", "cuda:0", "unhealthy")]}
    assert conclude(burned(memory_changed=4096)) == {"a": [("deep.memory", "cuda:0", "unhealthy")]}


def test_a_device_that_falls_behind_its_peers_is_slow():
    assert conclude(burned(flops=0.8e12)) == {"a": [("deep.compute", "cuda:0", "degraded")]}


def test_a_burn_that_does_not_end_is_a_fault_and_one_that_does_not_begin_is_not():
    unended = Burned(devices={"cuda:0": GOOD}, done=False)
    assert conclude(unended) == {"a": [("deep.burn", "", "unhealthy")]}
    assert conclude(Burned(problem="no torch")) == {"a": [("deep.burn", "", "unknown")]}


def test_a_drive_that_reads_slowly_is_told():
    rates = {"a": 1e9, "b": 6e9, "c": 6.1e9, "d": 5.9e9}
    assert conclude(burned(), rates) == {"a": [("deep.read_rate", "", "degraded")]}


def test_dcgms_failures_are_read():
    answer = {
        "DCGM Diagnostic": {
            "test_categories": [
                {
                    "category": "Hardware",
                    "tests": [
                        {
                            "name": "Memory",
                            "results": [
                                {"gpu_id": "0", "status": "Pass"},
                                {"gpu_id": "3", "status": "Fail"},
                            ],
                        }
                    ],
                }
            ]
        }
    }
    text = deep.MARK + json.dumps({"kind": "dcgm", "answer": answer})
    assert deep.parse(text).dcgm_failed == ("DCGM test Memory failed on GPU 3",)


def test_a_burn_without_torch_says_so(tmp_path):
    program = Path(__file__).parents[2] / "health/collective/burn.py"
    answer = subprocess.run(
        [sys.executable, str(program)], input='{"seconds": 0.1}\n', capture_output=True, text=True
    )
    assert "No module named 'torch'" in deep.parse(answer.stdout + answer.stderr).problem


def test_a_node_whose_gpus_reduce_slowly_is_named_and_a_failing_tool_is_no_fault():
    peers = {name: Burned({"cuda:0": GOOD}, done=True, bus_gb_s=470.0) for name in "bcd"}
    slow = Burned({"cuda:0": GOOD}, done=True, bus_gb_s=210.0)
    found = deep.conclude({"a": slow, **peers}, {}, LIMITS)
    assert [(n, f[0].check, f[0].verdict) for n, f in found.items()] == [
        ("a", "deep.nccl", "unhealthy")
    ]
    broken = Burned({"cuda:0": GOOD}, done=True, nccl_error="no CUDA-capable device")
    found = deep.conclude({"a": broken, **peers}, {}, LIMITS)
    assert [(n, f[0].verdict) for n, f in found.items()] == [("a", "unknown")]


def test_nccl_tests_are_run_where_they_are_installed(tmp_path):
    tool = tmp_path / "all_reduce_perf"
    tool.write_text('#!/bin/sh\necho "# Avg bus bandwidth    : 471.25 "\n')
    tool.chmod(0o755)
    source = "import sys; sys.path.insert(0, sys.argv[1]); import burn; burn.reduce_inside(8, 1)"
    folder = Path(__file__).parents[2] / "health/collective"
    answer = subprocess.run(
        [sys.executable, "-c", source, str(folder)],
        capture_output=True,
        text=True,
        env={"PATH": f"{tmp_path}:/usr/bin:/bin"},
    )
    assert deep.parse(answer.stdout).bus_gb_s == 471.25, answer.stderr
