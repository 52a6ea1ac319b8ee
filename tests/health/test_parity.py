from health.parity import compare
from health.probes.software import image_fingerprint

SAME = {"vllm": "0.32.0", "driver": "570.1", "ib.mlx5_0/1.rate": "400 Gb/s"}


def test_equal_nodes_differ_in_nothing():
    assert compare({"a": SAME, "b": SAME, "c": SAME}) == ()


def test_the_odd_one_out_is_blamed():
    (odd,) = compare({"a": SAME, "b": {**SAME, "driver": "560.9"}, "c": SAME})
    assert (odd.nodes, odd.blamed, odd.finding.check) == (("b",), True, "parity.driver")
    assert odd.finding.message == "driver 560.9 where the other nodes have 570.1"


def test_of_two_that_differ_none_is_blamed_and_both_are_told():
    (odd,) = compare({"a": SAME, "b": {**SAME, "vllm": "0.31.0"}})
    assert not odd.blamed
    assert odd.finding.verdict == "unhealthy"
    assert odd.finding.message == "vllm differs: 0.32.0 on a; 0.31.0 on b"


def test_half_the_rate_of_a_port_is_named_with_the_port():
    slow = {**SAME, "ib.mlx5_0/1.rate": "200 Gb/s"}
    (odd,) = compare({"a": SAME, "b": SAME, "c": slow})
    assert (odd.nodes, odd.finding.device) == (("c",), "mlx5_0/1")


def test_a_library_that_only_one_node_has_is_a_difference():
    (odd,) = compare({"a": SAME, "b": SAME, "c": {**SAME, "nccl": "2.27"}})
    assert odd.nodes == ("c",)
    assert "nccl 2.27 where the other nodes have none" in odd.finding.message


def test_firmware_may_differ_and_is_told():
    (odd,) = compare({"a": {"gpu.vbios": "1"}, "b": {"gpu.vbios": "1"}, "c": {"gpu.vbios": "2"}})
    assert odd.finding.verdict == "degraded"


def test_traits_that_nobody_compares_do_not_matter():
    assert compare({"a": {"colour": "red"}, "b": {"colour": "blue"}}) == ()


def test_two_builds_of_an_image_differ_and_copies_do_not(tmp_path):
    one, copy, other = (tmp_path / name for name in ("one", "copy", "other"))
    one.write_bytes(b"x" * 3_000_000)
    copy.write_bytes(b"x" * 3_000_000)
    other.write_bytes(b"y" + b"x" * 2_999_999)
    assert image_fingerprint(one) == image_fingerprint(copy) != image_fingerprint(other)
    traits = {
        node: {"image": image_fingerprint(path)}
        for node, path in (("a", one), ("b", copy), ("c", other))
    }
    (odd,) = compare(traits)
    assert odd.nodes == ("c",)
