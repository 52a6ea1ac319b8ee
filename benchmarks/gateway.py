"""The gateway beside others, on fake engines: it is the wire that is measured, not the model.

    python benchmarks/gateway.py [--only NAME …] [--seconds 4] [--no-faults] [--json]
    python benchmarks/gateway.py --churn 300 [--json]

Everything runs on this machine, one gateway after the other, with the same client, the same three
engines and the same settings (checks each second, two failures). Each figure is a median of what
the client saw, or CPU time of all processes of the gateway; figures of one run are comparable with
each other only. In the fault table a request is lost when its client gets an error and had no
token yet, begun when tokens had come, stuck when there was no end within eight seconds.
"""

import json
import statistics
import sys
import threading
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import uvloop

from benchmarks import gateway_peers
from benchmarks.common import document, options, say, show
from benchmarks.gateway_load import Outcome, closed_loop, open_loop
from benchmarks.gateway_peers import PEERS, Both, Peer
from launcher.gateway.members import in_flight
from tests.gateway.engines import Engine

VERDICT_AFTER_S = 3.0
PATIENCE_S = 8.0
RATE = 30.0
FAULT_AT_S = 2.0
LOAD_S = 6.0


def run(work):
    return uvloop.run(work)


def percentile(values: list[float], share: float) -> float:
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))]


def overhead(kind: type[Peer], seconds: float) -> dict[str, float]:
    """Latency at 1 and 32 connections, CPU for a request and for a chunk, time to first token."""
    engines = [Engine() for _ in range(3)]
    peer = kind(engines)
    found: dict[str, float] = {}
    try:
        began = time.monotonic()
        peer.start()
        found["start_s"] = time.monotonic() - began
        run(closed_loop(peer.address, connections=4, seconds=0.5, stream=False, tokens=1))
        for connections in (1, 32):
            before = peer.cpu_s()
            load = run(
                closed_loop(
                    peer.address, connections=connections, seconds=seconds, stream=False, tokens=1
                )
            )
            count = max(1, len(load.latencies_s))
            found[f"c{connections}_p50_ms"] = statistics.median(load.latencies_s) * 1e3
            found[f"c{connections}_p99_ms"] = percentile(load.latencies_s, 0.99) * 1e3
            found[f"c{connections}_per_s"] = count / seconds
            found[f"c{connections}_failed"] = load.failed
            if connections == 32:
                found["cpu_us_per_request"] = (peer.cpu_s() - before) / count * 1e6
        for engine in engines:
            engine.fault(ttft_s=0.02, gap_s=0.0)
        load = run(
            closed_loop(peer.address, connections=4, seconds=seconds, stream=True, tokens=3)
        )
        found["first_token_ms"] = statistics.median(load.first_s) * 1e3
        for engine in engines:
            engine.fault(ttft_s=0.02, gap_s=0.01)
        before = peer.cpu_s()
        tokens = 300
        load = run(
            closed_loop(peer.address, connections=12, seconds=seconds, stream=True, tokens=tokens)
        )
        chunks = max(1, len(load.latencies_s)) * (tokens + 1)
        found["cpu_us_per_chunk"] = (peer.cpu_s() - before) / chunks * 1e6
        found["memory_mb"] = peer.memory_mb()
    finally:
        peer.stop()
        for engine in engines:
            engine.kill()
    return found


# Faults: (name, what the engines do from the start, what happens to the first one in the middle)


def _kill(engine: Engine) -> None:
    engine.kill()


def _flap(engine: Engine) -> None:
    for _ in range(3):
        engine.kill()
        time.sleep(0.5)
        engine.start()
        time.sleep(0.7)


FAULTS = {
    "kill -9 with requests in prefill": (_kill, False),
    "SIGSTOP": (lambda engine: engine.freeze(), True),
    "chat hangs, /health answers": (lambda engine: engine.fault(kind="hang"), True),
    "five times slower": (lambda engine: engine.fault(ttft_s=5.0), False),
    "flapping, three times in 4 s": (_flap, False),
    "closes streams in the middle": (lambda engine: engine.fault(kind="close"), False),
    "answers 500": (lambda engine: engine.fault(kind="error"), False),
    "wrong content length": (lambda engine: engine.fault(kind="short"), False),
}


def fault(kind: type[Peer], name: str) -> dict[str, float]:
    """One fault at the first of three engines, under a steady load of both kinds of requests."""
    act, has_verdict = FAULTS[name]
    engines = [Engine(ttft_s=1.0, gap_s=0.02) for _ in range(3)]
    peer = kind(engines)
    try:
        peer.start()

        def happen() -> None:
            time.sleep(FAULT_AT_S)
            act(engines[0])
            if has_verdict or act is _kill:
                time.sleep(VERDICT_AFTER_S)
                peer.verdict(0)

        thread = threading.Thread(target=happen)
        thread.start()
        outcomes = run(
            open_loop(
                peer.address,
                per_second=RATE,
                seconds=LOAD_S,
                tokens=8,
                patience_s=PATIENCE_S,
            )
        )
        thread.join()
    finally:
        peer.stop()
        for engine in engines:
            engine.thaw()
            engine.kill()
    return tally(outcomes)


