"""Runs the rounds of a collective check on one node, inside the engine's own environment. I/O.

    python worker.py < order.json        (one line out for each rank and round)

Needs torch and nothing of launcher: it is sent as a file to where the engine's Python is. The
process imports torch once and forks a child for every rank and round, before CUDA is touched, so
that a round which hangs in a library is killed at its deadline and the next one begins. A child
tells how far it came; a rank that hangs is known by what it did not reach.
"""

import contextlib
import ctypes
import json
import os
import select
import signal
import sys
import time
from datetime import timedelta
from typing import Any

WARM_UP, REPEATS = 1, 3


def say(**row: Any) -> None:
    sys.stdout.write("LAUNCHER-COLLECTIVE " + json.dumps(row) + "\n")
    sys.stdout.flush()


def main() -> int:
    order = json.loads(sys.stdin.readline())
    # torch asks DNS for the names of its peers; where no server answers that takes 10 s each.
    os.environ.setdefault("RES_OPTIONS", "timeout:1 attempts:1")
    began = time.monotonic()
    import torch.distributed as dist

    say(kind="ready", node=order["node"], took_s=round(time.monotonic() - began, 2))
    if not dist.is_available():
        say(kind="error", node=order["node"], detail="torch.distributed is not in this torch")
        return 1
    if order["hosts_store"]:
        start_store(order)
    for number, group_round in enumerate(order["rounds"]):
        wait_s = order["waits_s"][number]
        children = []
        for rank in order["ranks"]:
            group = next((g for g in group_round["groups"] if rank in g), None)
            if group is not None:
                children.append(Child(order, number, group_round, rank, group, wait_s))
        for row in gather(children, wait_s + order["round_s"]):
            say(kind="result", node=order["node"], round=group_round["name"], **row)
    say(kind="done", node=order["node"])
    return 0


def start_store(order: dict[str, Any]) -> None:
    """The meeting point of all ranks, in a child that dies with us."""
    ready, writer = os.pipe()
    if os.fork() == 0:
        die_with_parent()
        import torch.distributed as dist

        try:
            store = dist.TCPStore(
                order["store_address"],
                order["store_port"],
                is_master=True,
                wait_for_workers=False,
                timeout=timedelta(seconds=order["waits_s"][0]),
            )
            os.write(writer, b"1")
            while store is not None:
                signal.pause()  # until the parent is gone
        finally:
            os._exit(1)
    os.close(writer)
    select.select([ready], [], [], 10)


def die_with_parent() -> None:
    ctypes.CDLL(None).prctl(1, signal.SIGKILL, 0, 0, 0)


class Child:
    """One rank in one round."""

    def __init__(
        self,
        order: dict[str, Any],
        number: int,
        group_round: dict[str, Any],
        rank: int,
        group: list[int],
        wait_s: float,
    ) -> None:
        self.rank = rank
        self.answer = b""
        self.began = time.monotonic()
        self.fd, writer = os.pipe()
        self.pid = os.fork()
        if self.pid == 0:
            die_with_parent()
            os.close(self.fd)
            try:
                work(order, number, group_round, rank, group, wait_s, writer)
            except BaseException as error:  # whatever it was is the answer
                tell(writer, status="error", detail=f"{type(error).__name__}: {error}"[:300])
            finally:
                os._exit(0)
        os.close(writer)

    def row(self) -> dict[str, Any]:
        """All that the child told, the last value of each name counts."""
        row: dict[str, Any] = {"rank": self.rank, "status": "timeout", "stage": "start"}
        for line in self.answer.decode(errors="replace").splitlines():
            with contextlib.suppress(ValueError):  # cut off by the kill
                row.update(json.loads(line))
        row["took_s"] = round(time.monotonic() - self.began, 3)
        return row


def gather(children: list[Child], limit_s: float) -> list[dict[str, Any]]:
    """Read every child to its end or the deadline; kill what is left."""
    deadline = time.monotonic() + limit_s + 1.0
    waiting = list(children)
    rows = []
    while waiting:
        left = deadline - time.monotonic()
        ready = (
            select.select([c.fd for c in waiting], [], [], max(0.0, left))[0] if left > 0 else []
        )
        if not ready:
            break
        for child in [c for c in waiting if c.fd in ready]:
            chunk = os.read(child.fd, 65536)
            child.answer += chunk
            if not chunk:
                waiting.remove(child)
                rows.append(child.row())
    rows += [child.row() for child in waiting]
    for child in children:
        os.close(child.fd)
        with contextlib.suppress(OSError):
            os.kill(child.pid, signal.SIGKILL)
            os.waitpid(child.pid, 0)
    return rows


