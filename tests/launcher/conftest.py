"""Fleets on the testbed that several files test."""

import pytest

from tests.cluster import bed
from tests.conftest import ROOT
from tests.launcher.fleets import FleetUnderTest, engine_processes, fake_spec

BACKENDS = {
    "slurm": {"partition": "gpu", "walltime": "30m", "exclusive": True},
    "ssh": {"inventory": str(ROOT / ".testbed/inventory.yaml")},
}


@pytest.fixture
def on_whole_hosts(
    request, cluster, shared_cli, shared_dir, fake_engine, shared_model, fleet_name
):
    """Makes the test's fleet on a backend; it comes back as often as it must. Afterwards the hosts
    are mended and nothing of it is left."""
    made: list[FleetUnderTest] = []

    def make(backend: str) -> FleetUnderTest:
        if backend == "ssh":
            request.getfixturevalue("bootstrapped")
        spec = fake_spec({backend: BACKENDS[backend]}, shared_model, fake_engine)
        spec["limits"] = {"drain": "5s", "start": "30s"}
        made.append(FleetUnderTest(shared_dir, shared_cli, fleet_name, spec))
        return made[-1]

    yield make
    for fleet in made:
        print(fleet.cli("events", "--fleet", fleet_name, "--limit", "500").stdout)
        bed.repair(wait_idle=False)
        assert fleet.down() == 0
        bed.repair()
        assert engine_processes(fleet_name) == {}
