"""Why a request is not answered, in words and a status that clients understand. Pure."""

from dataclasses import dataclass


@dataclass
class Refusal(Exception):  # noqa: N818 - an answer, not a fault of ours
    """The end of a request that we give ourselves. `cause` is a word for logs and metrics."""

    status: int
    cause: str
    message: str
    retry_after_s: int | None = None


@dataclass
class Lost(Exception):  # noqa: N818 - the next member is asked
    """One try has failed before the client got anything of it; another member may be asked.

    status, body: what the engine answered, if it did; the client gets it after the last try.
    connected: whether the engine got the request at all.
    """

    why: str
    connected: bool = True
    status: int | None = None
    body: bytes = b""
    content_type: str = "application/json"


def too_many(whose: str, waiting_max: int) -> Refusal:
    return Refusal(
        429,
        "waiting",
        f"{waiting_max} requests {whose} are waiting already; try again later",
        retry_after_s=2,
    )


def nobody(waited_s: float) -> Refusal:
    waited = f" after {waited_s:.0f} s" if waited_s >= 1 else ""
    return Refusal(503, "no_replica", f"no replica can take the request{waited}", retry_after_s=5)


def too_large(limit_bytes: int) -> Refusal:
    return Refusal(413, "body_size", f"the body is larger than {limit_bytes} bytes")


def too_slow(limit_s: float) -> Refusal:
    return Refusal(408, "body_time", f"the body did not arrive within {limit_s:.0f} s")


def closing() -> Refusal:
    return Refusal(503, "closing", "the fleet is going down", retry_after_s=30)


def gave_up(tries: int, lost: Lost) -> Refusal:
    return Refusal(502, "tries", f"{tries} replicas failed at this request; the last: {lost.why}")