def tell(writer: int, **row: Any) -> None:
    os.write(writer, (json.dumps(row) + "\n").encode())


def work(
    order: dict[str, Any],
    number: int,
    group_round: dict[str, Any],
    rank: int,
    group: list[int],
    wait_s: float,
    writer: int,
) -> None:
    """Meet the others of the group, run the operation in every size, tell the times."""
    import torch
    import torch.distributed as dist

    timeout = timedelta(seconds=order["round_s"])
    local = order["ranks"].index(rank)
    use_cuda = torch.cuda.is_available() and torch.cuda.device_count() > local
    device = torch.device("cuda", local) if use_cuda else torch.device("cpu")
    if use_cuda:
        torch.cuda.set_device(device)
    tell(writer, stage="store", rank=rank)
    store = dist.TCPStore(
        order["store_address"],
        order["store_port"],
        is_master=False,
        timeout=timedelta(seconds=wait_s),
    )
    store = dist.PrefixStore(f"{number}/{group[0]}", store)
    store.set(f"here/{group.index(rank)}", "1")
    tell(writer, stage="peers")
    for index, peer in enumerate(group):
        try:
            store.wait([f"here/{index}"], timedelta(seconds=wait_s))
        except BaseException as error:
            tell(writer, missing=peer)
            raise RuntimeError(f"rank {peer} did not come") from error
    dist.init_process_group(
        "nccl" if use_cuda else "gloo",
        store=store,
        rank=group.index(rank),
        world_size=len(group),
        timeout=timeout,
    )
    tell(writer, stage="connected", backend=dist.get_backend())
    times: list[dict[str, float]] = []
    for size in group_round["bytes"]:
        data = torch.ones(max(1, size // 4), dtype=torch.float32, device=device)
        if times and not affordable(dist, torch, times[-1], size, order["round_s"], device):
            break  # a slow link has told enough with less
        best = None
        for turn in range(WARM_UP + REPEATS):
            dist.barrier()
            began = time.monotonic()
            operate(dist, group_round["op"], data, group.index(rank), len(group))
            if use_cuda:
                torch.cuda.synchronize()
            took = time.monotonic() - began
            if turn >= WARM_UP:
                best = took if best is None else min(best, took)
        times.append({"bytes": size, "seconds": best or 0.0})
        tell(writer, stage=f"{group_round['op']} of {size} bytes", times=times)
    dist.barrier()
    tell(writer, status="ok", stage="done")


def affordable(
    dist: Any, torch: Any, last: dict[str, float], size: int, round_s: float, device: Any
) -> bool:
    """Whether the next size fits into the round; all ranks of the group decide the same."""
    expected_s = last["seconds"] * size / last["bytes"] * (WARM_UP + REPEATS)
    slowest = torch.tensor([expected_s], device=device)
    dist.all_reduce(slowest, op=dist.ReduceOp.MAX)
    return float(slowest.item()) < round_s / 2


def operate(dist: Any, op: str, data: Any, index: int, size: int) -> None:
    if op == "all_reduce":
        dist.all_reduce(data)
    elif op == "send_recv":
        # Along the pipeline: each stage to the next.
        if index > 0:
            dist.recv(data, src=index - 1)
        if index < size - 1:
            dist.send(data, dst=index + 1)
    elif op == "all_to_all":
        import torch

        parts = list(data[: data.numel() // size * size].chunk(size))
        if dist.get_backend() == "gloo":
            out = [torch.empty_like(parts[0]) for _ in range(size)]
            for root in range(size):  # gloo has no all-to-all: a scatter from each
                dist.scatter(out[root], parts if root == index else None, src=root)
        else:
            dist.all_to_all([torch.empty_like(part) for part in parts], parts)
    else:
        raise ValueError(op)


if __name__ == "__main__":
    sys.exit(main())
