"""Wait for XID events by NVML and print each as a line of JSON. I/O; a child of the agent.

    python -m health.xid_watch

NVML gives an event once, to whoever waits; an ordinary user, who may not read the kernel's log,
learns of XIDs in no other way.
"""

import contextlib
import signal
import sys
import time

import pynvml as nvml

from health.evidence import Xid

WAIT_MS = 5000


def main() -> int:
    """Until the parent closes our output or kills us; 1 where there is nothing to wait for."""
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)
    try:
        nvml.nvmlInit()
        events = nvml.nvmlEventSetCreate()
        handles: dict[str, int] = {}
        for index in range(nvml.nvmlDeviceGetCount()):
            with contextlib.suppress(nvml.NVMLError):  # a lost GPU has no events
                handle = nvml.nvmlDeviceGetHandleByIndex(index)
                nvml.nvmlDeviceRegisterEvents(handle, nvml.nvmlEventTypeXidCriticalError, events)
                handles[nvml.nvmlDeviceGetUUID(handle)] = index
    except nvml.NVMLError as error:
        sys.stderr.write(f"no XID events: {error}\n")
        return 1
    while handles:
        try:
            data = nvml.nvmlEventSetWait_v2(events, WAIT_MS)
            gpu = str(handles.get(nvml.nvmlDeviceGetUUID(data.device), "?"))
        except nvml.NVMLError as error:
            if error.value == nvml.NVML_ERROR_TIMEOUT:
                continue
            if error.value == nvml.NVML_ERROR_GPU_IS_LOST:
                time.sleep(1.0)
                continue
            sys.stderr.write(f"XID events ended: {error}\n")
            return 1
        xid = Xid(at=time.time(), code=int(data.eventData), gpu=gpu)
        sys.stdout.write(xid.model_dump_json() + "\n")
        sys.stdout.flush()
    return 1


if __name__ == "__main__":
    sys.exit(main())
