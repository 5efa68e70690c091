"""Two processes train, and go on from a checkpoint that both wrote: run by torchrun, with a folder."""

from __future__ import annotations

import os
import shutil
import sys
from pathlib import Path

import torch
import torch.distributed as dist

import fastadv
from fastadv.integrations.transformers import AdversarialTrainer
from tests.integrations.by_hand import arguments, bert, samples


def trainer_of(folder: Path) -> AdversarialTrainer:
    changes = {"num_train_epochs": 2, "save_strategy": "steps", "save_steps": 1, "save_total_limit": 2}
    return AdversarialTrainer(
        model=bert(),
        args=arguments(folder, ddp_backend="gloo", **changes),
        train_dataset=samples(8),
        adversary=(fastadv.FreeAT, {"epsilon": 0.05, "replays": 2}),
    )


def main(folder: Path) -> None:
    whole = trainer_of(folder / "whole")
    whole.train()
    dist.barrier()
    if os.environ["RANK"] == "0":
        shutil.copytree(folder / "whole", folder / "again")
        shutil.rmtree(folder / "again/checkpoint-4")
    dist.barrier()
    again = trainer_of(folder / "again")
    again.train(resume_from_checkpoint=True)
    assert again.resumed == folder / "again/checkpoint-3"
    for name, got in again.model.state_dict().items():
        assert torch.equal(got, whole.model.state_dict()[name]), name


if __name__ == "__main__":
    main(Path(sys.argv[1]))
