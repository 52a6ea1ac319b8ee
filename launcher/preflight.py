"""Look at nodes before they take work: gather evidence, judge it, keep it. I/O at the edges.

The same judging serves a live look and recorded evidence (`--record`, `--replay`), so that other
thresholds can be tried on last month's faults.
"""

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import BaseModel, Field, ValidationError

from health import deep
from health.checks.base import Needs
from health.clock import clock_finding
from health.collective import rounds as collective
from health.collective.rounds import Order, Round
from health.engine import last_line
from health.evidence import Asked, Level, NodeEvidence
from health.judge import judge
from health.parity import Odd, compare
from health.report import Coverage, Finding, NodeFacts, Verdict, worst
from health.thresholds import Thresholds
from inventory.model import Node
from launcher.backends.asking import PROBES
from launcher.backends.base import Answer, Question
from launcher.context import Ground
from launcher.documents import Document
from launcher.errors import StateError, UsageError
from launcher.files import make_private, parse_document, write_document
from launcher.layout import Layout
from launcher.meeting import Meeting, NoMeeting, find_meeting
from launcher.spec import is_folder

SET_FILE = "set.json"
# The slowest probe is the engine's Python (60 s on a cold file system); a passive look has none.
PASSIVE_DEADLINE_S = 25.0
PROBE_DEADLINE_S = 90.0
# A cold import of torch from a shared file system takes half a minute.
ASSEMBLE_S, ROUND_S = 30.0, 4.0
BURN_S, BURN_DEADLINE_S = 60.0, 300.0


class Taken(BaseModel):
    """When one node was asked and when its answer was here, by our clock; or why there is none."""

    began_at: float
    ended_at: float
    problem: str = ""
    is_busy: bool = False


class Collective(BaseModel):
    """The rounds of a collective check and what every node printed; or why there was none."""

    nodes: tuple[str, ...] = ()
    per_node: int = 1
    rounds: tuple[Round, ...] = ()
    printed: dict[str, str] = Field(default_factory=dict)
    skipped: str = ""


class RecordedSet(Document):
    """set.json of a recording: what belongs to the set and not to one node's evidence."""

    level: Level
    gpus: int | None = None
    executor: str | None = None
    weights_bytes: int | None = None
    nodes: dict[str, Taken] = Field(default_factory=dict)
    collective: Collective = Collective()
    burned: dict[str, str] = Field(default_factory=dict)  # what the deep level printed, by node


@dataclass(frozen=True)
class Looked:
    """A set of nodes that was looked at, and what was concluded."""

    recorded: RecordedSet
    evidence: dict[str, NodeEvidence]
    facts: dict[str, NodeFacts] = field(default_factory=dict)
    odd: tuple[Odd, ...] = ()

    @property
    def unfit(self) -> dict[str, tuple[Finding, ...]]:
        """The nodes that may not take work, each with its reasons; "" for what nobody owns."""
        found = {node: facts.unfit for node, facts in self.facts.items() if facts.unfit}
        for odd in self.odd:
            if odd.finding.verdict == "unhealthy":
                for node in odd.nodes if odd.blamed else ("",):
                    found[node] = (*found.get(node, ()), odd.finding)
        return found

    def verdict(self, node: str) -> Verdict:
        about = [odd.finding.verdict for odd in self.odd if odd.blamed and node in odd.nodes]
        return worst([self.facts[node].verdict, *about])

    def findings(self, node: str) -> tuple[Finding, ...]:
        """What is to be said of this node, the worst first; healthy findings say nothing."""
        own = [f for f in self.facts[node].findings if f.verdict != "healthy"]
        about = [odd.finding for odd in self.odd if odd.blamed and node in odd.nodes]
        return tuple(sorted([*own, *about], key=lambda f: f.verdict != "unhealthy"))


def look(ground: Ground, nodes: tuple[Node, ...], level: Level) -> Looked:
    """Ask all these nodes side by side. What a node could not answer is in its facts."""
    layout = ground.context.layout
    recorded = RecordedSet(
        level=level,
        gpus=layout.ranks_per_node,
        executor=layout.executor,
        weights_bytes=ground.context.weights_bytes,
    )
    answers = _ask_probes(ground, nodes, level)
    taken, evidence = _read_answers(answers)
    recorded = recorded.model_copy(update={"nodes": taken})
    looked = conclude(recorded, evidence, Thresholds())
    if level == "passive":
        return looked
    fit = tuple(node for node in evidence if node not in looked.unfit)
    more: dict[str, Any] = {"collective": _meet(ground, fit, evidence, level)}
    if level == "deep":
        more["burned"] = _burn(ground, fit)
    return conclude(recorded.model_copy(update=more), evidence, Thresholds())


