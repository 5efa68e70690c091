"""LoRA with gradient accumulation, activation checkpointing and bfloat16.

The embedding is frozen and perturbed all the same: nothing is written to it.
"""

import torch
import toy
from peft import LoraConfig, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM

import fastadv


def main() -> toy.Score:
    torch.manual_seed(0)
    adapters = LoraConfig(r=8, target_modules=["q_proj", "v_proj", "down_proj"], modules_to_save=["lm_head"])
    model = get_peft_model(LlamaForCausalLM(LlamaConfig(**toy.LLAMA)), adapters)
    model.gradient_checkpointing_enable({"use_reentrant": False})
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)

    def closure(batch: toy.Batch) -> torch.Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return model(**batch).loss / 2  # two micro-batches a step

    adv = fastadv.FGM(model, epsilon=0.5, scope="sample", relative=True)
    for index, batch in enumerate(toy.batches(toy.chains, steps=160)):
        adv.backward(lambda: closure(batch), mask=batch["attention_mask"])
        if index % 2:
            optimizer.step()
            optimizer.zero_grad()
    adv.close()

    test = toy.unseen(toy.chains)
    return toy.accuracy(model.eval()(**test).logits.argmax(-1)[:, :-1], test["labels"][:, 1:])


if __name__ == "__main__":
    print(main())
