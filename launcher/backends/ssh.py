"""Hosts from an inventory, reached by SSH; `launcher bootstrap` put a venv there. I/O."""

import posixpath
import time
from pathlib import Path

from inventory import nodeset
from inventory.load import load
from inventory.model import Inventory, Pool
from launcher import __version__, cordons
from launcher.backends import ssh_lines
from launcher.backends.base import LOG_READ_MAX_BYTES, Allocation, Answer, Question, Seen
from launcher.documents import Assignment, Report
from launcher.errors import CapacityError, RemoteError, SpecError
from launcher.files import make_private, parse_document, write_text
from launcher.paths import BasePaths, FleetPaths
from launcher.remote import Fleet, Host
from launcher.snapshot import AllocationView
from launcher.spec import FleetSpec

LOOK_WAIT_S = 0.5  # a host that hangs must not keep the others from being looked at
ASSIGN_DEADLINE_S = 6.0
START_DEADLINE_S = 60.0
RETRY_AFTER_S = 3.0
LOG_KEPT_BYTES = 4 * 1024 * 1024


class SshHosts:
    kind = "ssh"
    shares_machine = False
    chooses_nodes = False

    def __init__(self, spec: FleetSpec, paths: FleetPaths) -> None:
        assert spec.backend.ssh is not None
        self._spec = spec
        self._block = spec.backend.ssh
        self._paths = paths
        self._inventory: Inventory | None = None
        self._fleet: Fleet | None = None
        self._homes: dict[str, str] = {}
        self._resting: dict[str, tuple[float, str]] = {}

    def check(self) -> None:
        """Every host that the fleet would use first answers, and has our version."""
        pool = self.pool()
        wanted = self._spec.nodes * self._spec.replicas + self._spec.spares
        if len(pool.nodes) < wanted:
            raise CapacityError(
                f"{wanted} nodes asked for, pool {pool.name} has {len(pool.nodes)}",
                where=self._block.inventory,
                hint="Ask for fewer nodes, or add hosts to the inventory.",
            )
        barred = cordons.read(self.kind).cordons
        names = [node.name for node in pool.nodes if node.name not in barred][:wanted]
        answers = self.fleet().each(names, installed_version, START_DEADLINE_S)
        for name, answer in answers.items():
            if isinstance(answer, RemoteError):
                raise answer
            if answer != __version__:
                found = f"has version {answer}" if answer else "has no launcher"
                raise SpecError(
                    f"{name} {found}, and {__version__} is needed",
                    where=self._block.inventory,
                    hint="Run `launcher bootstrap` with the same spec.",
                )

    def pool(self) -> Pool:
        if self._inventory is None:
            self._inventory = load(Path(self._block.inventory))
        inventory = self._inventory
        names = [pool.name for pool in inventory.pools]
        wanted = self._block.pool or ("default" if "default" in names else names[0])
        pool = inventory.pool(wanted)
        if pool is None:
            raise SpecError(
                f"there is no pool {wanted!r} in the inventory",
                where="backend.ssh.pool",
                hint=f"Pools there: {', '.join(names)}.",
            )
        if self._block.nodes is None:
            return pool
        chosen = nodeset.expand(self._block.nodes)
        missing = [name for name in chosen if pool.named(name) is None]
        if missing:
            raise SpecError(
                f"{nodeset.fold(missing)} is not in pool {pool.name}", where="backend.ssh.nodes"
            )
        nodes = tuple(node for name in chosen if (node := pool.named(name)) is not None)
        return Pool(name=pool.name, nodes=nodes)

    def fleet(self) -> Fleet:
        """The hosts of the pool, connected when they are first asked."""
        if self._fleet is None:
            pool = self.pool()
            assert self._inventory is not None
            self._fleet = Fleet(pool.nodes, self._inventory.ssh_config_path)
        return self._fleet

    def commands(self, allocation: Allocation) -> dict[str, str]:
        lines = [f"# on {node}:\n{ssh_lines.start(allocation, node)}" for node in allocation.nodes]
        return {"agents.sh": "#!/bin/bash\n" + "\n".join(lines) + "\n"}

    def allocate(self, allocation: Allocation) -> None:
        make_private(allocation.base.root)

        def start(host: Host) -> None:
            name = host.node.name
            base = self._base(allocation, name)
            self._clear_what_was_forgotten(allocation, host, base)
            for secret, value in allocation.secrets.items():
                host.write(f"{base}/secrets/{secret}", value.encode())
            host.write(f"{base}/agent.json", allocation.config.model_dump_json().encode())
            host.write(f"{base}/nodes/{name}/started", b"")
            answer = host.run(ssh_lines.start(allocation, name))
            if answer.code != 0:
                said = answer.errors.strip()[-300:] or f"exit code {answer.code}"
                raise RemoteError("failed", f"the agent did not start: {said}", where=name)

        answers = self.fleet().each(allocation.nodes, start, START_DEADLINE_S)
        for answer in answers.values():
            if isinstance(answer, RemoteError):
                raise answer

    def observe(self, allocation: Allocation) -> AllocationView:
        return AllocationView(
            "running", identity=nodeset.fold(allocation.nodes), nodes=allocation.nodes
        )

    def look(self, allocation: Allocation, nodes: tuple[str, ...]) -> dict[str, Seen]:
        now = time.monotonic()
        awake = [n for n in nodes if now - self._resting.get(n, (0.0, ""))[0] > RETRY_AFTER_S]

        def read(host: Host) -> Seen:
            path = f"{self._base(allocation, host.node.name)}/nodes/{host.node.name}/report.json"
            raw = host.read(path)
            return Seen(parse_document(raw, Report, path)) if raw is not None else Seen()

        seen = {name: Seen(problem=self._resting[name][1]) for name in nodes if name not in awake}
        answers = self.fleet().poll(allocation.name, awake, read, LOOK_WAIT_S)
        for name, answer in answers.items():
            if isinstance(answer, RemoteError):
                self._resting[name] = (time.monotonic(), answer.message)
                seen[name] = Seen(problem=answer.message)
            elif answer is not None:
                self._resting.pop(name, None)
                seen[name] = answer
            else:
                seen[name] = Seen()
        return seen

    def assign(self, allocation: Allocation, node: str, assignment: Assignment) -> None:
        if node in self._resting:
            raise RemoteError("unreachable", self._resting[node][1], where=node)

        def write(host: Host) -> None:
            path = f"{self._base(allocation, node)}/nodes/{node}/assignment.json"
            host.write(path, assignment.model_dump_json(indent=1).encode())

        answer = self.fleet().each([node], write, ASSIGN_DEADLINE_S)[node]
        if isinstance(answer, RemoteError):
            raise answer

    def release(self, allocation: Allocation, nodes: tuple[str, ...] | None = None) -> None:
        """Keep the logs, sweep what is left, remove the folder. Hosts that are away are named."""

        def clean(host: Host) -> None:
            name = host.node.name
            self._keep_logs(allocation, host)
            host.run(ssh_lines.sweep(allocation, name, self._base(allocation, name)))

        chosen = allocation.nodes if nodes is None else nodes
        answers = self.fleet().each(chosen, clean, START_DEADLINE_S)
        failed = [answer for answer in answers.values() if isinstance(answer, RemoteError)]
        if failed:
            raise failed[0]

    def logs(self, allocation: Allocation, node: str) -> list[str]:
        kept = allocation.base.node(node).root
        if (kept / "logs").is_dir():
            return sorted(file.relative_to(kept).as_posix() for file in kept.rglob("*.log"))
        root = f"{self._base(allocation, node)}/nodes/{node}"
        host = self.fleet().hosts[node]
        names = [f"logs/{name}" for name in host.listing(f"{root}/logs") if name.endswith(".log")]
        return sorted([*names, "agent.log"])

    def read_log(self, allocation: Allocation, node: str, name: str, offset: int) -> bytes:
        kept = allocation.base.node(node).root / name
        if kept.is_file():
            with kept.open("rb") as file:
                size = kept.stat().st_size
                file.seek(max(0, size + offset) if offset < 0 else min(offset, size))
                return file.read(LOG_READ_MAX_BYTES)
        path = f"{self._base(allocation, node)}/nodes/{node}/{name}"
        return self.fleet().hosts[node].read(path, offset, LOG_READ_MAX_BYTES) or b""

    def ask(self, questions: dict[str, Question], deadline_s: float) -> dict[str, Answer]:
        began_at = {name: time.time() for name in questions}

        def put(host: Host) -> Answer:
            name = host.node.name
            question = questions[name]
            line = self._ask_line(host, question)
            began_at[name] = time.time()
            answer = host.run(line, deadline_s)
            return Answer(began_at[name], time.time(), answer.output, answer.errors)

        answers = self.fleet().each(list(questions), put, deadline_s)
        return {
            name: Answer(began_at[name], time.time(), problem=answer.message)
            if isinstance(answer, RemoteError)
            else answer
            for name, answer in answers.items()
        }

    def _ask_line(self, host: Host, question: Question) -> str:
        """The command line for one question, its files sent first. A question without files costs
        one command and no SFTP: over many hosts that is half of the time."""
        if not question.files:
            return ssh_lines.ask(question)
        name = host.node.name
        folder = f"{self._home(name)}/{ssh_lines.INSTALL_FOLDER}/ask-{name}"
        for file, text in question.files.items():
            host.write(f"{folder}/{file}", text.encode(), mode=0o700)
        return ssh_lines.ask_in(folder, question, self._home(name), name)

    def close(self) -> None:
        if self._fleet is not None:
            self._fleet.close()
            self._fleet = None

    def _base(self, allocation: Allocation, node: str) -> str:
        return posixpath.join(self._home(node), ssh_lines.base(allocation, node))

    def _home(self, node: str) -> str:
        home = self._homes.get(node)
        if home is None:
            home = self._homes[node] = self.fleet().hosts[node].home()
        return home

    def _clear_what_was_forgotten(self, allocation: Allocation, host: Host, base: str) -> None:
        """An agent of this fleet with another token is of a state folder that was removed: nobody
        else can reach it, and its reports would be taken for the new one's."""
        token = host.read(f"{base}/secrets/agent_token")
        ours = allocation.secrets.get("agent_token", "")
        if token is not None and token.decode("utf-8", "replace").strip() != ours:
            host.run(ssh_lines.sweep(allocation, host.node.name, base))

    def _keep_logs(self, allocation: Allocation, host: Host) -> None:
        """Fetch the end of every log, the evidence and the last report: the host keeps nothing."""
        name = host.node.name
        root = f"{self._base(allocation, name)}/nodes/{name}"
        target = make_private(BasePaths(allocation.base.root).node(name).root)
        files = [f"logs/{one}" for one in host.listing(f"{root}/logs")]
        for generation in host.listing(f"{root}/evidence"):
            folder = f"evidence/{generation}"
            files += [f"{folder}/{one}" for one in host.listing(f"{root}/{folder}")]
        for file in [*files, "agent.log", "report.json"]:
            raw = host.read(f"{root}/{file}", -LOG_KEPT_BYTES)
            if raw is not None:
                make_private((target / file).parent)
                write_text(target / file, raw.decode("utf-8", "replace"))


def installed_version(host: Host) -> str | None:
    """The version of launcher in our venv on this host; None where there is none."""
    answer = host.run(ssh_lines.VERSION)
    return answer.output.strip() or None if answer.code == 0 else None
