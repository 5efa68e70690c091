"""Tiny models that the tests share; parameter names are those of the goldens.

Every model has a `tap`, an identity behind the word embedding: what it lets through is the embedding as the model sees
it, perturbation included, so that tests can record perturbations without knowing how they got there.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

V, D, CLASSES, LENGTH, BATCH = 50, 16, 3, 7, 4


class Output(NamedTuple):
    """What a model returns, as transformers has it."""

    loss: Tensor | None
    logits: Tensor


class Embeddings(nn.Module):
    """Words, positions, layer norm."""

    def __init__(self, dropout: float = 0.0, padding_idx: int | None = None) -> None:
        super().__init__()
        self.word_embeddings = nn.Embedding(V, D, padding_idx=padding_idx)
        self.position_embeddings = nn.Embedding(12, D)
        self.LayerNorm = nn.LayerNorm(D, eps=1e-5)
        self.dropout = nn.Dropout(dropout)
        self.tap = nn.Identity()

    def forward(self, ids: Tensor | None, inputs_embeds: Tensor | None = None) -> Tensor:
        words = self.tap(self.word_embeddings(ids) if inputs_embeds is None else inputs_embeds)
        places = self.position_embeddings(torch.arange(words.shape[1], device=words.device))
        return self.dropout(self.LayerNorm(words + places))


class Encoder(nn.Module):
    """kind "mlp": a tanh MLP per position, masked mean. "tfm": attention before it, and the first position pooled."""

    def __init__(self, kind: str, dropout: float = 0.0, padding_idx: int | None = None) -> None:
        super().__init__()
        self.kind = kind
        self.embeddings = Embeddings(dropout, padding_idx)
        if kind == "tfm":
            self.q, self.k, self.v, self.o = (nn.Linear(D, D) for _ in range(4))
        self.ff1, self.ff2 = nn.Linear(D, 24), nn.Linear(24, D)

    def forward(self, ids: Tensor | None, mask: Tensor | None, inputs_embeds: Tensor | None = None) -> Tensor:
        h = self.embeddings(ids, inputs_embeds)
        m = h.new_ones(h.shape[:2]) if mask is None else mask.to(h)
        if self.kind == "tfm":
            scores = self.q(h) @ self.k(h).transpose(1, 2) / D**0.5 + (1 - m)[:, None, :] * -1e9
            h = h + self.o(scores.softmax(-1) @ self.v(h))
        h = h + self.ff2(torch.tanh(self.ff1(h)))
        if self.kind == "tfm":
            return h[:, 0]
        return (h * m.unsqueeze(-1)).sum(1) / m.sum(1, keepdim=True)


class TinyModel(nn.Module):
    """A classifier with the names of a small BERT; of one class, a regression."""

    def __init__(
        self, kind: str = "mlp", dropout: float = 0.0, padding_idx: int | None = None, classes: int = CLASSES
    ) -> None:
        super().__init__()
        self.bert = Encoder(kind, dropout, padding_idx)
        self.classifier = nn.Linear(D, classes)

    @property
    def word_embeddings(self) -> nn.Embedding:
        return self.bert.embeddings.word_embeddings

    @property
    def tap(self) -> nn.Module:
        return self.bert.embeddings.tap

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
    ) -> Output:
        logits = self.classifier(self.bert(input_ids, attention_mask, inputs_embeds))
        if labels is None:
            return Output(None, logits)
        regression = logits.shape[-1] == 1
        return Output(F.mse_loss(logits[:, 0], labels) if regression else F.cross_entropy(logits, labels), logits)


class RobertaLayer(nn.Module):
    """One attention head and a tanh MLP, each with a residual."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v, self.o = (nn.Linear(D, D) for _ in range(4))
        self.ff1, self.ff2 = nn.Linear(D, 24), nn.Linear(24, D)

    def forward(self, h: Tensor, padding: Tensor) -> Tensor:
        scores = (self.q(h) @ self.k(h).transpose(1, 2) / D**0.5).masked_fill(padding[:, None, :], -1e9)
        h = h + self.o(scores.softmax(-1) @ self.v(h))
        return h + self.ff2(torch.tanh(self.ff1(h)))


