"""`vllm serve` as far as launcher uses it: the API server on the leader, `--headless` elsewhere.

Like the real one it does not notice that a peer is gone: the leader asks every follower at each
step, and waits for one that is stopped or dead for ever, in silence. FAKE_ENGINE_FAULT makes it
misbehave: crash (an error at start), exit0 (dies with code 0 after serving began), hang (never
ready), stall (after FAKE_ENGINE_STALL_AFTER tokens no step ends, while /health and /metrics
answer). FAKE_ENGINE_DELAY_S is how long it thinks about each request, in steps. FAKE_ENGINE_SHARES
names a segment and a semaphore that it shares, and leaves behind when it is killed.
"""

import argparse
import json
import os
import socket
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

parser = argparse.ArgumentParser(prog="vllm")
parser.add_argument("verb", choices=["serve"])
parser.add_argument("model")
parser.add_argument("--host")
parser.add_argument("--port", type=int)
parser.add_argument("--served-model-name", nargs="+", required=True)
parser.add_argument("--tensor-parallel-size", type=int, required=True)
parser.add_argument("--pipeline-parallel-size", type=int, required=True)
parser.add_argument("--data-parallel-size", type=int, default=1)
parser.add_argument("--data-parallel-backend")
parser.add_argument("--data-parallel-rpc-port", type=int)
parser.add_argument("--distributed-executor-backend", choices=["ray", "mp"], required=True)
parser.add_argument("--nnodes", type=int, default=1)
parser.add_argument("--node-rank", type=int, default=0)
parser.add_argument("--master-addr")
parser.add_argument("--master-port", type=int)
parser.add_argument("--headless", action="store_true")
parser.add_argument("--max-model-len", type=int)
parser.add_argument("--enforce-eager", action="store_true")
parser.add_argument("--dtype")
parser.add_argument("--middleware")
arguments = parser.parse_args()
fault = os.environ.get("FAKE_ENGINE_FAULT", "")
print(f"fake engine, model {arguments.model}", flush=True)
if fault == "crash":
    print("ValueError: the model's head size 7 is not supported", file=sys.stderr, flush=True)
    raise SystemExit(1)


def rendezvous() -> None:
    """All ranks meet, as torch.distributed does; afterwards nobody watches anybody."""
    if arguments.distributed_executor_backend == "ray":
        address, port = os.environ["RAY_ADDRESS"].split(":")
        with socket.create_connection((address, int(port)), timeout=5):
            return
    if arguments.nnodes == 1:
        return
    if arguments.node_rank == 0:
        server = socket.create_server((arguments.master_addr, arguments.master_port))
        kept.extend(server.accept()[0] for _ in range(arguments.nnodes - 1))
        for follower in kept:
            follower.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        return
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        try:
            kept.append(
                socket.create_connection((arguments.master_addr, arguments.master_port), timeout=5)
            )
            return
        except OSError:
            time.sleep(0.1)
    raise SystemExit("TimeoutError: no leader")


def share(name: str) -> tuple[object, object]:
    """By the same calls as multiprocessing, without the process that tidies up after it."""
    import _multiprocessing
    import _posixshmem
    import mmap

    handle = _posixshmem.shm_open(f"/psm_{name}", os.O_CREAT | os.O_EXCL | os.O_RDWR, mode=0o600)
    os.ftruncate(handle, 4096)
    semaphore = _multiprocessing.SemLock(0, 1, 1, f"/mp-{name}", False)
    return mmap.mmap(handle, 4096), semaphore


kept: list[socket.socket] = []
rendezvous()
if shares := os.environ.get("FAKE_ENGINE_SHARES"):
    shared = share(f"{shares}-{arguments.node_rank}-{os.getpid()}")
if arguments.headless:
    for leader in kept:
        leader.settimeout(None)
        while asked := leader.recv(1):
            leader.sendall(asked)
    threading.Event().wait()  # nobody asks any more, and nobody told it to end


def answers(follower: socket.socket) -> bool:
    """Whether it does its part of a step; this waits as long as it takes."""
    try:
        follower.sendall(b"t")
        return bool(follower.recv(1))
    except OSError:
        return False


