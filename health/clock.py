"""Is a node's clock right, as far as an exchange of messages can tell? Pure."""

from health.report import Finding


def clock_finding(
    taken_at: float, began_at: float, ended_at: float, limit_s: float
) -> Finding | None:
    """What is wrong with a clock that showed `taken_at` between two of our instants.

    Without an offset taken_at lies between them; what lies outside by more than the limit is
    certain to be an offset, whatever the network did meanwhile.
    """
    if taken_at > ended_at + limit_s:
        offset_s, word = taken_at - ended_at, "ahead of"
    elif taken_at < began_at - limit_s:
        offset_s, word = began_at - taken_at, "behind"
    else:
        return None
    return Finding(
        check="host.clock_offset",
        verdict="unhealthy",
        message=f"its clock is at least {offset_s:.1f} s {word} ours",
        hint="Start chronyd or ntpd on the node that is wrong.",
        advice="fix configuration",
        value=f"{offset_s:.1f} s",
        threshold=f"{limit_s} s",
    )
