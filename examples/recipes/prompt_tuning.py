"""Prompt tuning (soft prompts): the words' vectors are perturbed, the prompt's are trained.

PEFT puts the prompt before the words after they were looked up, so the mask is the words' own.
"""

import toy
import torch
from peft import PromptTuningConfig, get_peft_model
from transformers import BertConfig, BertForSequenceClassification

import fastadv


def main() -> toy.Score:
    torch.manual_seed(0)
    base = BertForSequenceClassification(BertConfig(**toy.BERT, num_labels=2))
    model = get_peft_model(base, PromptTuningConfig(task_type="SEQ_CLS", num_virtual_tokens=4))
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-2)

    adv = fastadv.FGM(model, epsilon=0.1, scope="sample", relative=True)
    for batch in toy.batches(toy.reviews, steps=120):
        adv.backward(lambda: model(**batch).loss, mask=batch["attention_mask"])
        optimizer.step()
        optimizer.zero_grad()
    adv.close()

    test = toy.test_batch(toy.reviews)
    return toy.accuracy(model.eval()(**test).logits.argmax(-1), test["labels"])


if __name__ == "__main__":
    print(main())
