"""CLIP: images and captions, contrastive; the words of the captions are perturbed, the images are not."""

import toy
import torch
from transformers import CLIPConfig, CLIPModel

import fastadv


def main() -> toy.Score:
    torch.manual_seed(0)
    size = {key: value for key, value in toy.BERT.items() if key not in ("vocab_size", "max_position_embeddings")}
    text = {**toy.BERT, "eos_token_id": 0, "pad_token_id": 0, "bos_token_id": 0}
    vision = {**size, "image_size": 16, "patch_size": 4, "num_channels": 1}
    model = CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=16))
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)

    adv = fastadv.FGM(model, epsilon=0.5, scope="sample", relative=True)
    for batch in toy.batches(toy.captions, rows=4, steps=160):
        batch.pop("labels")
        adv.backward(lambda: model(**batch, return_loss=True).loss, mask=batch["attention_mask"])
        optimizer.step()
        optimizer.zero_grad()
    adv.close()


if __name__ == "__main__":
    print(main())