def tally(outcomes: list[Outcome]) -> dict[str, float]:
    counted = dict.fromkeys(("ok", "lost", "begun", "stuck"), 0)
    for outcome in outcomes:
        counted[outcome.ended] += 1
    answered = [outcome.took_s for outcome in outcomes if outcome.ended == "ok"]
    why = sorted({outcome.why for outcome in outcomes if outcome.why})
    return {
        **counted,
        "of": len(outcomes),
        "longest_s": round(max((o.took_s for o in outcomes), default=0), 1),
        "median_s": round(statistics.median(answered), 2) if answered else None,
        "why": why,
    }


def churn(seconds: float) -> dict[str, object]:
    """A member added, drained and removed each second under 200 requests a second; the gateway
    restarted in the middle."""
    engines = [Engine(ttft_s=0.01, gap_s=0.005) for _ in range(4)]
    peer = Both(engines)
    changes, waited = 0, 0.0
    try:
        peer.start()
        gateway = peer.gateway
        result: list[list[Outcome]] = []

        def load() -> None:
            result.append(
                run(
                    open_loop(
                        peer.address,
                        per_second=200,
                        seconds=seconds,
                        tokens=6,
                        patience_s=PATIENCE_S,
                    )
                )
            )

        thread = threading.Thread(target=load)
        thread.start()
        began = time.monotonic()
        renewed = 0
        while thread.is_alive():
            changes += 1
            gateway.add(f"c{changes}", engines[changes % 4].url)
            leaving = f"c{changes - 1}" if changes > 1 else "m0"
            gateway.drain(leaving)
            at = time.monotonic()
            while not _left(gateway, leaving) and time.monotonic() - at < 20:
                time.sleep(0.02)
            waited = max(waited, time.monotonic() - at)
            gateway.remove(leaving)
            if renewed < 2 and time.monotonic() - began > seconds * (renewed + 1) / 3:
                gateway.renew()
                renewed += 1
            time.sleep(max(0.0, 1 - (time.monotonic() - at)))
        thread.join()
    finally:
        peer.stop()
        for engine in engines:
            engine.kill()
    return {
        **tally(result[0]),
        "seconds": seconds,
        "changes": changes,
        "restarts": renewed,
        "longest_drain_s": round(waited, 2),
    }


def _left(gateway, name: str) -> bool:
    state, revision = gateway.state(), gateway.orders().revision
    serving = [p for p in state.processes if not p.retiring] if state else []
    known = bool(serving) and all(p.orders_revision == revision for p in serving)
    return known and in_flight(state, name) == 0


def ratios(results: dict[str, dict[str, float]]) -> dict[str, float]:
    """What the bounds are about."""
    front, both = results.get("ours: front alone"), results.get("ours: both")
    direct, router, smg = (results.get(name) for name in ("direct", "vllm-router", "smg"))
    found = {}
    if front and direct:
        found["front: added p50 at c1, ms (0.2)"] = front["c1_p50_ms"] - direct["c1_p50_ms"]
    if front and router:
        found["front: CPU per request / vllm-router's (0.5)"] = (
            front["cpu_us_per_request"] / router["cpu_us_per_request"]
        )
    if both and direct:
        found["both: added time to first token, ms (2)"] = (
            both["first_token_ms"] - direct["first_token_ms"]
        )
    if both and smg:
        found["both: CPU per chunk / smg's (2)"] = (
            both["cpu_us_per_chunk"] / smg["cpu_us_per_chunk"]
        )
    return {name: round(value, 2) for name, value in found.items()}


def main() -> int:
    parser = options(__doc__)
    parser.add_argument("--only", nargs="*", help="names of gateways, or the beginning of one")
    parser.add_argument("--fault", nargs="*", help="names of faults, or the beginning of one")
    parser.add_argument("--seconds", type=float, default=4.0)
    parser.add_argument("--no-faults", action="store_true")
    parser.add_argument("--no-overhead", action="store_true")
    parser.add_argument("--churn", type=float, help="seconds of coming and going instead")
    arguments = parser.parse_args()
    if arguments.churn:
        tell(document("gateway", churn=churn(arguments.churn)), as_json=arguments.json)
        return 0
    gateway_peers.install()
    chosen = [k for k in PEERS if not arguments.only or k.name.startswith(tuple(arguments.only))]
    results, faults = {}, {}
    for kind in chosen:
        if not arguments.no_overhead:
            say(f"{kind.name} …")
            results[kind.name] = overhead(kind, arguments.seconds)
            say(json.dumps({k: round(v, 2) for k, v in results[kind.name].items()}))
    for name in FAULTS:
        if arguments.no_faults or (
            arguments.fault and not name.startswith(tuple(arguments.fault))
        ):
            continue
        faults[name] = {}
        for kind in chosen:
            if kind.name != "direct":
                faults[name][kind.name] = fault(kind, name)
                say(f"{name}: {kind.name}: {faults[name][kind.name]}")
    found = document("gateway", results=results, ratios=ratios(results), faults=faults)
    tell(found, as_json=arguments.json)
    return 0


def tell(found: dict[str, object], *, as_json: bool) -> None:
    show(found, json.dumps(found), as_json=as_json)


if __name__ == "__main__":
    sys.exit(main())
