"""One part of a campaign, in a process of its own: `python -m tests.campaigns.part NAME COUNT SEED FILE`."""

from __future__ import annotations

import json
import os
import signal
import sys
from pathlib import Path

for _name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS"):
    os.environ.setdefault(_name, "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")


def main() -> None:
    import torch

    from tests.campaigns.catalogue import CAMPAIGNS

    name, count, seed, file = sys.argv[1:]
    torch.set_num_threads(1)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell that runs it in the background ignores it
    found = CAMPAIGNS[name].run(int(count), int(seed))
    Path(file).write_text(json.dumps(found.as_json()))
    os._exit(0)  # what is left of two thousand broken steps need not be taken down in order


if __name__ == "__main__":
    main()
