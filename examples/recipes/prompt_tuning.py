"""Prompt tuning (soft prompts): the words' vectors are perturbed, the prompt's are trained.

PEFT puts the prompt before the words after they were looked up, so the mask is the words' own.
"""

import torch
import toy
from peft import PromptTuningConfig, get_peft_model

import fastadv


def main() -> toy.Score:
    torch.manual_seed(0)
    prompt = PromptTuningConfig(task_type="SEQ_CLS", num_virtual_tokens=4)
    model = get_peft_model(toy.pretrained(), prompt)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)

    adv = fastadv.FGM(model, epsilon=0.1, scope="sample", relative=True)
    for batch in toy.batches(toy.reviews):
        adv.backward(lambda: model(**batch).loss, mask=batch["attention_mask"])
        optimizer.step()
        optimizer.zero_grad()
    adv.close()

    test = toy.unseen(toy.reviews)
    return toy.accuracy(model.eval()(**test).logits.argmax(-1), test["labels"])


if __name__ == "__main__":
    print(main())