class Engine:
    """One engine of a data-parallel group: its figures, and its steps through all ranks."""

    def __init__(self) -> None:
        self.running = 0
        self.steps = 0
        self.tokens = 0
        self.prompts = 0
        self.lock = threading.Lock()
        self.count = threading.Lock()

    def step(self, tokens: int) -> None:
        with self.lock:
            if fault == "stall" and self.tokens >= stall_after:
                threading.Event().wait()
            for follower in kept:
                if not answers(follower):
                    threading.Event().wait()
            self.steps += 1
            self.tokens += tokens
            self.prompts += tokens

    def think(self) -> None:
        """A token after FAKE_ENGINE_DELAY_S, with a step at least twice a second until then."""
        with self.count:
            self.running += 1
        try:
            left_s = float(os.environ.get("FAKE_ENGINE_DELAY_S", "0"))
            while left_s > 0:
                time.sleep(min(left_s, 0.5))
                left_s -= 0.5
                self.step(0)
            self.step(1)
        finally:
            with self.count:
                self.running -= 1


stall_after = int(os.environ.get("FAKE_ENGINE_STALL_AFTER", "2"))
engines = [Engine() for _ in range(arguments.data_parallel_size)]


def metrics() -> str:
    """What vLLM 0.32 writes, as far as anybody here reads it."""
    rows = []
    for name, kind, read in (
        ("num_requests_running", "gauge", lambda engine: engine.running),
        ("num_requests_waiting", "gauge", lambda engine: 0),
        ("kv_cache_usage_perc", "gauge", lambda engine: 0),
        ("prompt_tokens_total", "counter", lambda engine: engine.prompts),
        ("generation_tokens_total", "counter", lambda engine: engine.tokens),
        ("iteration_tokens_total", "histogram", None),
    ):
        rows.append(f"# HELP vllm:{name} Of the fake engine.")
        rows.append(f"# TYPE vllm:{name} {kind}")
        for number, engine in enumerate(engines):
            labels = f'engine="{number}",model_name="{arguments.served_model_name[0]}"'
            if read is not None:
                rows.append(f"vllm:{name}{{{labels}}} {float(read(engine))}")
                continue
            rows.append(f'vllm:{name}_bucket{{{labels},le="+Inf"}} {float(engine.steps)}')
            rows.append(f"vllm:{name}_count{{{labels}}} {float(engine.steps)}")
            rows.append(f"vllm:{name}_sum{{{labels}}} {float(2 * engine.tokens)}")
    return "\n".join(rows) + "\n"


class Api(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *rest: object) -> None:
        return

    def answer(self, code: int, content: dict | str) -> None:
        plain = isinstance(content, str)
        body = (content if plain else json.dumps(content)).encode()
        self.send_response(code)
        self.send_header("Content-Type", "text/plain" if plain else "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def do_GET(self) -> None:
        if self.path == "/metrics":
            self.answer(200, metrics())
        else:
            self.answer(200 if self.path == "/health" else 404, {})

    def do_POST(self) -> None:
        length = int(self.headers.get("Content-Length", 0))
        asked = json.loads(self.rfile.read(length))
        if self.headers.get("Authorization") != f"Bearer {os.environ['VLLM_API_KEY']}":
            self.answer(401, {"error": "Unauthorized"})
            return
        if asked.get("model") not in arguments.served_model_name:
            self.answer(404, {"error": "no such model"})
            return
        engines[int(self.headers.get("X-data-parallel-rank", "0"))].think()
        usage = {"prompt_tokens": 1, "completion_tokens": 1, "total_tokens": 2}
        choice = {"index": 0, "finish_reason": "length"}
        if self.path == "/v1/completions":
            self.answer(200, {"choices": [{**choice, "text": "x"}], "usage": usage})
        elif self.path == "/v1/chat/completions":
            message = {"role": "assistant", "content": "x"}
            self.answer(200, {"choices": [{**choice, "message": message}], "usage": usage})
        else:
            self.answer(404, {})


if fault == "hang":
    threading.Event().wait()
server = ThreadingHTTPServer((arguments.host, arguments.port), Api)
if fault == "exit0":
    threading.Timer(4.0, lambda: os._exit(0)).start()
server.serve_forever()