class RobertaEncoder(nn.Module):
    """Two layers; ids equal to the padding index are masked, and the first position is pooled."""

    PAD = 1

    def __init__(self) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(V, D, padding_idx=self.PAD)
        self.embed_positions = nn.ModuleDict({"emb": nn.Embedding(12, D)})
        self.emb_layer_norm = nn.LayerNorm(D)
        self.layers = nn.ModuleList([RobertaLayer(), RobertaLayer()])
        self.tap = nn.Identity()

    def forward(self, ids: Tensor, inputs_embeds: Tensor | None = None) -> Tensor:
        padding = ids == self.PAD
        words = self.tap(self.embed_tokens(ids) if inputs_embeds is None else inputs_embeds)
        h = self.emb_layer_norm(words + self.embed_positions["emb"](torch.arange(ids.shape[1])))
        h = h * (~padding).unsqueeze(-1)
        for layer in self.layers:
            h = layer(h, padding)
        return h[:, 0]


class TinyRoberta(nn.Module):
    """A classifier with fairseq's names and its sum-reduced loss."""

    def __init__(self) -> None:
        super().__init__()
        self.decoder = nn.ModuleDict({"sentence_encoder": RobertaEncoder()})
        self.head = nn.Linear(D, CLASSES)

    @property
    def word_embeddings(self) -> nn.Embedding:
        return self.decoder["sentence_encoder"].embed_tokens

    @property
    def tap(self) -> nn.Module:
        return self.decoder["sentence_encoder"].tap

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
    ) -> Output:
        logits = self.head(self.decoder["sentence_encoder"](input_ids, inputs_embeds))
        loss = None if labels is None else F.cross_entropy(logits, labels, reduction="sum")
        return Output(loss, logits)


class TiedLM(nn.Module):
    """A language model whose head is the embedding table, read again through `F.linear`."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(V, D)
        self.tap = nn.Identity()
        self.mix = nn.Linear(D, D)
        self.head = nn.Linear(D, V, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, ids: Tensor, inputs_embeds: Tensor | None = None) -> Output:
        words = self.tap(self.embed(ids) if inputs_embeds is None else inputs_embeds)
        history = words.cumsum(1) / torch.arange(1, ids.shape[1] + 1).to(words).unsqueeze(-1)
        logits = self.head(torch.tanh(self.mix(history)))
        return Output(F.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten()), logits)


class TwoCalls(nn.Module):
    """One embedding called twice in a forward, on ids of two lengths, as an encoder and a decoder share theirs."""

    def __init__(self) -> None:
        super().__init__()
        self.shared = nn.Embedding(V, D)
        self.tap = nn.Identity()
        self.encode, self.decode = nn.Linear(D, D), nn.Linear(D, D)
        self.head = nn.Linear(D, CLASSES)

    def forward(self, source: Tensor, target: Tensor, labels: Tensor, embeds: list[Tensor] | None = None) -> Output:
        first = self.tap(self.shared(source) if embeds is None else embeds[0])
        context = torch.tanh(self.encode(first)).mean(1, keepdim=True)
        second = self.tap(self.shared(target) if embeds is None else embeds[1])
        logits = self.head(torch.tanh(self.decode(second) + context).mean(1))
        return Output(F.cross_entropy(logits, labels), logits)


class Stateful(nn.Module):
    """All that a step could leave a trace in: running statistics, a counter, dropout, frozen and unused parts."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(V, D)
        self.tap = nn.Identity()
        self.norm = nn.BatchNorm1d(D)
        self.dropout = nn.Dropout(0.3)
        self.frozen = nn.Linear(D, D).requires_grad_(False)
        self.unused = nn.Linear(D, 2)
        self.still = nn.Sequential(nn.Linear(D, D), nn.Dropout(0.5)).eval()
        self.head = nn.Linear(D, CLASSES)
        self.register_buffer("calls", torch.zeros((), dtype=torch.int64))

    def forward(self, ids: Tensor, labels: Tensor) -> Output:
        self.calls += 1
        h = self.frozen(self.dropout(self.tap(self.embed(ids))))
        h = self.still(self.norm(h.flatten(0, 1)).view_as(h))
        logits = self.head(torch.tanh(h).mean(1))
        return Output(F.cross_entropy(logits, labels), logits)
