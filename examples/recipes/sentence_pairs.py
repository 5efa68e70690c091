"""Sentence pairs (NLI, paraphrase): both sentences in one input, told apart by `token_type_ids`.

One lookup, one perturbation: its norm is over both sentences of a pair.
"""

import torch
import toy
from transformers import BertConfig, BertForSequenceClassification

import fastadv


def main() -> toy.Score:
    torch.manual_seed(0)
    model = BertForSequenceClassification(BertConfig(**toy.BERT, num_labels=2))
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)

    adv = fastadv.PGD(model, epsilon=0.5, step_size=0.25, scope="sample", relative=True)
    for batch in toy.batches(toy.pairs):
        adv.backward(lambda: model(**batch).loss, mask=batch["attention_mask"])
        optimizer.step()
        optimizer.zero_grad()
    adv.close()

    test = toy.unseen(toy.pairs)
    return toy.accuracy(model.eval()(**test).logits.argmax(-1), test["labels"])


if __name__ == "__main__":
    print(main())
