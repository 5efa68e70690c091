"""CLIP: images and captions, contrastive; the words of the captions are perturbed, the images are not."""

import torch
import toy
from transformers import CLIPConfig, CLIPModel

import fastadv


def main() -> toy.Score:
    torch.manual_seed(0)
    text = {**toy.BERT, "eos_token_id": toy.END, "pad_token_id": 0, "bos_token_id": 1}
    model = CLIPModel(CLIPConfig(text_config=text, vision_config=toy.IMAGES, projection_dim=16))
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)

    adv = fastadv.FGM(model, epsilon=0.5, scope="sample", relative=True)
    for batch in toy.batches(toy.captions, rows=16):
        del batch["labels"]  # CLIP learns from the pairs alone
        adv.backward(lambda: model(**batch, return_loss=True).loss, mask=batch["attention_mask"])
        optimizer.step()
        optimizer.zero_grad()
    adv.close()

    test = toy.unseen(toy.captions)
    labels = test.pop("labels")
    nearest = model.eval()(**test).logits_per_image.argmax(-1)
    return toy.accuracy(labels[nearest], labels)


if __name__ == "__main__":
    print(main())
