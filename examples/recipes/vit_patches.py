"""A vision transformer: its patches stand where words stand, [B, patches, D].

`get_input_embeddings` of a ViT is the layer that embeds patches. It has no table: the radius is in its output's units.
"""

import torch
import toy
from transformers import ViTConfig, ViTForImageClassification

import fastadv


def main() -> toy.Score:
    torch.manual_seed(0)
    model = ViTForImageClassification(ViTConfig(**toy.IMAGES, num_labels=4))
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)

    adv = fastadv.FGM(model, epsilon=0.1, scope="sample")
    for batch in toy.batches(toy.images):
        adv.backward(lambda: model(**batch).loss)  # every patch counts: no mask
        optimizer.step()
        optimizer.zero_grad()
    adv.close()

    test = toy.unseen(toy.images)
    return toy.accuracy(model.eval()(**test).logits.argmax(-1), test["labels"])


if __name__ == "__main__":
    print(main())
