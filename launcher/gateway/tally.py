"""What a process of the tier counts: typed, in memory, told on its admin socket. Pure."""

from bisect import bisect_left
from collections import Counter

from launcher.gateway.documents import BUCKETS_S, Histogram, MemberTally


class Tally:
    def __init__(self) -> None:
        self.members: dict[str, MemberTally] = {}
        self.refused: Counter[str] = Counter()
        self.by_key: Counter[str] = Counter()
        self.rescued = 0
        self.fell_back = 0
        self.holding = 0

    def of(self, name: str) -> MemberTally:
        found = self.members.get(name)
        if found is None:
            found = self.members[name] = MemberTally()
        return found

    def forget(self, kept: set[str]) -> None:
        """Drop members that are no more and have nothing in flight."""
        for name in [n for n, t in self.members.items() if n not in kept and not t.in_flight]:
            del self.members[name]


def observe(histogram: Histogram, seconds: float) -> None:
    histogram.counts[bisect_left(BUCKETS_S, seconds)] += 1
    histogram.sum_s += seconds
