"""Fabric, in mixed precision: `fabric.backward` takes the losses, and probes count as backwards of Fabric's.

Needs `pip install lightning`.
"""

import lightning
import torch
import toy
from transformers import BertConfig, BertForSequenceClassification

import fastadv
from fastadv.integrations.lightning import FabricOwner


def main() -> toy.Score:
    torch.manual_seed(0)
    fabric = lightning.Fabric(accelerator="cpu", devices=1, precision="bf16-mixed")
    model = BertForSequenceClassification(BertConfig(**toy.BERT, num_labels=2))
    model, optimizer = fabric.setup(model, torch.optim.AdamW(model.parameters(), lr=3e-3))

    radii = {"epsilon": 0.5, "step_size": 0.3, "scope": "sample", "relative": True}
    adv = fastadv.PGD(model, backward=FabricOwner(fabric, model), **radii)
    for batch in toy.batches(toy.reviews):
        adv.backward(lambda: model(**batch).loss, mask=batch["attention_mask"])
        optimizer.step()
        optimizer.zero_grad()
    adv.close()

    test = toy.unseen(toy.reviews)
    return toy.accuracy(model.eval()(**test).logits.argmax(-1), test["labels"])


if __name__ == "__main__":
    print(main())
