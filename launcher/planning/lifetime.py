"""When a fleet ends although nobody wished it down: it is old enough, or nobody needs it. Pure."""

from launcher.planning.draft import Draft


def why_over(draft: Draft) -> str:
    """Why the fleet is to end now; empty as long as it is not."""
    limits = draft.context.spec.limits
    if limits.ttl is not None and draft.now - draft.record.started_at >= limits.ttl:
        return f"it came up {_span(limits.ttl)} ago (limits.ttl)"
    if limits.idle is not None and _idle_s(draft) >= limits.idle:
        return f"nobody asked it anything for {_span(limits.idle)} (limits.idle)"
    return ""


def _idle_s(draft: Draft) -> float:
    """For how long somebody could have asked, and nobody did. What is unknown is not idle."""
    quiet_s = draft.snapshot.gateway.quiet_s
    serving = [at for one in draft.record.replicas.values() if (at := one.serving_at) is not None]
    if quiet_s is None or not serving:
        return 0.0
    return min(quiet_s, draft.now - max(serving))


def _span(seconds: int) -> str:
    if seconds < 3600:
        return f"{seconds / 60:.3g} min"
    return f"{seconds / 3600:.3g} h"
