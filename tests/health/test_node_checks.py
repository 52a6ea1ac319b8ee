"""Checks of the host, by evidence that is changed in one place: each has a case that trips it."""

import pytest

from health import evidence as e
from health.checks.base import Needs
from health.judge import judge
from health.thresholds import Thresholds

GIB = 1024**3
NOW = 1_000_000.0


def host(**changes):
    values = {
        "kernel": "6.1",
        "cpus": 64,
        "memory_total_bytes": 1000 * GIB,
        "memory_available_bytes": 900 * GIB,
        "swap_total_bytes": 0,
        "swap_used_bytes": 0,
        "memlock_bytes": None,
        "open_files": 1_048_576,
        "clock_synchronized": True,
        "clock_error_s": 0.01,
        "stuck_processes": 0,
        **changes,
    }
    return e.Host(**values)


def port(**changes):
    values = {
        "device": "mlx5_0",
        "port": 1,
        "state": "ACTIVE",
        "physical_state": "LinkUp",
        "rate_gbps": 400.0,
        "link_layer": "InfiniBand",
        **changes,
    }
    return e.Port(**values)


FABRIC = e.Infiniband(ports=(port(),), window_s=1.0, peermem=True)


def node(**changes):
    values = {
        "node": "n1",
        "boot_id": "b",
        "level": "passive",
        "taken_at": NOW,
        "took_s": 1.0,
        "host": host(),
        "outcomes": {"host": e.Outcome(status="ok")},
        **changes,
    }
    return e.NodeEvidence(**values)


def found(evidence, needs=None, limits=None):
    return [
        (f.check, f.verdict)
        for f in judge(evidence, needs or Needs(), limits or Thresholds()).findings
        if f.verdict != "healthy"
    ]


def folder(**changes):
    values = {"path": "/x", "purpose": "scratch", "free_bytes": 10 * GIB, "free_inodes": 10}
    return e.Storage(folders=(e.Folder(**{**values, **changes}),))


SOFTWARE = {
    "vllm": "0.32.0",
    "ray": "2.60.0",
    "torch": "2.13.0+cpu",
    "python": "3.11",
    "vllm_command": "/v",
    "ray_command": "/r",
}


def software(**changes):
    versions = {k: v for k, v in {**SOFTWARE, **changes}.items() if v}
    return e.Software(versions=versions)


def test_a_healthy_host_has_no_finding():
    assert found(node(storage=folder(), infiniband=FABRIC, software=software())) == []


RAY = Needs(executor="ray")


@pytest.mark.parametrize(
    ("changes", "needs", "expected"),
    [
        (
            {"host": host(memlock_bytes=8 << 20), "infiniband": FABRIC},
            None,
            ("host.memlock", "unhealthy"),
        ),
        ({"host": host(open_files=1024)}, None, ("host.open_files", "degraded")),
        ({"host": host(memory_available_bytes=5 * GIB)}, None, ("host.memory", "unhealthy")),
        (
            {"host": host(memory_available_bytes=5 * GIB)},
            Needs(shares_machine=True),
            ("host.memory", "degraded"),
        ),
        ({"host": host(swap_total_bytes=10, swap_used_bytes=9)}, None, ("host.swap", "degraded")),
        ({"host": host(stuck_processes=60)}, None, ("host.stuck", "degraded")),
        (
            {"host": host(busy_ports=(20001,), address="10.0.0.1")},
            None,
            ("host.ports", "unhealthy"),
        ),
        ({"storage": folder(free_bytes=1)}, None, ("disk.free", "unhealthy")),
        ({"storage": folder(free_inodes=0)}, None, ("disk.free", "unhealthy")),
        (
            {"storage": folder(error="Permission denied", free_bytes=None)},
            None,
            ("disk.free", "unhealthy"),
        ),
        (
            {"storage": folder(purpose="weights")},
            Needs(weights_bytes=20 * GIB),
            ("disk.free", "unhealthy"),
        ),
        ({"storage": folder(purpose="shm", free_bytes=1)}, None, ("disk.free", "unhealthy")),
        (
            {"storage": folder(purpose="shm", free_bytes=1)},
            Needs(shares_machine=True),
            ("disk.free", "degraded"),
        ),
        (
            {
                "storage": e.Storage(
                    nvmes=(e.Nvme(name="nvme0", state="live", critical_warning=4),)
                )
            },
            None,
            ("nvme.smart", "unhealthy"),
        ),
        ({"mounts": (e.Mount(path="/m", type="nfs", took_s=None),)}, None, ("mount", "unhealthy")),
        ({"mounts": (e.Mount(path="/m", type="nfs", took_s=1.2),)}, None, ("mount", "degraded")),
        (
            {
                "infiniband": e.Infiniband(
                    ports=(port(physical_state="LinkErrorRecovery"),), window_s=1.0
                )
            },
            None,
            ("ib.physical", "degraded"),
        ),
        (
            {
                "infiniband": e.Infiniband(ports=(port(),), window_s=1.0, peermem=False),
                "gpus": e.Gpus(vendor="nvidia", count=0),
            },
            None,
            ("ib.gpudirect", "degraded"),
        ),
        ({"software": software(vllm="", vllm_command="")}, RAY, ("engine", "unhealthy")),
        ({"software": software(ray="")}, RAY, ("engine", "unhealthy")),
        ({"software": software(ray="2.40.0")}, RAY, ("engine", "unhealthy")),
        ({"software": e.Software(versions=None, tail="boom\n")}, RAY, ("engine", "unhealthy")),
        (
            {"software": e.Software(model_error="No such file or directory")},
            None,
            ("model", "unhealthy"),
        ),
        (
            {
                "software": software(torch="2.13.0", vllm="0.32.0"),
                "outcomes": {"gpus": e.Outcome(status="absent")},
            },
            Needs(gpus=8),
            ("gpu.present", "unhealthy"),
        ),
        (
            {
                "kernel": e.KernelLog(
                    lines=(e.KernelLine(at=NOW - 60, kind="nvme_dead", text="x"),)
                )
            },
            None,
            ("kernel.log", "unhealthy"),
        ),
        (
            {"outcomes": {"host": e.Outcome(status="error", detail="boom")}},
            None,
            ("probe.host", "unknown"),
        ),
    ],
)
def test_one_thing_that_is_wrong_is_one_finding(changes, needs, expected):
    assert found(node(**changes), needs) == [expected]


