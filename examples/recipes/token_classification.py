"""Token classification (NER): one label per word, -100 where none counts.

The mask keeps padding unperturbed; the labels of padding are -100, which the loss leaves out.
"""

import torch
import toy
from transformers import BertConfig, BertForTokenClassification

import fastadv


def main() -> toy.Score:
    torch.manual_seed(0)
    model = BertForTokenClassification(BertConfig(**toy.BERT, num_labels=3))
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)

    adv = fastadv.FGM(model, epsilon=0.5, scope="sample", relative=True)
    for batch in toy.batches(toy.names):
        adv.backward(lambda: model(**batch).loss, mask=batch["attention_mask"])
        optimizer.step()
        optimizer.zero_grad()
    adv.close()

    test = toy.unseen(toy.names)
    return toy.accuracy(model.eval()(**test).logits.argmax(-1), test["labels"])


if __name__ == "__main__":
    print(main())
