"""Mount a file system that never answers: FUSE whose daemon reads nothing. Needs root.

python3 hungmount.py FOLDER      (prints "mounted", then waits to be killed)
"""

import ctypes
import os
import sys
import time


def main() -> None:
    folder = sys.argv[1]
    handle = os.open("/dev/fuse", os.O_RDWR)
    options = f"fd={handle},rootmode=40000,user_id=0,group_id=0,allow_other"
    libc = ctypes.CDLL(None, use_errno=True)
    answer = libc.mount(b"hung", folder.encode(), b"fuse.hung", 0, options.encode())
    if answer:
        sys.exit(f"mount: {os.strerror(ctypes.get_errno())}")
    print("mounted", flush=True)
    time.sleep(600)


if __name__ == "__main__":
    main()
