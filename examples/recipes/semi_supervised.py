"""Semi-supervised VAT: a few labelled texts, and many without labels.

A batch without labels has an output without a loss: VAT then trains on the divergence alone.
"""

import torch
import toy
from transformers import BertConfig, BertForSequenceClassification

import fastadv


def main() -> toy.Score:
    torch.manual_seed(0)
    model = BertForSequenceClassification(BertConfig(**toy.BERT, num_labels=2))
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    labelled = next(toy.batches(toy.reviews, rows=64))  # all the labels that there are

    adv = fastadv.VAT(model, epsilon=0.5, relative=True)
    for batch in toy.batches(toy.reviews, seed=2):
        adv.backward(lambda: model(**labelled), mask=labelled["attention_mask"])
        unlabelled = {key: batch[key] for key in ("input_ids", "attention_mask")}
        adv.backward(lambda: model(**unlabelled), mask=unlabelled["attention_mask"])  # adds up
        optimizer.step()
        optimizer.zero_grad()
    adv.close()

    test = toy.unseen(toy.reviews)
    return toy.accuracy(model.eval()(**test).logits.argmax(-1), test["labels"])


if __name__ == "__main__":
    print(main())
