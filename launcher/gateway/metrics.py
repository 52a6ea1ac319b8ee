"""What Prometheus reads, made from the states of the tier's processes and the front. Pure."""

from collections.abc import Iterator, Mapping

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily
from prometheus_client.metrics_core import Metric

from launcher.gateway.documents import BUCKETS_S, Histogram, State

_COUNTS = {
    "sent": "Requests sent to this member, each try counted.",
    "answered": "Tries that ended with a whole answer.",
    "retried": "Requests that lost this member before a token and were tried elsewhere.",
    "broken": "Streams that ended in the middle, with an error event.",
    "continued": "Streams begun here and finished by another member.",
    "aborted": "Requests whose client went away.",
    "errors": "Requests that failed here on their last try.",
}
_TIMES = {
    "queue": "Time a request was in the gateway before this member got it.",
    "first_token": "Time from sending to the first token, or to the whole answer.",
}


def exposition(state: State, front: Mapping[str, Mapping[str, str]]) -> bytes:
    """The text of /metrics. front: the rows of HAProxy's `show stat`."""

    class Collector:
        def collect(self) -> Iterator[Metric]:
            yield from _members(state)
            yield from _tier(state)
            yield from _front(front)

    registry = CollectorRegistry()
    registry.register(Collector())
    return generate_latest(registry)


def _members(state: State) -> Iterator[Metric]:
    labels = ["process", "member", "where"]
    where = {member.name: member.where for member in state.orders.members}
    rows = [
        ([str(process.pid), name, where.get(name, "")], tally)
        for process in state.processes
        for name, tally in process.members.items()
    ]
    in_flight = GaugeMetricFamily(
        "launcher_gateway_in_flight", "Requests at this member.", labels=labels
    )
    for values, tally in rows:
        in_flight.add_metric(values, tally.in_flight)
    yield in_flight
    for name, text in _COUNTS.items():
        counter = CounterMetricFamily(f"launcher_gateway_{name}", text, labels=labels)
        for values, tally in rows:
            counter.add_metric(values, getattr(tally, name))
        yield counter
    for name, text in _TIMES.items():
        family = HistogramMetricFamily(f"launcher_gateway_{name}_seconds", text, labels=labels)
        for values, tally in rows:
            histogram: Histogram = getattr(tally, name)
            family.add_metric(values, _buckets(histogram), histogram.sum_s)
        yield family


def _buckets(histogram: Histogram) -> list[tuple[str, float]]:
    total, found = 0, []
    bounds = [*(str(bound) for bound in BUCKETS_S), "+Inf"]
    for bound, count in zip(bounds, histogram.counts, strict=True):
        total += count
        found.append((bound, float(total)))
    return found


def _tier(state: State) -> Iterator[Metric]:
    gauges = {"waiting": "without a token yet", "holding": "without a member to ask"}
    for name, text in gauges.items():
        gauge = GaugeMetricFamily(
            f"launcher_gateway_{name}", f"Requests {text}.", labels=["process"]
        )
        for process in state.processes:
            gauge.add_metric([str(process.pid)], getattr(process, name))
        yield gauge
    counts = {
        "rescued": "Requests that a second member answered.",
        "fell_back": "Tries that went to the fallback model.",
    }
    for name, text in counts.items():
        counter = CounterMetricFamily(f"launcher_gateway_{name}", text, labels=["process"])
        for process in state.processes:
            counter.add_metric([str(process.pid)], getattr(process, name))
        yield counter
    for name, label in (("refused", "cause"), ("by_key", "key")):
        family = CounterMetricFamily(
            f"launcher_gateway_requests_{name}",
            f"Requests by {label}.",
            labels=["process", label],
        )
        for process in state.processes:
            for value, count in getattr(process, name).items():
                family.add_metric([str(process.pid), value], count)
        yield family


def _front(rows: Mapping[str, Mapping[str, str]]) -> Iterator[Metric]:
    row = rows.get("api/FRONTEND", {})
    sessions = GaugeMetricFamily("launcher_front_connections", "Connections of clients.")
    sessions.add_metric([], float(row.get("scur") or 0))
    yield sessions
    responses = CounterMetricFamily(
        "launcher_front_responses", "Responses by class, refusals included.", labels=["class"]
    )
    for name in ("2xx", "3xx", "4xx", "5xx", "other"):
        responses.add_metric([name], float(row.get(f"hrsp_{name}") or 0))
    yield responses
