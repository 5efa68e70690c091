"""TRL's SFTTrainer, adversarial by a mixin. The texts are ids here, so that no tokenizer is downloaded.

Needs `pip install trl`.
"""

import tempfile

import datasets
import torch
import toy
from tokenizers import Tokenizer, models
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from trl import SFTConfig, SFTTrainer

import fastadv
from fastadv.integrations.transformers import AdversarialMixin


class AdversarialSFT(AdversarialMixin, SFTTrainer):
    pass


def main() -> toy.Score:
    torch.manual_seed(0)
    words = Tokenizer(models.WordLevel({f"<{index}>": index for index in range(toy.WORDS)}, "<1>"))
    known = PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<0>", eos_token="<2>")  # noqa: S106
    texts = [{"input_ids": row.tolist()} for batch in toy.batches(toy.chains) for row in batch["input_ids"]]
    options = {"per_device_train_batch_size": 32, "num_train_epochs": 1, "learning_rate": 3e-3, "use_cpu": True}
    quiet = {"bf16": False, "report_to": "none", "save_strategy": "no", "disable_tqdm": True}
    args = SFTConfig(tempfile.mkdtemp(), dataset_kwargs={"skip_prepare_dataset": True}, **options, **quiet)
    model, data = LlamaForCausalLM(LlamaConfig(**toy.LLAMA)), datasets.Dataset.from_list(texts)
    adversary = (fastadv.FGM, {"epsilon": 0.5, "scope": "sample", "relative": True})
    AdversarialSFT(model, args, train_dataset=data, processing_class=known, adversary=adversary).train()

    test = toy.unseen(toy.chains)
    answers = model.eval()(input_ids=test["input_ids"], attention_mask=test["attention_mask"]).logits.argmax(-1)
    return toy.accuracy(answers[:, :-1], test["labels"][:, 1:])


if __name__ == "__main__":
    print(main())
