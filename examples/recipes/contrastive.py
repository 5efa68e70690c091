"""Contrastive training (sentence embeddings): one encoder, called twice in a step; InfoNCE over the batch.

Each call has a perturbation and a mask of its own: give the masks in the order of the calls.
"""

import torch
import toy
from transformers import BertConfig, BertModel

import fastadv


def main() -> toy.Score:
    torch.manual_seed(0)
    model = BertModel(BertConfig(**toy.BERT), add_pooling_layer=False)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)

    def similarities(one: toy.Batch, other: toy.Batch) -> torch.Tensor:
        sides = []
        for batch in (one, other):
            weights = batch["attention_mask"].unsqueeze(-1)
            mean = (model(**batch).last_hidden_state * weights).sum(1) / weights.sum(1)
            sides.append(torch.nn.functional.normalize(mean, dim=-1))
        return sides[0] @ sides[1].T / 0.1  # [B, B]: the right one is on the diagonal

    adv = fastadv.FGM(model, epsilon=0.5, scope="sample", relative=True)
    right = torch.arange(32)
    for one, other in toy.batches(toy.synonyms):
        masks = [one["attention_mask"], other["attention_mask"]]
        adv.backward(lambda: torch.nn.functional.cross_entropy(similarities(one, other), right), mask=masks)
        optimizer.step()
        optimizer.zero_grad()
    adv.close()

    model.eval()
    return toy.accuracy(similarities(*toy.unseen(toy.synonyms, rows=32)).argmax(-1), right)


if __name__ == "__main__":
    print(main())
