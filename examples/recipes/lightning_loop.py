"""Lightning: manual optimisation, since a step has more than one backward.

The owner hands the loss of each full pass to `self.manual_backward` (precision, strategies), and lets DDP reduce
gradients in the last one alone. Make the method in `on_fit_start`, when the model is where it will be trained. Needs
`pip install lightning`.
"""

import lightning
import torch
import toy
from transformers import BertConfig, BertForSequenceClassification

import fastadv
from fastadv.integrations.lightning import LightningOwner


class Classifier(lightning.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.model = BertForSequenceClassification(BertConfig(**toy.BERT, num_labels=2))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=3e-3)

    def on_fit_start(self) -> None:
        options = {"epsilon": 0.5, "scope": "sample", "relative": True}
        self.adv = fastadv.FGM(self.model, backward=LightningOwner(self), **options)

    def training_step(self, batch: toy.Batch, index: int) -> None:  # noqa: ARG002
        self.adv.backward(lambda: self.model(**batch).loss, mask=batch["attention_mask"])
        self.optimizers().step()
        self.optimizers().zero_grad()

    def on_fit_end(self) -> None:
        self.adv.close()


def main() -> toy.Score:
    torch.manual_seed(0)
    module = Classifier()
    trainer = lightning.Trainer(max_epochs=1, accelerator="cpu", logger=False, enable_checkpointing=False)
    trainer.fit(module, torch.utils.data.DataLoader(list(toy.batches(toy.reviews)), batch_size=None))

    test = toy.unseen(toy.reviews)
    return toy.accuracy(module.eval().model(**test).logits.argmax(-1), test["labels"])


if __name__ == "__main__":
    print(main())
