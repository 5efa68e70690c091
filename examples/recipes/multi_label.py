"""Multi-label classification: several labels may hold at once, each with its own sigmoid.

The labels are floats [B, classes] and `problem_type` says so: the model then takes the binary cross entropy.
"""

import torch
import toy
from transformers import BertConfig, BertForSequenceClassification

import fastadv


def main() -> toy.Score:
    torch.manual_seed(0)
    config = BertConfig(**toy.BERT, num_labels=3, problem_type="multi_label_classification")
    model = BertForSequenceClassification(config)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)

    adv = fastadv.FGM(model, epsilon=0.5, scope="sample", relative=True)
    for batch in toy.batches(toy.topics):
        adv.backward(lambda: model(**batch).loss, mask=batch["attention_mask"])
        optimizer.step()
        optimizer.zero_grad()
    adv.close()

    test = toy.unseen(toy.topics)
    return toy.accuracy((model.eval()(**test).logits > 0).long(), test["labels"].long())


if __name__ == "__main__":
    print(main())
