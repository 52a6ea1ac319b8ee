"""`vllm serve` as far as launcher uses it: the API server on the leader, `--headless` elsewhere.

Like the real one it does not notice that a peer is gone. FAKE_ENGINE_FAULT makes it misbehave:
crash (an error at start), exit0 (dies with code 0 after serving began), hang (never ready).
FAKE_ENGINE_DELAY_S is how long it thinks about each request.
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


kept: list[socket.socket] = []
rendezvous()
if arguments.headless:
    threading.Event().wait()


class Api(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *rest: object) -> None:
        return

    def answer(self, code: int, content: dict) -> None:
        body = json.dumps(content).encode()
        self.send_response(code)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def do_GET(self) -> None:
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
        time.sleep(float(os.environ.get("FAKE_ENGINE_DELAY_S", "0")))
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
