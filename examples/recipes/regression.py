"""Regression: a number per text. SMART compares two answers by their squared error.

With `num_labels=1` and `problem_type="regression"` transformers takes the squared error of float labels.
"""

import torch
import toy
from transformers import BertConfig, BertForSequenceClassification

import fastadv


def main() -> toy.Score:
    torch.manual_seed(0)
    model = BertForSequenceClassification(BertConfig(**toy.BERT, num_labels=1, problem_type="regression"))
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)

    adv = fastadv.SMART(model, divergence="mse")
    for batch in toy.batches(toy.ratings):
        adv.backward(lambda: model(**batch), mask=batch["attention_mask"])  # the output: SMART reads its logits
        optimizer.step()
        optimizer.zero_grad()
    adv.close()

    test = toy.unseen(toy.ratings)
    answers = model.eval()(**test).logits.squeeze(-1).detach()
    pearson = torch.corrcoef(torch.stack([answers, test["labels"]]))[0, 1]
    return toy.Score(float(pearson), 0.0, len(answers.unique()))


if __name__ == "__main__":
    print(main())
