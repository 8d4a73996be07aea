"""How torch's threads wait for one another. OpenMP reads it when torch is loaded, and not later."""

import os
import time
from pathlib import Path

# the variables by which a user says how OpenMP's threads wait
WAIT_VARIABLES = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT")
FEW_SPINS = "1000"  # beside a busy core: see share_cores


def share_cores() -> None:
    """Let torch's threads spin only shortly where they wait, if other jobs need the cores.

    OpenMP's own default is fastest on idle cores: a thread that waits for another one spins for
    milliseconds before it sleeps. Beside another job it keeps the core from the thread that it
    waits for. benchmarks/threads.py measures both. The number of threads stays, because it changes
    the last bits of results. What a user has set stays too. This holds if torch is not loaded yet,
    and in processes that are started later."""
    if not any(name in os.environ for name in WAIT_VARIABLES) and _cores_are_busy():
        os.environ["GOMP_SPINCOUNT"] = FEW_SPINS


def _cores_are_busy() -> bool:
    """Whether other jobs run on any of the cores right now (Linux; elsewhere never)."""

    def running() -> int:  # the threads on all cores: "0.52 0.48 0.51 2/213 4711" -> 2
        return int(Path("/proc/loadavg").read_text("utf-8").split()[3].split("/")[0])

    cores = os.cpu_count() or 1
    try:
        threads = int(os.environ.get("OMP_NUM_THREADS") or cores)
        least = running()
        for _ in range(4):  # short processes come and go
            time.sleep(0.005)
            least = min(least, running())
    except (OSError, ValueError, IndexError):
        return False
    return least - 1 + threads > cores  # one of them is this thread
