"""`launcher support`: everything that a report about a fleet needs, and no secret."""

import time
from pathlib import Path

from launcher import support as archive
from launcher.cli import output
from launcher.errors import UsageError
from launcher.paths import FleetPaths
from launcher.wish import read_wish


def support(paths: FleetPaths, out: Path | None, *, as_json: bool) -> int:
    wish = read_wish(paths)
    if wish is None:
        raise UsageError(f"{paths.root.name} has no run yet", where="support")
    stamp = time.strftime("%Y%m%d-%H%M%S")
    target = (out or Path(f"launcher-{paths.root.name}-{stamp}.tar.gz")).absolute()
    problems = archive.write(paths, wish.run, target)
    size_bytes = target.stat().st_size
    if as_json:
        output.document(
            {"version": 1, "file": str(target), "bytes": size_bytes, "problems": problems}
        )
        return 0
    for problem in problems:
        output.say(f"not in it: {problem}")
    output.say("secrets are left out; look into it before you give it away")
    output.show(f"{target} ({size_bytes / 1024:.0f} KB)")
    return 0
