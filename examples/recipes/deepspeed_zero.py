"""DeepSpeed, ZeRO-2: the engine's backward, with the accumulation boundary at a step's last pass.

`torchrun --nproc_per_node 2 deepspeed_zero.py` trains on two processes. Needs `pip install deepspeed`.
"""

import os

import deepspeed
import torch
import toy
from transformers import BertConfig, BertForSequenceClassification

import fastadv
from fastadv.integrations.deepspeed import DeepSpeedOwner

ALONE = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29511"}
CONFIG = {
    "train_micro_batch_size_per_gpu": 32,
    "zero_optimization": {"stage": 2},
    "zero_force_ds_cpu_optimizer": False,
}


def main() -> toy.Score:
    torch.manual_seed(0)
    os.environ.update({name: os.environ.get(name, value) for name, value in ALONE.items()})
    deepspeed.init_distributed("gloo")
    model = BertForSequenceClassification(BertConfig(**toy.BERT, num_labels=2))
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    engine = deepspeed.initialize(model=model, optimizer=optimizer, config=CONFIG)[0]

    adv = fastadv.FGM(engine, epsilon=0.5, scope="sample", relative=True, backward=DeepSpeedOwner(engine))
    for batch in toy.batches(toy.reviews):
        adv.backward(lambda: engine(**batch).loss, mask=batch["attention_mask"])
        engine.step()
    adv.close()

    test = toy.unseen(toy.reviews)
    return toy.accuracy(model.eval()(**test).logits.argmax(-1), test["labels"])


if __name__ == "__main__":
    print(main())
