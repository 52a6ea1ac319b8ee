import socket

import pytest

from health import engine, gpu, host


def test_a_port_that_somebody_listens_on_is_busy_and_its_neighbours_are_not():
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        found = host.check_ports("127.0.0.1", [port])
        assert found.verdict == "unhealthy"
        assert str(port) in found.message
    assert host.check_ports("127.0.0.1", [port]).verdict == "healthy"


def test_an_address_that_is_not_ours_has_no_free_port():
    assert host.check_ports("203.0.113.1", [20000]).verdict == "unhealthy"


def test_too_little_disk_is_unfit_and_a_missing_folder_is_unknown(tmp_path):
    assert host.check_disk(tmp_path).verdict == "healthy"
    assert host.check_disk(tmp_path, need_bytes=10**18).verdict == "unhealthy"
    assert host.check_disk(tmp_path / "none").verdict == "unknown"


def test_small_shared_memory_only_warns_where_it_may():
    assert host.check_shared_memory(10**18, only_warn=True).verdict == "degraded"
    assert host.check_shared_memory(10**18, only_warn=False).verdict == "unhealthy"


def test_a_model_folder_that_this_node_does_not_see_is_unfit(tmp_path):
    assert host.check_model_folder(str(tmp_path)).verdict == "unhealthy"
    (tmp_path / "config.json").write_text("{}")
    assert host.check_model_folder(str(tmp_path)).verdict == "healthy"


@pytest.mark.parametrize(
    ("found", "needed", "verdict"), [(None, 8, "unknown"), (7, 8, "unhealthy"), (8, 8, "healthy")]
)
def test_gpus_are_counted_and_no_answer_is_neither_pass_nor_fail(found, needed, verdict):
    assert gpu.check_gpu_count(found, needed).verdict == verdict


FULL = {"vllm": "0.32.0", "vllm_command": "/v", "ray": "2.60.0", "ray_command": "/r"}


@pytest.mark.parametrize(
    ("versions", "executor", "told"),
    [
        (None, "mp", "did not start"),
        ({}, "mp", "vLLM is not"),
        ({k: v for k, v in FULL.items() if "ray" not in k}, "ray", "Ray is not"),
        ({**FULL, "ray": "2.40.0"}, "ray", "no token authentication"),
    ],
)
def test_an_engine_environment_that_lacks_something_is_unfit(versions, executor, told):
    (finding,) = engine.judge_engine(versions, executor, "boom\n")
    assert finding.verdict == "unhealthy"
    assert told in finding.message
    assert finding.hint


def test_ray_is_not_needed_for_vllms_own_multi_node_mode():
    without = {k: v for k, v in FULL.items() if "ray" not in k}
    assert engine.judge_engine(without, "mp", "")[0].verdict == "healthy"


@pytest.mark.parametrize("output", ["", "noise\n", "LAUNCHER-PROBE {", "LAUNCHER-PROBE []"])
def test_a_probe_that_did_not_answer_is_no_answer(output):
    assert engine.parse_probe(output) is None


def test_the_probes_line_is_found_among_the_noise_of_modules():
    found = engine.parse_probe('Loading cuda\nLAUNCHER-PROBE {"vllm": "1", "ray": null}\n')
    assert found == {"vllm": "1"}


def test_versions_that_differ_are_named_with_their_nodes():
    (finding,) = engine.judge_parity({"h1": {"vllm": "1"}, "h2": {"vllm": "2"}})
    assert "1 on h1" in finding.message and "2 on h2" in finding.message
    assert engine.judge_parity({"h1": {"vllm": "1"}, "h2": {"vllm": "1"}}) == ()
