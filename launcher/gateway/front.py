"""The configuration of HAProxy, the front: TLS, keys, limits, hygiene, and the tier's processes.

Members never appear here: they change at run time, in the tier. A change here is a reload. Pure.
"""

import json
from dataclasses import dataclass

from launcher.gateway.documents import Settings
from launcher.gateway.events import error_body

# What a client may send before it is answered; larger bodies pass on unbuffered, and are kept in
# the tier. HAProxy can repeat what fits here when a tier process dies.
BUFFER_BYTES = 16_384
HEADER_TIMEOUT_S = 10
KEEP_ALIVE_S = 60
# Segments of harmless letters that do not begin with a dot: no way up, no empty one, nothing that
# an engine could decode into another path.
_PATHS = "^/v1(/[A-Za-z0-9_:@~-][A-Za-z0-9_.:@~-]*)+/?$"
REFUSED_HEADER = "X-Launcher-Refused"  # the tier's word for why
# Longest generation: nothing may arrive meanwhile where the client does not stream.
IDLE_TIMEOUT_S = 3600

_PAGES = {
    400: ("the request is malformed or its headers are too large", "bad_request"),
    408: ("the request did not arrive in time", "request_timeout"),
    500: ("the gateway failed", "gateway"),
    502: ("the gateway's own process failed", "gateway"),
    503: ("the gateway is restarting", "gateway"),
    504: ("no answer within an hour", "timeout"),
}


@dataclass(frozen=True)
class FrontPlaces:
    """Where the front finds what it needs: all in the private run folder."""

    socket: str
    keys_map: str
    tier_sockets: tuple[str, ...]
    certificate: str = ""


def render(settings: Settings, places: FrontPlaces, threads: int) -> str:
    """haproxy.cfg; paths are quoted, and nothing else in it comes from a user unchecked."""
    tls = f" ssl crt {_quoted(places.certificate)} alpn h2,http/1.1" if places.certificate else ""
    host = "" if settings.host in ("", "0.0.0.0") else settings.host
    pages = "\n".join(
        f"  http-error status {status} content-type application/json string {_json(status, *page)}"
        + (" hdr Retry-After 1" if status == 503 else "")
        for status, page in _PAGES.items()
    )
    servers = "\n".join(
        f"  server t{index} unix@{_quoted(path)} check inter 1s fastinter 500ms fall 2 rise 1"
        for index, path in enumerate(places.tier_sockets)
    )
    return f"""\
# Made by launcher for the fleet {settings.fleet}; changes are overwritten.
global
  nbthread {threads}
  fd-hard-limit 65536
  tune.bufsize {BUFFER_BYTES}
  stats socket {_quoted(places.socket)} mode 600 level admin expose-fd listeners
  stats timeout 1h
  hard-stop-after {IDLE_TIMEOUT_S}s
  log stdout format raw local0
  ssl-default-bind-options ssl-min-ver TLSv1.2

defaults
  mode http
  log global
  timeout connect 2s
  timeout http-request {HEADER_TIMEOUT_S}s
  timeout http-keep-alive {KEEP_ALIVE_S}s
  timeout client {IDLE_TIMEOUT_S}s
  timeout server {IDLE_TIMEOUT_S}s
  timeout check 2s
  timeout queue 30s
  # Without it the first token waits for the next one: 47 ms.
  option http-no-delay
  # Without it an engine goes on for a client that has left.
  option abortonclose
  # Each request has a connection of its own to the tier: none is closed under a request's feet.
  option http-server-close
  http-reuse never
  option redispatch 1
  retries 3
  retry-on conn-failure empty-response
{pages}

frontend api
  bind {host}:{settings.port}{tls}
  option http-buffer-request
  log-format "%t refused=%[var(txn.cause)] status=%ST client=%ci:%cp \
key=%[var(txn.key)] end=%tsc bytes=%U ms=%Ta %HM %{{+Q}}HP"
{_refuse("path", 404, "only /v1/ is served here", f"!{{ path -m reg {_PATHS} }}")}
{_refuse("path", 404, "adapters are changed in the spec", "{ path_sub load_lora_adapter }")}
{_refuse("method", 405, "GET and POST are served here", "!{ method GET POST }")}
{_refuse("upgrade", 400, "no upgrade is served here", "{ req.hdr_cnt(upgrade) gt 0 }")}
  http-request set-var(txn.key) \
req.hdr(authorization),word(2,\\ ),sha2(256),hex,lower,map_str({places.keys_map})
{_refuse("key", 401, "the API key is missing or not valid", "!{ var(txn.key) -m found }")}
{
        _refuse(
            "body_size",
            413,
            f"the body is larger than {settings.body_max_bytes} bytes",
            f"{{ req.body_size gt {settings.body_max_bytes} }}",
        )
    }
  http-request del-header x-launcher- -m beg
  http-request set-header X-Launcher-Key %[var(txn.key)]
  http-response set-log-level silent if {{ status lt 400 }}
  http-response del-header server
  http-after-response set-var(txn.cause) res.hdr({REFUSED_HEADER})
  default_backend tier

backend tier
  balance leastconn
  option httpchk GET /-/alive
{servers}
"""


def _refuse(cause: str, status: int, message: str, condition: str) -> str:
    """A rule with our own answer; its header tells the log why."""
    test = f"unless {condition[1:]}" if condition.startswith("!") else f"if {condition}"
    challenge = " hdr WWW-Authenticate Bearer" if status == 401 else ""
    return (
        f"  http-request return status {status} content-type application/json "
        f"string {_json(status, message, cause)} hdr {REFUSED_HEADER} {cause}{challenge} {test}"
    )


def _json(status: int, message: str, kind: str) -> str:
    return _quoted(json.dumps(error_body(message, kind, status)))


def _quoted(text: str) -> str:
    """One word of HAProxy's configuration: in single quotes nothing has a meaning."""
    return "'" + text.replace("'", "'\\''") + "'"
