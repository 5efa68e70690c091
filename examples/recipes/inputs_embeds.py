"""`inputs_embeds`: the model gets vectors, not words (here: features through a layer of one's own).

Perturbed is the output of a module that the closure calls, so name that module: `embedding=`. Where the vectors come
from `model.get_input_embeddings()(ids)`, call that inside the closure; it is found by itself.
"""

import torch
import toy
from transformers import BertConfig, BertForSequenceClassification

import fastadv


def main() -> toy.Score:
    torch.manual_seed(0)
    model = BertForSequenceClassification(BertConfig(**toy.BERT, num_labels=2))
    model.project = torch.nn.Linear(8, model.config.hidden_size)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    features = torch.randn(toy.WORDS, 8)  # of each word, from elsewhere

    def run(batch: toy.Batch):
        vectors = model.project(features[batch["input_ids"]])
        return model(inputs_embeds=vectors, attention_mask=batch["attention_mask"], labels=batch["labels"])

    adv = fastadv.FGM(model, epsilon=0.3, scope="sample", embedding="project")
    for batch in toy.batches(toy.reviews):
        adv.backward(lambda: run(batch).loss, mask=batch["attention_mask"])
        optimizer.step()
        optimizer.zero_grad()
    adv.close()

    test = toy.unseen(toy.reviews)
    model.eval()
    return toy.accuracy(run(test).logits.argmax(-1), test["labels"])


if __name__ == "__main__":
    print(main())
