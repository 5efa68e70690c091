"""DDP's static graph counts on what adversarial steps do not do; the method says so before it is made."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import fastadv


def test_static_graph_is_refused(tmp_path: Path) -> None:
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        model = nn.Sequential(nn.Embedding(5, 3), nn.Linear(3, 1))
        fastadv.FGM(DistributedDataParallel(model)).close()
        with pytest.raises(ValueError, match="without static_graph"):
            fastadv.FGM(DistributedDataParallel(model, static_graph=True))
        assert "forward" not in vars(model[0])
    finally:
        dist.destroy_process_group()
