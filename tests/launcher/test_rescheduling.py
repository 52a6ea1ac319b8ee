"""Who is lost is replaced: on the testbed with the fake engine, by Slurm and by SSH."""

import json
import time

import pytest

from tests.cluster import bed
from tests.launcher.fleets import (
    Asking,
    ask,
    engines,
    eventually,
    kill_controller,
    nodes_of,
    replica_of,
    serves_again,
    spares,
)

pytestmark = pytest.mark.cluster


# All of backend × fault is in `make acceptance`; here each backend and each fault is met.
FULL = pytest.mark.acceptance


@pytest.fixture
def fleet(request, on_whole_hosts):
    return on_whole_hosts(request.param)


@pytest.mark.parametrize(
    ("fleet", "rank"),
    [
        ("slurm", 0),
        ("ssh", 1),
        pytest.param("slurm", 1, marks=FULL),
        pytest.param("ssh", 0, marks=FULL),
    ],
    indirect=["fleet"],
)
def test_a_spare_takes_the_place_of_a_host_that_loses_power(fleet, rank):
    """Rank 0's host is the batch host under Slurm. In one case the controller dies, too."""
    fleet.spec["spares"] = 1
    code, document = fleet.up()
    assert code == 0, document["error"]
    assert eventually(lambda: len(spares(fleet)) == 1, 30)
    spare, victim = spares(fleet)[0], nodes_of(fleet)[rank]
    asking = Asking(document)
    asking.start()
    bed.kill(victim)
    began = time.time()
    if rank == 1:
        kill_controller(fleet)
    assert eventually(lambda: serves_again(fleet, 2), 60.0), fleet.status()
    asking.stop()
    replica = replica_of(fleet)
    assert victim not in nodes_of(fleet)
    assert spare in nodes_of(fleet)
    assert fleet.status()[1]["endpoint"] == document["endpoint"]
    assert any(victim in line for line in replica["story"])
    assert asking.failed == [], "the address holds requests while the replica is away"
    assert asking.answered > 0
    events = fleet.cli("events", "--fleet", fleet.name, "--json").stdout.splitlines()
    told = next(e for e in map(json.loads, events) if e["event"] == "interrupt")
    if rank == 0:
        assert told["at"] - began < 6.0, "detection is a safety bound"
    bed.start(victim)
    # A new spare is made, of the fourth host or of the one that came back.
    assert eventually(lambda: len(spares(fleet)) == 1, 60.0), fleet.status()


@pytest.mark.parametrize("fleet", ["ssh", pytest.param("slurm", marks=FULL)], indirect=True)
def test_without_a_spare_it_says_what_it_waits_for_and_takes_a_returned_host(fleet):
    fleet.spec["replicas"] = 2
    code, document = fleet.up()
    assert code == 0, document["error"]
    victim = nodes_of(fleet, "r2")[1]
    bed.kill(victim)
    assert eventually(lambda: replica_of(fleet, "r2")["phase"] != "serving", 15.0)
    assert ask(document) == "x", "the other replica serves"
    assert eventually(lambda: any("r2: " in one for one in fleet.status()[1]["waiting_for"]), 30.0)
    code, status = fleet.status()
    assert (code, status["phase"], status["error"]["where"]) == (1, "degraded", f"node {victim}")
    bed.start(victim)
    assert eventually(lambda: serves_again(fleet, 2, "r2"), 120.0), fleet.status()
    assert fleet.status()[0] == 0


@pytest.mark.parametrize("fleet", ["slurm", pytest.param("ssh", marks=FULL)], indirect=True)
def test_a_cut_host_ends_its_engine_itself_and_is_used_again_when_it_is_back(fleet):
    fleet.spec["spares"] = 1
    code, document = fleet.up()
    assert code == 0, document["error"]
    assert eventually(lambda: len(spares(fleet)) == 1, 30)
    victim = nodes_of(fleet)[1]
    bed.cut(victim)
    assert eventually(lambda: victim not in engines(fleet), 15.0)
    assert eventually(lambda: serves_again(fleet, 2), 60.0), fleet.status()
    assert victim not in engines(fleet), "nothing serves twice"
    bed.heal(victim)
    assert eventually(lambda: len(spares(fleet)) == 1, 90.0), fleet.status()
    assert replica_of(fleet)["generation"] == 2, "its return disturbs nobody"
