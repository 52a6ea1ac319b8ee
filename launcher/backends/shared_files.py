"""The two files of every node where controller and agents see the same file system. I/O."""

import os
import shutil

from launcher.backends.base import LOG_READ_MAX_BYTES, Allocation, Seen
from launcher.documents import Assignment, Report
from launcher.errors import StateError
from launcher.files import make_private, read_document, write_document, write_text


class SharedFiles:
    """Mixed into local and slurm: reports, assignments and logs lie below allocation.base."""

    def prepare(self, allocation: Allocation) -> None:
        """Everything that an agent needs before it starts."""
        make_private(allocation.base.root)
        make_private(allocation.base.root / "nodes")
        make_private(allocation.base.secrets)
        for name, value in allocation.secrets.items():
            write_text(allocation.base.secrets / name, value)
        write_document(allocation.base.config, allocation.config)

    def forget_secrets(self, allocation: Allocation) -> None:
        """When the allocation is given back nothing needs them any more."""
        shutil.rmtree(allocation.base.secrets, ignore_errors=True)

    def look(self, allocation: Allocation, nodes: tuple[str, ...]) -> dict[str, Seen]:
        seen = {}
        for node in nodes:
            try:
                report = read_document(allocation.base.node(node).report, Report)
                seen[node] = Seen(report)
            except StateError as error:
                seen[node] = Seen(problem=str(error))
        return seen

    def assign(self, allocation: Allocation, node: str, assignment: Assignment) -> None:
        paths = allocation.base.node(node)
        make_private(paths.root)
        write_document(paths.assignment, assignment)

    def logs(self, allocation: Allocation, node: str) -> list[str]:
        root = allocation.base.node(node).root
        found = [file for file in (root / "logs").glob("*.log") if file.is_file()]
        found += [root / "agent.log"] if (root / "agent.log").is_file() else []
        return [file.relative_to(root).as_posix() for file in sorted(found)]

    def read_log(self, allocation: Allocation, node: str, name: str, offset: int) -> bytes:
        path = allocation.base.node(node).root / name
        try:
            with path.open("rb") as file:
                size = file.seek(0, os.SEEK_END)
                file.seek(max(0, size + offset) if offset < 0 else min(offset, size))
                return file.read(LOG_READ_MAX_BYTES)
        except OSError:
            return b""
