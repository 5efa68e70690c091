"""Sequence to sequence (T5): encoder and decoder look words up in one table, one after the other.

So `mask` has two entries, one per lookup in their order: the source's, and the decoder's input's (None: all of it).
"""

import torch
import toy
from transformers import T5Config, T5ForConditionalGeneration

import fastadv


def main() -> toy.Score:
    torch.manual_seed(0)
    model = T5ForConditionalGeneration(T5Config(**toy.T5))
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)

    adv = fastadv.FGM(model, epsilon=0.1, scope="sample", relative=True)
    for batch in toy.batches(toy.verdicts):
        adv.backward(lambda: model(**batch).loss, mask=[batch["attention_mask"], None])
        optimizer.step()
        optimizer.zero_grad()
    adv.close()

    test = toy.unseen(toy.verdicts)
    source = {key: test[key] for key in ("input_ids", "attention_mask")}
    written = model.eval().generate(**source, max_new_tokens=1, do_sample=False)[:, 1:]
    return toy.accuracy(written, test["labels"])


if __name__ == "__main__":
    print(main())
