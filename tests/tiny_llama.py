"""A Llama-like decoder in plain PyTorch, exact in float64 (transformers' own has float32 norms and softmax).

state_dict keys are those of transformers.LlamaForCausalLM; `model.model.embed_tokens`, `model.model.layers[i].mlp` and
`model.lm_head` are where the reference codes look for them. `tiny()` is the model of all goldens `*_tl_*`.
"""

from types import SimpleNamespace

import torch
import torch.nn.functional as F
from torch import nn

CONFIG = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
}


class Output:
    """(loss, logits, ...) as transformers' outputs: by name, or by index over what is there."""

    def __init__(self, **parts):
        self.__dict__.update(loss=None, logits=None, past_key_values=None, hidden_states=None)
        self.__dict__.update(parts)

    def __getitem__(self, key):
        if isinstance(key, str):
            return self.__dict__[key]
        order = ("loss", "logits", "past_key_values", "hidden_states")
        return [self.__dict__[k] for k in order if self.__dict__[k] is not None][key]


class RMSNorm(nn.Module):
    def __init__(self, size, eps):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x):
        return self.weight * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.eps))


def rotate(x, cos, sin):
    half = x.shape[-1] // 2
    turned = torch.cat((-x[..., half:], x[..., :half]), dim=-1)
    return x * cos + turned * sin