def test_ray_is_not_asked_for_where_nobody_uses_it():
    assert found(node(software=software(ray="", ray_command="")), Needs(executor="mp")) == []


def test_old_lines_of_the_kernel_say_nothing_about_now():
    old = e.KernelLog(lines=(e.KernelLine(at=NOW - 9999, kind="nvme_dead", text="x"),))
    assert found(node(kernel=old)) == []


def test_a_kernel_log_that_may_not_be_read_is_not_covered_and_no_doubt():
    refused = {"kernel": e.Outcome(status="error", detail="PermissionError: /dev/kmsg")}
    facts = judge(node(outcomes=refused))
    assert [f.verdict for f in facts.findings] == ["healthy"]
    state = {one.check: one.state for one in facts.coverage}
    assert state["kernel.log"] == "checker error"


def test_a_port_that_holds_the_default_route_carries_no_collectives():
    slow = port(device="mlx5_9", link_layer="Ethernet", rate_gbps=25.0, netdevs=("eth0",))
    fabric = e.Infiniband(ports=(slow,), window_s=1.0, peermem=True, default_route_netdev="eth0")
    assert found(node(infiniband=fabric)) == []


def test_a_tie_between_rates_blames_no_port():
    two = (port(), port(device="mlx5_1", rate_gbps=200.0))
    assert found(node(infiniband=e.Infiniband(ports=two, window_s=1.0, peermem=True))) == []


def test_an_xid_of_our_own_process_is_the_applications():
    mine = e.Xid(at=NOW - 1, code=31, gpu="0", pid=7, ours=True)
    log = e.KernelLog(xids=(mine, e.Xid(at=NOW - 1, code=45, gpu="0")))
    facts = judge(node(kernel=log))
    (finding,) = [f for f in facts.findings if f.check == "gpu.xid"]
    assert (finding.verdict, finding.advice) == ("degraded", "look at the application")
    assert "(our process)" in finding.message


def used_by_others(visible, needed):
    """GPU 2 of four is in use by somebody else's job."""
    foreign = e.GpuProcess(pid=9, name="train", user="ada", memory_bytes=None, ours=False)
    gpus = tuple(
        e.Gpu(index=i, uuid=f"GPU-{i}", processes=(foreign,) if i == 2 else ()) for i in range(4)
    )
    evidence = node(gpus=e.Gpus(vendor="nvidia", count=4, visible=visible, gpus=gpus))
    return found(evidence, Needs(gpus=needed))


@pytest.mark.parametrize(
    ("visible", "needed", "is_in_use"),
    [
        (None, 4, True),
        (None, 2, False),
        ("2,3", 2, True),
        ("GPU-2", 1, True),
        ("0,1", 2, False),
        ("3,2", 1, False),
        (None, None, True),
    ],
)
def test_what_others_do_on_gpus_that_we_do_not_take_is_no_fault(visible, needed, is_in_use):
    expected = [("gpu.processes", "unhealthy")] if is_in_use else []
    assert used_by_others(visible, needed) == expected


@pytest.mark.parametrize(
    ("visible", "count", "is_fault"),
    [(None, 7, True), (None, 8, False), ("0,1", 2, False), ("0,1", 1, True), ("0,1", 8, False)],
)
def test_a_job_that_sees_its_own_gpus_only_misses_none(visible, count, is_fault):
    gpus = tuple(e.Gpu(index=i) for i in range(count))
    evidence = node(
        gpus=e.Gpus(vendor="nvidia", count=count, pci_count=8, visible=visible, gpus=gpus)
    )
    assert found(evidence) == ([("gpu.count", "unhealthy")] if is_fault else [])
