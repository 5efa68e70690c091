"""A process beside the campaign's: for every line "gap count spread" it waits, sends SIGINTs, and says that it has.

It is run as a file, so that it imports nothing that takes its time: `python killer.py PID`.
"""

import os
import random
import signal
import sys
import time


def main() -> None:
    process = int(sys.argv[1])
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    for line in sys.stdin:
        gap, count, spread = (float(word) for word in line.split())
        _wait(gap)
        for index in range(int(count)):
            if index:
                _wait(random.random() * spread)
            os.kill(process, signal.SIGINT)
        sys.stdout.write(".")
        sys.stdout.flush()


def _wait(seconds: float) -> None:
    """To the microsecond: a sleep for the most of it."""
    end = time.perf_counter() + seconds
    if seconds > 0.0005:
        time.sleep(seconds - 0.0003)
    while time.perf_counter() < end:
        pass


if __name__ == "__main__":
    main()
