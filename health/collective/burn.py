"""Load every device of one node for a while and check what it computes. I/O.

Runs in the engine's own environment, with torch and nothing of launcher.

    python burn.py < order.json        (one line out for each device)

A matrix product is repeated and compared with its first result bit by bit (silent corruption),
then memory is filled with a pattern and read back. DCGM's own diagnosis and nccl-tests over the
node's GPUs run first, where they are installed.
"""

import json
import shutil
import subprocess
import sys
import time
from typing import Any

SIZE_CUDA, SIZE_CPU = 8192, 512
MEMORY_SHARE = 0.8
BLOCK_BYTES = 256 * 1024**2


def say(**row: Any) -> None:
    sys.stdout.write("LAUNCHER-BURN " + json.dumps(row) + "\n")
    sys.stdout.flush()


def main() -> int:
    order = json.loads(sys.stdin.readline())
    diagnose(order["seconds"])
    import torch

    reduce_inside(torch.cuda.device_count(), order["seconds"])
    cuda = torch.cuda.is_available()
    names = [f"cuda:{index}" for index in range(torch.cuda.device_count())] if cuda else ["cpu"]
    for name in names:
        try:
            say(kind="device", device=name, **burn(torch, name, order["seconds"] / len(names)))
        except Exception as error:  # the others are still to be looked at
            say(kind="device", device=name, error=f"{type(error).__name__}: {error}"[:300])
    say(kind="done")
    return 0


def diagnose(seconds: float) -> None:
    """`dcgmi diag`, level 1 (seconds), as JSON."""
    program = shutil.which("dcgmi")
    if program is None:
        return
    try:
        answer = subprocess.run(
            [program, "diag", "-r", "1", "-j"],
            capture_output=True,
            text=True,
            timeout=60 + seconds,
            check=False,
        )
        say(kind="dcgm", answer=json.loads(answer.stdout))
    except (OSError, ValueError, subprocess.SubprocessError) as error:
        say(kind="dcgm", error=f"{type(error).__name__}: {error}"[:300])


def reduce_inside(gpus: int, seconds: float) -> None:
    """nccl-tests' all-reduce over this node's GPUs, 256 MiB; its average bus bandwidth."""
    program = shutil.which("all_reduce_perf")
    if program is None or gpus < 2:
        return
    size = ("-b", "256M", "-e", "256M", "-n", "20", "-g", str(gpus))
    try:
        answer = subprocess.run(
            [program, *size], capture_output=True, text=True, timeout=60 + seconds, check=False
        )
    except (OSError, subprocess.SubprocessError) as error:
        say(kind="nccl", error=f"{type(error).__name__}: {error}"[:300])
        return
    for line in answer.stdout.splitlines():
        if "Avg bus bandwidth" in line:
            say(kind="nccl", bus_gb_s=float(line.rpartition(":")[2]))
            return
    said = (answer.stderr or answer.stdout).strip().splitlines()
    say(kind="nccl", error=said[-1][:300] if said else f"exit code {answer.returncode}")


def burn(torch: Any, name: str, seconds: float) -> dict[str, Any]:
    """Rate of the product in FLOP/s, products that differed, bytes that came back changed."""
    device = torch.device(name)
    on_cuda = device.type == "cuda"
    size = SIZE_CUDA if on_cuda else SIZE_CPU
    torch.manual_seed(1)
    kind = torch.bfloat16 if on_cuda else torch.float32
    left = torch.randn(size, size, dtype=kind, device=device)
    right = torch.randn(size, size, dtype=kind, device=device)
    first = left @ right
    rounds = differing = 0
    began = time.monotonic()
    while time.monotonic() - began < seconds / 2:
        product = left @ right
        differing += int(not torch.equal(product, first))
        rounds += 1
    took = time.monotonic() - began
    changed, tested = sweep(torch, device, seconds / 2)
    return {
        "flops": 2.0 * size**3 * rounds / took,
        "products": rounds,
        "differing": differing,
        "memory_tested_bytes": tested,
        "memory_changed": changed,
    }


def sweep(torch: Any, device: Any, seconds: float) -> tuple[int, int]:
    """Fill free memory with a pattern and its complement; how many bytes changed, of how many."""
    free = BLOCK_BYTES
    if device.type == "cuda":
        free = int(torch.cuda.mem_get_info(device)[0] * MEMORY_SHARE)
    blocks: list[Any] = []
    began = time.monotonic()
    for number in range(max(1, free // BLOCK_BYTES)):
        pattern = 0x55 if number % 2 else 0xAA
        blocks.append(torch.full((BLOCK_BYTES,), pattern, dtype=torch.uint8, device=device))
        if time.monotonic() - began > seconds:
            break
    changed = 0
    for number, block in enumerate(blocks):
        pattern = 0x55 if number % 2 else 0xAA
        changed += int((block != pattern).sum().item())
    return changed, len(blocks) * BLOCK_BYTES


if __name__ == "__main__":
    sys.exit(main())
