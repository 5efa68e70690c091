"""`attack=`: climb another loss than the one that trains. Here the margin, which label smoothing does not flatten.

The perturbation maximises what `attack` returns; training minimises what the closure returns.
"""

import torch
import toy
from transformers import BertConfig, BertForSequenceClassification

import fastadv


def main() -> toy.Score:
    torch.manual_seed(0)
    model = BertForSequenceClassification(BertConfig(**toy.BERT, num_labels=2))
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)

    def smoothed(batch: toy.Batch) -> torch.Tensor:
        return torch.nn.functional.cross_entropy(model(**batch).logits, batch["labels"], label_smoothing=0.1)

    def margin(batch: toy.Batch) -> torch.Tensor:
        return torch.nn.functional.multi_margin_loss(model(**batch).logits, batch["labels"], margin=10)

    adv = fastadv.PGD(model, epsilon=0.5, step_size=0.25, scope="sample", relative=True)
    for batch in toy.batches(toy.reviews):
        adv.backward(lambda: smoothed(batch), mask=batch["attention_mask"], attack=lambda: margin(batch))
        optimizer.step()
        optimizer.zero_grad()
    adv.close()

    test = toy.unseen(toy.reviews)
    return toy.accuracy(model.eval()(**test).logits.argmax(-1), test["labels"])


if __name__ == "__main__":
    print(main())
