"""Adversarial training in a loop of your own: `adv.backward(closure)` stands where `loss.backward()` stood.

Runs in seconds on a CPU: a bag of random words, whose label is whether a certain word is among them.
"""

import torch
from torch import nn

import fastadv


class Classifier(nn.Module):
    """Mean of word vectors, and a linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(200, 32)
        self.head = nn.Linear(32, 2)

    def forward(self, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        vectors = self.words(ids) * mask.unsqueeze(-1)
        return self.head(vectors.sum(1) / mask.sum(1, keepdim=True))


def batches(steps: int):
    for _ in range(steps):
        ids = torch.randint(1, 200, (64, 12))
        mask = (torch.arange(12) < torch.randint(4, 13, (64, 1))).long()
        labels = torch.randint(0, 2, (64,))
        ids[:, 0] = torch.where(labels == 1, 7, ids[:, 0])
        yield ids * mask, mask, labels


def main() -> None:
    torch.manual_seed(0)
    model = Classifier()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    adv = fastadv.PGD(model, epsilon=0.5, step_size=0.2, steps=3, scope="sample")

    for step, (ids, mask, labels) in enumerate(batches(300)):
        result = adv.backward(lambda: nn.functional.cross_entropy(model(ids, mask), labels), mask=mask)  # noqa: B023
        optimizer.step()
        optimizer.zero_grad()
        if step % 100 == 99:  # reading a number waits for the device: do it when you print
            print(f"step {step + 1}: loss {result.loss:.3f}, at the perturbation {result.adv_loss:.3f}")
    print(f"attacked {adv.attacked} steps; groups skipped for a non-finite gradient: {int(adv.skipped)}")

    ids, mask, labels = next(batches(1))
    with adv.perturbed(lambda: nn.functional.cross_entropy(model(ids, mask), labels), mask=mask):
        attacked = model(ids, mask).argmax(-1).eq(labels).float().mean()
    clean = model(ids, mask).argmax(-1).eq(labels).float().mean()
    print(f"accuracy {clean:.2f}, under the attack {attacked:.2f}")


if __name__ == "__main__":
    main()
