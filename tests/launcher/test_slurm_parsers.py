"""Parsers against what Slurm prints. 22.05: recorded on the testbed. 23–25: written from their
documentation, for no such cluster was at hand; marked so in the name."""

import time

import pytest

from launcher.errors import SlurmError
from launcher.slurm_tools import cluster, jobs

RECORDED_22_05 = (
    "3|RUNNING|h[1-2]|2026-11-21T15:55:26|2026-11-21T13:55:26|h1|tiny-slurm.r1.a1|None|ab12\n"
    "4|PENDING||N/A|2026-11-21T15:55:26|n/a|tiny-slurm.r2.a1|Resources|ab13\n"
    "5|COMPLETING|h[1-2]|2026-11-21T14:10:26|2026-11-21T13:55:26|h1|x.r1.a1|None|\n"
    "6|CANCELLED||2026-11-21T14:10:26|N/A|n/a|x.r1.a2|None|\n"
)


def test_recorded_rows_of_22_05_become_jobs():
    running, pending, ending, ended = jobs.parse_squeue(RECORDED_22_05)
    assert (running.state, running.nodes, running.comment) == ("running", ("h1", "h2"), "ab12")
    assert running.ends_at == time.mktime((2026, 11, 21, 15, 55, 26, 0, 0, -1))
    assert (pending.state, pending.reason, pending.nodes) == ("pending", "Resources", ())
    assert (ending.state, ended.state) == ("ending", "ended")


def test_rows_of_23_to_25_from_their_documentation_with_several_flags_and_odd_reasons():
    rows = (
        "7|RUNNING,COMPLETING|h3|N/A|N/A|h3|a.r1.a1|None|c\n"
        "8|PENDING||N/A|N/A|n/a|a.r1.a2|ReqNodeNotAvail, UnavailableNodes:h2|c|d\n"
        "9|NODE_FAIL|h1|N/A|N/A|h1|a.r1.a3|NodeDown|\n"
    )
    first, second, third = jobs.parse_squeue(rows)
    assert first.state == "ending"
    assert second.comment == "c|d"
    assert "down, drained or reserved" in jobs.plain_reason(second.reason)
    assert third.state == "ended"


@pytest.mark.parametrize("row", ["7|RUNNING|h[1-2|N/A|N/A|h|n|None|", "garbage", "7|RUNNING\n"])
def test_a_row_that_cannot_be_read_is_an_error_and_not_a_missing_job(row):
    with pytest.raises(SlurmError):
        jobs.parse_squeue(row)


@pytest.mark.parametrize(
    ("output", "identity"), [("123\n", "123"), ("123;testbed\n", "123"), ("warn\n124\n", "124")]
)
def test_a_job_id_is_read_from_what_sbatch_prints(output, identity):
    assert jobs.parse_job_id(output) == identity


@pytest.mark.parametrize("output", ["", "Submitted batch job 123\n"])
def test_an_answer_without_a_job_id_is_an_error(output):
    with pytest.raises(SlurmError):
        jobs.parse_job_id(output)


def test_partitions_are_read_with_their_nodes_gpus_and_limits():
    pools = cluster.parse_sinfo(
        "h1|idle|gpu:8|infinite|gpu|none\n"
        "h1|idle|gpu:8|1-00:00:00|long|none\n"
        "h2|mixed*|gpu:h100:4(S:0-1)|infinite|gpu|Not responding\n"
        "h10|drained$|(null)|infinite|gpu|disk\n"
    )
    assert set(pools) == {"gpu", "long"}
    assert [node.name for node in pools["gpu"].nodes] == ["h1", "h2", "h10"]
    assert pools["long"].limit_s == 86400
    h1, h2, h10 = pools["gpu"].nodes
    assert (h1.gpus, h1.state) == (8, "idle")
    assert (h2.gpus, h2.gpu_type, h2.state) == (4, "h100", "down")
    assert (h10.gpus, h10.state, h10.state_reason) == (0, "draining", "disk")


@pytest.mark.parametrize(
    ("state", "ours"),
    [
        ("idle", "idle"),
        ("idle~", "idle"),
        ("idle*", "down"),
        ("allocated", "busy"),
        ("draining@", "draining"),
        ("down*", "down"),
        ("planned-", "busy"),
        ("brand-new", "unknown"),
    ],
)
def test_node_states_are_translated_and_unknown_ones_are_not_usable(state, ours):
    assert cluster.translate_state(state) == ours


@pytest.mark.parametrize(
    ("gres", "found"),
    [
        ("gpu:8", (8, None)),
        ("gpu:a100:4,gpu:v100:2", (6, "v100")),
        ("(null)", (0, None)),
        ("gpu:h100:8(S:0-1),shard:16", (8, "h100")),
        ("craynetwork:4", (0, None)),
        ("gpu", (1, None)),
    ],
)
def test_gres_is_read_in_the_forms_that_sites_use(gres, found):
    assert cluster.parse_gres(gres) == found