def conclude(
    recorded: RecordedSet, evidence: dict[str, NodeEvidence], limits: Thresholds
) -> Looked:
    """Judge a set, freshly probed or replayed. Pure."""
    needs = Needs(gpus=recorded.gpus, weights_bytes=recorded.weights_bytes)
    if recorded.level != "passive":
        needs = Needs(recorded.gpus, recorded.executor, recorded.weights_bytes)
    facts = {
        node: _facts(evidence.get(node), taken, needs, limits)
        for node, taken in recorded.nodes.items()
    }
    odd = compare({node: facts[node].traits for node in evidence})
    met = recorded.collective
    told = {node: collective.parse(text) for node, text in met.printed.items()}
    broken = {one.problem for one in told.values()}
    if met.rounds and "" not in broken:
        # The check itself runs on no node: that says nothing about the nodes.
        facts = _not_covered(facts, "checker error", sorted(broken)[0])
    elif met.rounds:
        verdict = collective.conclude(met.nodes, met.per_node, met.rounds, told, limits)
        for node, found in verdict.findings.items():
            if node:
                more = (*facts[node].findings, *found)
                facts[node] = facts[node].model_copy(update={"findings": more})
            else:
                odd = (*odd, *(Odd(met.nodes, False, finding) for finding in found))
    elif recorded.level != "passive" and met.skipped:
        facts = _not_covered(facts, "skipped", met.skipped)
    burned = {node: deep.parse(text) for node, text in recorded.burned.items()}
    rates = {
        node: one.storage.read_rate_bytes_s
        for node, one in evidence.items()
        if one.storage and one.storage.read_rate_bytes_s
    }
    for node, found in deep.conclude(burned, rates, limits).items():
        facts[node] = facts[node].model_copy(update={"findings": (*facts[node].findings, *found)})
    return Looked(recorded, evidence, facts, odd)


def _not_covered(
    facts: dict[str, NodeFacts], state: Literal["skipped", "checker error"], reason: str
) -> dict[str, NodeFacts]:
    missed = Coverage(check="collective", state=state, reason=reason)
    return {
        node: one.model_copy(update={"coverage": (*one.coverage, missed)})
        for node, one in facts.items()
    }


def record(looked: Looked, folder: Path) -> None:
    """Keep the raw evidence of a set: one file for each node, and one for the set."""
    make_private(folder)
    for node, evidence in looked.evidence.items():
        write_document(folder / f"{node}.json", evidence)
    write_document(folder / SET_FILE, looked.recorded)


def replay(folder: Path, limits: Thresholds) -> Looked:
    """Judge a recording again. Raises UsageError or StateError that names the file."""
    kept = _read(folder / SET_FILE)
    recorded = parse_document(kept, RecordedSet, str(folder / SET_FILE))
    evidence = {}
    for node, taken in recorded.nodes.items():
        if not taken.problem:
            path = folder / f"{node}.json"
            evidence[node] = parse_document(_read(path), NodeEvidence, str(path))
    return conclude(recorded, evidence, limits)


def read_thresholds(path: Path | None) -> Thresholds:
    """The limits, with those of this YAML file in place of ours."""
    if path is None:
        return Thresholds()
    try:
        return Thresholds.model_validate(yaml.safe_load(_read(path)) or {})
    except yaml.YAMLError as error:
        raise UsageError(f"is not YAML: {error}", where=str(path)) from error
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(str(part) for part in first["loc"])
        known = ", ".join(Thresholds.model_fields)
        raise UsageError(
            f"{key}: {first['msg']}", where=str(path), hint=f"Thresholds: {known}."
        ) from error


def _ask_probes(ground: Ground, nodes: tuple[Node, ...], level: Level) -> dict[str, Answer]:
    spec = ground.spec
    files = {"engine-probe.sh": ground.context.scripts["engine-probe.sh"]}
    questions = {}
    for node in nodes:
        asked = Asked(
            level=level,
            node=node.name,
            model_folder=spec.model if is_folder(spec.model) else "",
            image=spec.runtime.image_file,
            weights_folders=node.nvme,
            probe_script="" if level == "passive" else "engine-probe.sh",
        )
        own = {} if level == "passive" else files
        questions[node.name] = Question(PROBES, asked.model_dump_json() + "\n", own)
    deadline_s = PASSIVE_DEADLINE_S if level == "passive" else PROBE_DEADLINE_S
    return ground.backend.ask(questions, deadline_s)


