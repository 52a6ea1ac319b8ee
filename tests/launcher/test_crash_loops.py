"""Real vLLM that can never start: it is stopped soon, in its own words, and no node is blamed."""

import pytest

from tests.conftest import ROOT
from tests.launcher.fleets import FleetUnderTest, engine_processes

pytestmark = [pytest.mark.engine, pytest.mark.acceptance, pytest.mark.timeout(400)]


@pytest.fixture
def fleet(tmp_path, cli, fleet_name):
    spec = {
        "model": str(ROOT / "models/tiny"),
        "nodes": 2,
        "gpus_per_node": 1,
        "parallelism": {"pipeline": 2},
        "executor": "mp",
        "runtime": {"venv": str(ROOT / ".venv/engine")},
        "env": {"VLLM_CPU_KVCACHE_SPACE": 1, "CPU_ENGINE_START_METHOD": "fork"},
        "engine": {"args": {"enforce-eager": True, "dtype": "float32", "max-model-len": 512}},
        "backend": "local",
    }
    made = FleetUnderTest(tmp_path, cli, fleet_name, spec)
    yield made
    assert made.down() == 0
    assert engine_processes(fleet_name) == {}


@pytest.mark.parametrize(
    ("arguments", "environment", "generations", "told"),
    [
        ({"max-model-lenn": 3}, {}, 1, "unrecognized arguments: --max-model-lenn"),
        ({"dtype": "flot32"}, {}, 1, "invalid choice: 'flot32'"),
        ({"max-model-len": 500000}, {}, 1, "max_model_len (500000) is greater than"),
        # Memory may be another program's for a moment: it is tried a second time.
        ({}, {"VLLM_CPU_KVCACHE_SPACE": 900}, 2, "is less than requested memory for kv"),
    ],
)
def test_what_only_the_user_can_mend_is_told_and_not_tried_for_ever(
    fleet, arguments, environment, generations, told
):
    fleet.spec["engine"]["args"].update(arguments)
    fleet.spec["env"].update(environment)
    code, document = fleet.up(timeout=390)
    replica = document["replicas"][0]
    assert (code, document["phase"], replica["phase"]) == (1, "failed", "failed")
    assert told in document["error"]["message"]
    assert "No restart" in document["error"]["hint"]
    assert replica["generation"] == generations
    assert document["cordoned"] == []
