"""What `scope="table"` means in practice: the samples of a batch share one budget.

Prints, for growing batches, the mean l2 norm of each sample's own perturbation. `--output` keeps the numbers as JSON.
"""

import argparse
import json
from pathlib import Path

import torch
from torch import nn

import fastadv

SIZES = (1, 4, 16, 64)


def strength(scope: str, size: int) -> float:
    """Mean over samples of ||delta_sample||, FGM with epsilon 1, random words, one linear layer."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(5000, 64), nn.Flatten(), nn.Linear(16 * 64, 2)).double()
    ids = torch.randint(0, 5000, (64, 16))[:size]
    labels = torch.randint(0, 2, (64,))[:size]
    adv = fastadv.FGM(model, epsilon=1.0, scope=scope)
    with adv.perturbed(lambda: nn.functional.cross_entropy(model(ids), labels)):
        delta = model[0](ids) - model[0].weight[ids]
    return float(delta.detach().flatten(1).norm(dim=1).mean())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args()
    table = {scope: {str(size): round(strength(scope, size), 3) for size in SIZES} for scope in ("table", "sample")}
    print("samples in the batch  " + "".join(f"{size:>8}" for size in SIZES))
    for scope, row in table.items():
        print(f"scope={scope!r:<15} " + "".join(f"{value:8.3f}" for value in row.values()))
    if arguments.output:
        arguments.output.write_text(json.dumps(table, indent=2) + "\n")


if __name__ == "__main__":
    main()
