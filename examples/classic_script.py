"""A script of the classic kind, with its loop as it was. What changes is one line:

```diff
-from fgm import FGM
+from fastadv import FGM
```

Runs in seconds on a CPU: a bag of random words, whose label is whether a certain word is among them.
"""

import torch
from torch import nn

from fastadv import FGM


class Classifier(nn.Module):
    """Mean of word vectors, and a linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.word_embeddings = nn.Embedding(200, 32)
        self.head = nn.Linear(32, 2)

    def forward(self, ids: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        logits = self.head(self.word_embeddings(ids).mean(1))
        return nn.functional.cross_entropy(logits, labels)


def batches(steps: int):
    for _ in range(steps):
        ids = torch.randint(0, 200, (64, 12))
        labels = torch.randint(0, 2, (64,))
        ids[:, 0] = torch.where(labels == 1, 7, ids[:, 0])
        yield ids, labels


def main() -> None:
    torch.manual_seed(0)
    model = Classifier()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)

    fgm = FGM(model)
    for step, (ids, labels) in enumerate(batches(200)):
        loss = model(ids, labels)
        loss.backward()  # the clean gradient
        fgm.attack()  # move the embedding, in place
        loss_adv = model(ids, labels)
        loss_adv.backward()  # the adversarial gradient, on top of the clean one
        fgm.restore()  # put the embedding back, bit for bit
        optimizer.step()
        model.zero_grad()
        if step % 50 == 49:
            print(f"step {step + 1}: loss {loss:.3f}, at the perturbation {loss_adv:.3f}")


if __name__ == "__main__":
    main()
