"""`launcher gateway …`: what it does now, its keys, its restart."""

import secrets
import sys
import time
from typing import Any

from launcher.cli import output
from launcher.errors import FleetError, StateError, UsageError
from launcher.gateway import keyring
from launcher.gateway.documents import BUCKETS_S, Histogram, Keys, State
from launcher.gateway.door import FRESH_S, Gateway
from launcher.paths import FleetPaths

RENEWED_WITHIN_S = 60.0


def status(paths: FleetPaths, *, as_json: bool) -> int:
    """Members, requests in flight, waiting, rescued, refused. 0 while it takes requests."""
    state = _state(paths)
    now = time.time()
    told = described(state, now)
    if as_json:
        output.document(told)
    else:
        output.show(screen(state, now - state.at))
    return 0 if told["up"] else 1


def described(state: State, now: float) -> dict[str, Any]:
    """The state as a document, with its age and whether it takes requests. Pure."""
    age_s = now - state.at
    is_up = state.front == "up" and bool(state.processes) and age_s < FRESH_S
    return {**state.model_dump(mode="json"), "age_s": round(age_s, 1), "up": is_up}


def fresh_state(paths: FleetPaths) -> State | None:
    """What the gateway says now; None where it says nothing, whatever the reason."""
    try:
        state = Gateway(paths.gateway).state()
    except FleetError:
        return None
    return state if state is not None and time.time() - state.at < FRESH_S else None


def restart(paths: FleetPaths) -> int:
    """Let it become the installed version; no request is dropped."""
    _state(paths)
    gateway = Gateway(paths.gateway)
    owner = gateway.owner()
    before = {process.pid for process in owner.tier} if owner else set()
    gateway.start()
    limit = time.monotonic() + RENEWED_WITHIN_S
    while time.monotonic() < limit and not gateway.is_supervised():
        time.sleep(0.1)
    gateway.renew()
    while time.monotonic() < limit:
        state = gateway.state()
        serving = {p.pid for p in state.processes if not p.retiring} if state else set()
        if serving and not serving & before:
            output.say("restarted; what was under way ends in the old processes")
            return 0
        time.sleep(0.1)
    raise StateError(
        "the gateway was not replaced in time", where=str(paths.gateway.log), hint="See its log."
    )


def add_key(
    paths: FleetPaths, name: str, waiting_max: int | None, *, from_stdin: bool, as_json: bool
) -> int:
    """Make a key and show it once; afterwards only its hash is known."""
    gateway = Gateway(paths.gateway)
    secret = f"sk-{secrets.token_urlsafe(32)}"
    if from_stdin:
        secret = sys.stdin.readline().strip()
    if len(secret) < 16 or not secret.isprintable() or " " in secret:
        raise UsageError(
            "a key has at least 16 printable letters",
            where="stdin",
            hint="Leave --stdin out, and one is made.",
        )
    now = time.time()
    gateway.change_keys(lambda keys: keyring.added(keys, name, secret, now, waiting_max))
    if as_json:
        output.document({"version": 1, "name": name, "key": secret})
    else:
        output.say(f"the key {name}, shown once:")
        output.show(secret)
    return 0


def revoke_key(paths: FleetPaths, name: str) -> int:
    """A key counts no more; the fleet's own is made anew by the next `up`."""

    def revoke(keys: Keys) -> Keys:
        after = keyring.revoked(keys, name)
        if name == "default":  # with its file: the controller would add it again
            paths.api_key.unlink(missing_ok=True)
        return after

    Gateway(paths.gateway).change_keys(revoke)
    output.say(f"{name} is revoked")
    return 0


def list_keys(paths: FleetPaths, *, as_json: bool) -> int:
    keys = Gateway(paths.gateway).keys().keys
    if as_json:
        output.document(
            {"version": 1, "keys": [k.model_dump(exclude={"sha256", "slot"}) for k in keys]}
        )
        return 0
    rows = [["KEY", "MADE", "MAY WAIT"]]
    rows += [[k.name, f"{output.ago(k.made_at)} ago", str(k.waiting_max or "-")] for k in keys]
    output.show(output.table(rows))
    return 0


def screen(state: State, age_s: float) -> str:
    """What an operator looks at when requests fail or wait. Pure but for its arguments."""
    processes = state.processes
    total = {
        name: sum(getattr(process, name) for process in processes)
        for name in ("in_flight", "waiting", "holding", "rescued", "fell_back")
    }
    word = "up" if state.front == "up" and processes else "down"
    serving = [process for process in processes if not process.retiring]
    head = (
        f"{state.fleet}   {state.address}/v1   {word}   {len(serving)} processes on {state.host}"
    )
    lines = [head]
    if age_s > FRESH_S:
        lines.append(f"nothing was heard of it for {output.span(age_s)}; what follows is old")
    counts = f"{total['in_flight']} in flight, {total['waiting']} without a token yet"
    lines.append(f"{counts}, {total['holding']} held until a replica comes")
    columns = ["MEMBER", "STATE", "IN FLIGHT", "SENT", "TOKEN P50", "RETRIED", "BROKEN"]
    rows = [[*columns, "ERRORS", "WHERE"]]
    for member in state.orders.members:
        tallies = [p.members[member.name] for p in processes if member.name in p.members]
        word = member.goal
        if tallies and not all(tally.reachable for tally in tallies):
            word += ", not reachable"
        elif tallies and not all(tally.sure for tally in tallies):
            word += ", health in doubt"
        counted = {
            name: str(sum(getattr(tally, name) for tally in tallies))
            for name in ("in_flight", "sent", "retried", "broken", "errors")
        }
        middle = _median([tally.first_token for tally in tallies])
        row = [member.name, word, counted["in_flight"], counted["sent"], middle]
        rows.append([*row, *(counted[n] for n in ("retried", "broken", "errors")), member.where])
    if len(rows) > 1:
        lines.append(output.table(rows))
    else:
        lines.append(
            "no member takes traffic" + ("; one is coming" if state.orders.expects else "")
        )
    lines.append(f"rescued {total['rescued']}, answered by the fallback {total['fell_back']}")
    refused: dict[str, int] = {}
    for process in processes:
        for cause, count in process.refused.items():
            refused[cause] = refused.get(cause, 0) + count
    if refused:
        told = ", ".join(f"{count} {cause}" for cause, count in sorted(refused.items()))
        lines.append(f"refused {told}")
    if state.metrics_port:
        lines.append(f"metrics http://127.0.0.1:{state.metrics_port}/metrics (on {state.host})")
    if state.problem:
        lines.append(f"problem: {state.problem}")
    return "\n".join(lines)


def _median(histograms: list[Histogram]) -> str:
    """The bound of the bucket in which the middle request lies."""
    counts = [sum(column) for column in zip(*(h.counts for h in histograms), strict=True)]
    total, passed = sum(counts), 0
    for bound, count in zip([*BUCKETS_S, float("inf")], counts, strict=False):
        passed += count
        if total and passed * 2 >= total:
            return f"≤{bound:g}s" if bound != float("inf") else f">{BUCKETS_S[-1]:g}s"
    return "-"


def _state(paths: FleetPaths) -> State:
    state = Gateway(paths.gateway).state()
    if state is None:
        raise StateError(
            "has no gateway yet",
            where=paths.root.name,
            hint="It comes up with the first replica: `launcher up`.",
        )
    return state