def _read_answers(
    answers: dict[str, Answer],
) -> tuple[dict[str, Taken], dict[str, NodeEvidence]]:
    """The evidence that the probes printed. A login shell may print before it."""
    taken, evidence = {}, {}
    for node, answer in answers.items():
        problem = answer.problem
        if not problem:
            rows = answer.output.splitlines()
            line = next((row for row in rows if row.startswith('{"version"')), "")
            try:
                evidence[node] = NodeEvidence.model_validate_json(line)
            except ValidationError:
                said = last_line(answer.errors) or last_line(answer.output) or "nothing"
                problem = f"the probes printed: {said}"
        taken[node] = Taken(
            began_at=answer.began_at,
            ended_at=answer.ended_at,
            problem=problem,
            is_busy=answer.is_busy,
        )
    return taken, evidence


def _meet(
    ground: Ground, nodes: tuple[str, ...], evidence: dict[str, NodeEvidence], level: Level
) -> Collective:
    """Let these nodes reduce and send together, and keep what each of them printed."""
    layout: Layout = ground.context.layout
    if ground.backend.shares_machine:
        return Collective(skipped="one machine plays all nodes")
    if len(nodes) < 2:
        return Collective(skipped="fewer than two nodes are fit")
    meeting = find_meeting({node: evidence[node] for node in nodes}, ground.spec.interface)
    if isinstance(meeting, NoMeeting):
        return Collective(skipped=meeting.reason)
    per_node = layout.ranks_per_node
    whole = len(nodes) * per_node == layout.tensor * layout.pipeline * layout.data
    chosen = collective.pattern_rounds(
        len(nodes),
        per_node,
        layout.tensor if whole else 1,
        layout.pipeline if whole else 1,
        expert=whole and ground.spec.engine.is_expert_parallel,
    )
    if level in ("fabric", "deep"):
        chosen += collective.pair_rounds(len(nodes), per_node)
    waits_s = collective.waits_s(len(chosen), ASSEMBLE_S, ROUND_S)
    answers = ground.backend.ask(
        _orders(ground, nodes, meeting, chosen), collective.longest_s(waits_s, ROUND_S)
    )
    printed = {
        node: f"{answer.output}\n{answer.errors if not answer.output else ''}"
        for node, answer in answers.items()
    }
    return Collective(nodes=nodes, per_node=per_node, rounds=chosen, printed=printed)


def _burn(ground: Ground, nodes: tuple[str, ...]) -> dict[str, str]:
    """Load these nodes, all at once; what each of them printed."""
    files = {"burn.sh": ground.context.scripts["burn.sh"]}
    order = json.dumps({"seconds": BURN_S}) + "\n"
    asked = {node: Question("burn.sh", order, files) for node in nodes}
    answers = ground.backend.ask(asked, BURN_DEADLINE_S)
    return {node: answer.output or answer.errors for node, answer in answers.items()}


def _orders(
    ground: Ground, nodes: tuple[str, ...], meeting: Meeting, chosen: tuple[Round, ...]
) -> dict[str, Question]:
    per_node = ground.context.layout.ranks_per_node
    questions = {}
    for index, node in enumerate(nodes):
        order = Order(
            node=node,
            ranks=tuple(range(index * per_node, (index + 1) * per_node)),
            hosts_store=index == 0,
            store_address=meeting.addresses[nodes[0]],
            store_port=meeting.port,
            waits_s=collective.waits_s(len(chosen), ASSEMBLE_S, ROUND_S),
            round_s=ROUND_S,
            rounds=chosen,
        )
        interface = meeting.interfaces[node]
        names = {"GLOO_SOCKET_IFNAME": interface, "NCCL_SOCKET_IFNAME": f"={interface}"}
        files = {"collective.sh": ground.context.scripts["collective.sh"]}
        questions[node] = Question("collective.sh", order.model_dump_json() + "\n", files, names)
    return questions


def _facts(
    evidence: NodeEvidence | None, taken: Taken, needs: Needs, limits: Thresholds
) -> NodeFacts:
    if evidence is None:
        silent = Finding(
            check="reach",
            verdict="unknown" if taken.is_busy else "unhealthy",
            message=f"could not be looked at: {taken.problem}",
            advice="none" if taken.is_busy else "fix configuration",
        )
        return NodeFacts(findings=(silent,))
    facts = judge(evidence, needs, limits)
    wrong = clock_finding(
        evidence.taken_at, taken.began_at, taken.ended_at, limits.clock_offset_s_max
    )
    if wrong:
        return facts.model_copy(update={"findings": (wrong, *facts.findings)})
    return facts


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except FileNotFoundError as error:
        raise UsageError("is not there", where=str(path)) from error
    except OSError as error:
        raise StateError(f"cannot be read: {error.strerror}", where=str(path)) from error
