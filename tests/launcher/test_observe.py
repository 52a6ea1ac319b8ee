"""What the observer remembers of an agent is not taken for another agent's word."""

from inventory.ledger import Ledger
from launcher.backends.base import Allocation, Seen
from launcher.documents import AgentConfig
from launcher.observe import Observer
from launcher.paths import BasePaths
from launcher.snapshot import AllocationView, GatewayView
from tests.launcher.worlds import begun, held, make_context, report


class Reports:
    """A backend of which only reports are asked; anything else is an error."""

    def __init__(self):
        self.now: dict[tuple[int, str], Seen] = {}

    def observe(self, allocation):
        return AllocationView("running", nodes=allocation.nodes)

    def look(self, allocation, nodes):
        return {node: self.now.get((allocation.number, node), Seen()) for node in nodes}


def allocation(number, tmp_path):
    config = AgentConfig(fleet="chat", mark="m", package_version="0", orphan_timeout_s=1)
    base = BasePaths(tmp_path)
    return Allocation("chat", 1, "r1", number, 2, ("h1", "h2"), base, config, {})


def test_a_report_that_cannot_be_read_for_a_moment_stays_the_last_one(tmp_path):
    backend, record = Reports(), begun(make_context())
    observer = Observer(backend, None)
    backend.now[1, "h1"] = Seen(report("h1", heartbeat_port=111))
    one = {"r1.a1": allocation(1, tmp_path)}
    observer.observe(record, one, "up", Ledger(), GatewayView())
    backend.now.clear()
    view = (
        observer.observe(record, one, "up", Ledger(), GatewayView())
        .allocations["r1.a1"]
        .agents["h1"]
    )
    assert view.report.heartbeat_port == 111


def test_the_next_allocations_agent_is_unknown_until_it_has_reported_itself(tmp_path):
    """The agent before had another port: peers that ask there wait for ever."""
    backend, record = Reports(), begun(make_context())
    observer = Observer(backend, None)
    backend.now[1, "h1"] = Seen(report("h1", "stopped", heartbeat_port=111))
    both = {"r1.a1": allocation(1, tmp_path), "r1.a2": allocation(2, tmp_path)}
    record = begun(make_context(), held("r1.a2"))

    def seen():
        looked = observer.observe(record, both, "up", Ledger(), GatewayView())
        return looked.allocations["r1.a2"].agents["h1"]

    assert seen().report is None
    backend.now[2, "h1"] = Seen(report("h1", heartbeat_port=222))
    view = seen()
    assert view.report.heartbeat_port == 222


def test_an_agent_that_has_ended_does_not_make_its_node_unreachable(tmp_path):
    """Else what it held is never given back, and who needs the node waits for ever."""
    backend, record = Reports(), begun(make_context())
    observer = Observer(backend, None)
    one = {"r1.a1": allocation(1, tmp_path)}

    def reachable(seen: Seen) -> bool:
        backend.now[1, "h1"] = seen
        looked = observer.observe(record, one, "up", Ledger(), GatewayView())
        return looked.allocations["r1.a1"].agents["h1"].reachable

    stopped = report("h1", "stopped")
    assert reachable(Seen(stopped, ended=True, problem="its agent's process ended"))
    assert not reachable(Seen(stopped, problem="no route to host"))
