"""`ray start --block` as far as launcher uses it. Refuses to run without a token, as we demand."""

import argparse
import os
import socket
import sys
import threading
import time
from pathlib import Path

parser = argparse.ArgumentParser(prog="ray")
parser.add_argument("verb", choices=["start"])
parser.add_argument("--head", action="store_true")
parser.add_argument("--block", action="store_true", required=True)
parser.add_argument("--address")
parser.add_argument("--node-ip-address", required=True)
parser.add_argument("--port", type=int)
parser.add_argument("--num-gpus", type=int, required=True)
parser.add_argument("--num-cpus", type=int, required=True)
parser.add_argument("--temp-dir", required=True)
parser.add_argument("--disable-usage-stats", action="store_true")
parser.add_argument("--no-monitor", action="store_true")
PORTS = ["node-manager-port", "object-manager-port", "runtime-env-agent-port", "dashboard-port"]
PORTS += ["dashboard-agent-listen-port", "dashboard-agent-grpc-port", "metrics-export-port"]
PORTS += ["ray-client-server-port", "include-dashboard", "min-worker-port", "max-worker-port"]
for name in PORTS:
    parser.add_argument(f"--{name}")
arguments = parser.parse_args()
if (
    os.environ.get("RAY_AUTH_MODE") != "token"
    or not Path(os.environ["RAY_AUTH_TOKEN_PATH"]).is_file()
):
    sys.exit("no token")
if len(arguments.temp_dir) > 44:
    sys.exit("AF_UNIX path length cannot exceed 107 bytes")
raylet = socket.create_server((arguments.node_ip_address, int(arguments.node_manager_port)))
if arguments.head:
    server = socket.create_server((arguments.node_ip_address, arguments.port))
    while True:
        server.accept()
deadline = time.monotonic() + 60
host, port = arguments.address.split(":")
while time.monotonic() < deadline:
    try:
        connection = socket.create_connection((host, int(port)), timeout=5)
        threading.Event().wait()
    except OSError:
        time.sleep(0.1)
sys.exit("no head")
