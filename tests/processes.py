"Whether processes are alive."
import os
import time
from pathlib import Path


def alive(pid):
    "Whether a process runs; one that ended and that nobody has asked for yet does not."
    try:
        if not os.path.isdir("/proc"):
            return os.kill(pid, 0) is None
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return False
    return state != "Z"


def gone(pids, seconds=20):
    "True where all of these processes end within some seconds; else which are still alive."
    end = time.time() + seconds
    while left := [p for p in pids if alive(p)]:
        if time.time() > end:
            return f"{left} still alive"
        time.sleep(.05)
    return True