class Attention(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.heads, self.kv, self.dim = (
            c.num_attention_heads,
            c.num_key_value_heads,
            c.hidden_size // c.num_attention_heads,
        )
        self.q_proj = nn.Linear(c.hidden_size, self.heads * self.dim, bias=False)
        self.k_proj = nn.Linear(c.hidden_size, self.kv * self.dim, bias=False)
        self.v_proj = nn.Linear(c.hidden_size, self.kv * self.dim, bias=False)
        self.o_proj = nn.Linear(self.heads * self.dim, c.hidden_size, bias=False)

    def forward(self, x, bias, cos, sin, past=None):
        b, t, _ = x.shape
        q = rotate(self.q_proj(x).view(b, t, self.heads, self.dim).transpose(1, 2), cos, sin)
        k = rotate(self.k_proj(x).view(b, t, self.kv, self.dim).transpose(1, 2), cos, sin)
        v = self.v_proj(x).view(b, t, self.kv, self.dim).transpose(1, 2)
        if past is not None:
            k, v = torch.cat((past[0], k), 2), torch.cat((past[1], v), 2)
        present = (k, v)
        k, v = (s.repeat_interleave(self.heads // self.kv, 1) for s in (k, v))
        weights = torch.softmax(q @ k.transpose(2, 3) / self.dim**0.5 + bias, dim=-1)
        return self.o_proj((weights @ v).transpose(1, 2).reshape(b, t, -1)), present


class MLP(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.gate_proj = nn.Linear(c.hidden_size, c.intermediate_size, bias=False)
        self.up_proj = nn.Linear(c.hidden_size, c.intermediate_size, bias=False)
        self.down_proj = nn.Linear(c.intermediate_size, c.hidden_size, bias=False)

    def forward(self, x):
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Layer(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.self_attn, self.mlp = Attention(c), MLP(c)
        self.input_layernorm = RMSNorm(c.hidden_size, c.rms_norm_eps)
        self.post_attention_layernorm = RMSNorm(c.hidden_size, c.rms_norm_eps)

    def forward(self, x, bias, cos, sin, past=None):
        attended, present = self.self_attn(self.input_layernorm(x), bias, cos, sin, past)
        x = x + attended
        return x + self.mlp(self.post_attention_layernorm(x)), present


class Model(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.config = c
        self.embed_tokens = nn.Embedding(c.vocab_size, c.hidden_size)
        self.layers = nn.ModuleList([Layer(c) for _ in range(c.num_hidden_layers)])
        self.norm = RMSNorm(c.hidden_size, c.rms_norm_eps)

    def forward(self, x, attention_mask=None, position_ids=None, past=None, bias=None):
        c, (_b, t, _) = self.config, x.shape
        before = 0 if past is None else past[0][0].shape[2]
        if position_ids is None:  # as transformers: 0.. whatever the padding
            position_ids = torch.arange(before, before + t)[None]
        dim = c.hidden_size // c.num_attention_heads
        inverse = 1.0 / c.rope_theta ** (torch.arange(0, dim, 2, dtype=x.dtype) / dim)
        angles = position_ids[..., None].to(x.dtype) * inverse
        angles = torch.cat((angles, angles), -1)[:, None]
        if bias is None:
            seen = torch.ones(t, before + t, dtype=torch.bool).tril(before)[None, None]
            if attention_mask is not None:
                seen = seen & attention_mask.bool()[:, None, None, :]
                seen = seen | torch.eye(t, before + t, dtype=torch.bool)[None, None]  # a padded query sees itself
            bias = torch.zeros(seen.shape, dtype=x.dtype).masked_fill(~seen, torch.finfo(x.dtype).min)
        states, presents = [x], []
        for i, layer in enumerate(self.layers):
            x, present = layer(x, bias, angles.cos(), angles.sin(), None if past is None else past[i])
            presents.append(present)
            states.append(x)
        x = self.norm(x)
        states[-1] = x
        return x, tuple(presents), tuple(states)


class TinyLlama(nn.Module):
    """model(input_ids or inputs_embeds, attention_mask, labels) -> Output."""

    def __init__(self, **config):
        super().__init__()
        self.config = SimpleNamespace(**{**CONFIG, "use_cache": False, "model_type": "tiny", **config})
        self.config.get = lambda key, default=None: getattr(self.config, key, default)
        self.model = Model(self.config)
        self.lm_head = nn.Linear(self.config.hidden_size, self.config.vocab_size, bias=False)

    is_gradient_checkpointing = False  # else PEFT makes the embedding's output a leaf that requires a gradient
    device = property(lambda self: torch.device("cpu"))
    dtype = property(lambda self: self.lm_head.weight.dtype)
    vocab_size = property(lambda self: self.config.vocab_size)

    def get_input_embeddings(self):
        return self.model.embed_tokens

    def forward(
        self,
        input_ids=None,
        attention_mask=None,
        position_ids=None,
        past_key_values=None,
        inputs_embeds=None,
        labels=None,
        use_cache=False,
        output_hidden_states=False,
        bias=None,
        **_,
    ):
        x = self.model.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        x, presents, states = self.model(x, attention_mask, position_ids, past_key_values, bias)
        logits = self.lm_head(x)
        loss = None
        if labels is not None:
            loss = F.cross_entropy(logits[:, :-1].reshape(-1, logits.shape[-1]), labels[:, 1:].reshape(-1))
        return Output(
            loss=loss,
            logits=logits,
            past_key_values=presents if use_cache else None,
            hidden_states=states if output_hidden_states else None,
        )


def tiny(seed=0, dtype=torch.float64, **config):
    """The model of the goldens: weights drawn in float32 and rounded to multiples of 2^-12, then cast."""
    model = TinyLlama(**config)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in model.named_parameters():
            drawn = torch.randn(p.shape, generator=generator, dtype=torch.float32)
            scale = 1.0 if "embed_tokens" in name else (0.1 if "norm" in name else 1.5 / p.shape[-1] ** 0.5)
            value = drawn * scale + (1.0 if "norm" in name else 0.0)
            p.copy_((value * 4096).round() / 4096)
    return model.to(dtype).eval()


def load(arrays, dtype=torch.float64, **config):
    """The model whose weights are `w::NAME` in `arrays`."""
    model = TinyLlama(**config).to(dtype)
    state = {
        k[3:]: torch.as_tensor(arrays[k], dtype=dtype).clone()
        for k in arrays
        if k.startswith("w::") and "lora_" not in k
    }
    model.load_state_dict({k.replace("base_model.model.", "").replace(".base_layer", ""): v for k, v in state.items()})
    return model.eval()
