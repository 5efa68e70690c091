"""Causal language modelling: instruction tuning, or further pretraining, of a Llama.

The labels are the inputs, -100 at padding (and at the prompt, where only the answer is to be learnt).
"""

import torch
import toy
from transformers import LlamaConfig, LlamaForCausalLM

import fastadv


def main() -> toy.Score:
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**toy.LLAMA))
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)

    adv = fastadv.FGM(model, epsilon=0.5, scope="sample", relative=True)
    for batch in toy.batches(toy.chains):
        adv.backward(lambda: model(**batch).loss, mask=batch["attention_mask"])
        optimizer.step()
        optimizer.zero_grad()
    adv.close()

    test = toy.unseen(toy.chains)
    answers = model.eval()(**test).logits.argmax(-1)
    return toy.accuracy(answers[:, :-1], test["labels"][:, 1:])  # the answer at a word is the next one


if __name__ == "__main__":
    print(main())
