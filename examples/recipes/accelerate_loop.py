"""accelerate: gradient accumulation, and whatever the accelerator wraps the model in.

The owner hands each full pass's loss to `accelerator.backward`, and knows that it divides by the micro-batches: leave
`adv.share` alone. On two processes: `accelerate launch --num_processes 2 --cpu accelerate_loop.py`.
"""

import torch
import toy
from accelerate import Accelerator
from transformers import BertConfig, BertForSequenceClassification

import fastadv
from fastadv.integrations.accelerate import AccelerateOwner


def main() -> toy.Score:
    torch.manual_seed(0)
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2)
    model = BertForSequenceClassification(BertConfig(**toy.BERT, num_labels=2))
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    model, optimizer = accelerator.prepare(model, optimizer)

    adv = fastadv.SMART(model, epsilon=0.05, relative=True, backward=AccelerateOwner(accelerator))
    for batch in toy.batches(toy.reviews):
        with accelerator.accumulate(model):
            adv.backward(lambda: model(**batch), mask=batch["attention_mask"])
            optimizer.step()
            optimizer.zero_grad()
    adv.close()

    test = toy.unseen(toy.reviews)
    return toy.accuracy(model.eval()(**test).logits.argmax(-1), test["labels"])


if __name__ == "__main__":
    print(main())
