"""CogVLM restated in torch, with the tensor names of its folders; see mllm_jax/hf/cogvlm.py.

Held against that code (tests/golden/make_cogvlm.py).  Which expert reads a position, and its number, follow from the types of the
tokens alone.
"""

import json
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import nn
from torch.nn import functional as F

from tests.hf.tiny import randomize

CONFIG = {
    "architectures": ["CogVLMForCausalLM"], "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0, "hidden_act": "silu", "hidden_size": 32,
    "intermediate_size": 40, "max_position_embeddings": 2048, "num_attention_heads": 4, "num_hidden_layers": 3, "rms_norm_eps": 1e-5,
    "template_version": "chat", "tie_word_embeddings": False, "vocab_size": 264,
    "vision_config": {"dropout_prob": 0.0, "hidden_act": "gelu", "hidden_size": 24, "image_size": 32, "in_channels": 3,
                      "intermediate_size": 36, "layer_norm_eps": 1e-6, "num_heads": 3, "num_hidden_layers": 2, "num_positions": 17,
                      "patch_size": 8},
}  # fmt: skip


def module(**children: nn.Module) -> nn.Module:
    out = nn.Module()
    for name, child in children.items():
        out.add_module(name, child)
    return out


class RMSNorm(nn.Module):
    def __init__(self, d: int, eps: float):
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(d)), eps

    def forward(self, x):
        return self.weight * x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.eps)


class EVA(nn.Module):
    def __init__(self, cfg: dict, out: int, hidden: int):
        super().__init__()
        d, f, p, self.heads = cfg["hidden_size"], cfg["intermediate_size"], cfg["patch_size"], cfg["num_heads"]
        norm = lambda: nn.LayerNorm(d, eps=cfg["layer_norm_eps"])
        self.patch_embedding = module(proj=nn.Conv2d(3, d, p, p), position_embedding=nn.Embedding(cfg["num_positions"], d))
        self.patch_embedding.cls_embedding = nn.Parameter(torch.zeros(1, d))
        self.transformer = module(layers=nn.ModuleList(
            module(input_layernorm=norm(), attention=module(query_key_value=nn.Linear(d, 3 * d), dense=nn.Linear(d, d)),
                   mlp=module(fc1=nn.Linear(d, f), fc2=nn.Linear(f, d)), post_attention_layernorm=norm())
            for _ in range(cfg["num_hidden_layers"])))
        plain = lambda a, b: nn.Linear(a, b, bias=False)
        self.linear_proj = module(linear_proj=plain(d, out), norm1=nn.LayerNorm(out), gate_proj=plain(out, hidden),
                                  dense_h_to_4h=plain(out, hidden), dense_4h_to_h=plain(hidden, out))
        self.boi, self.eoi = nn.Parameter(torch.zeros(1, 1, out)), nn.Parameter(torch.zeros(1, 1, out))

    def encode(self, images):
        e = self.patch_embedding
        x = e.proj(images).flatten(2).transpose(1, 2)
        x = torch.cat([e.cls_embedding.expand(len(x), 1, -1), x], dim=1) + e.position_embedding.weight
        for layer in self.transformer.layers:
            b, n, d = x.shape
            q, k, v = layer.attention.query_key_value(x).reshape(b, n, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
            y = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(b, n, d)
            x = x + layer.input_layernorm(layer.attention.dense(y))
            x = x + layer.post_attention_layernorm(layer.mlp.fc2(F.gelu(layer.mlp.fc1(x))))
        return x[:, 1:]

    def forward(self, images):
        p = self.linear_proj
        x = F.gelu(p.norm1(p.linear_proj(self.encode(images))))
        x = p.dense_4h_to_h(F.silu(p.gate_proj(x)) * p.dense_h_to_4h(x))
        return torch.cat([self.boi.expand(len(x), 1, -1), x, self.eoi.expand(len(x), 1, -1)], dim=1)


class CogVLM(nn.Module):
    def __init__(self, cfg: dict = CONFIG):
        super().__init__()
        d, f, v, eps, self.heads = cfg["hidden_size"], cfg["intermediate_size"], cfg["vocab_size"], cfg["rms_norm_eps"], cfg["num_attention_heads"]
        plain = lambda a, b: nn.Linear(a, b, bias=False)
        attn = lambda: module(**{f"{who}_expert_{name}": plain(d, n) for who in ("vision", "language")
                                 for name, n in (("query_key_value", 3 * d), ("dense", d))})
        mlp = lambda: module(gate_proj=plain(d, f), up_proj=plain(d, f), down_proj=plain(f, d))
        self.model = module(
            embed_tokens=nn.Embedding(v, d), norm=RMSNorm(d, eps), vision=EVA(cfg["vision_config"], d, f),
            layers=nn.ModuleList(
                module(input_layernorm=RMSNorm(d, eps), post_attention_layernorm=RMSNorm(d, eps), self_attn=attn(),
                       mlp=module(language_mlp=mlp(), vision_mlp=mlp()))
                for _ in range(cfg["num_hidden_layers"])))
        self.lm_head = plain(d, v)

    def forward(self, ids, types, images):
        """i64[b s], types i64[b s] (1 from the vector before an image to the one behind it), f32[n 3 h w] -> states, logits."""
        x = self.model.embed_tokens(ids)
        if len(images):
            x = x.index_put([types == 1], self.model.vision(images).flatten(0, 1))
        vision, turn = expert(types), rotation(positions(types), x.shape[-1] // self.heads)
        states = [x]
        for layer in self.model.layers:
            a, y = layer.self_attn, layer.input_layernorm(x)
            either = lambda name, y, a=a: torch.where(vision[..., None], a.get_submodule(f"vision_expert_{name}")(y),
                                                      a.get_submodule(f"language_expert_{name}")(y))
            b, s, d = y.shape
            q, k, v = (z.reshape(b, s, self.heads, -1).transpose(1, 2) for z in either("query_key_value", y).split(d, -1))
            y = F.scaled_dot_product_attention(turn(q), turn(k), v, is_causal=True).transpose(1, 2).reshape(b, s, d)
            x = x + either("dense", y)
            y = layer.post_attention_layernorm(x)
            mlp = lambda m, y: m.down_proj(F.silu(m.gate_proj(y)) * m.up_proj(y))
            x = x + torch.where(vision[..., None], mlp(layer.mlp.vision_mlp, y), mlp(layer.mlp.language_mlp, y))
            states.append(x)
        return states, self.lm_head(self.model.norm(x))

    def answer(self, ids, types, images, n: int) -> list[int]:
        """The likeliest next tokens of one row."""
        for _ in range(n):
            token = self(ids, types, images)[1][:, -1].argmax(-1, keepdim=True)
            ids, types = torch.cat([ids, token], 1), torch.cat([types, torch.zeros_like(token)], 1)
        return ids[0, -n:].tolist()


def expert(types):
    """The vision expert reads a position if the next one is of vision too: all but the vector behind an image."""
    out = torch.zeros_like(types, dtype=torch.bool)
    out[:, :-1] = (types[:, :-1] == 1) & (types[:, 1:] == 1)
    return out


def positions(types):
    """They count up, but not inside an image, between the vectors around it."""
    out = []
    for row in types.tolist():
        inside = [0 < i < len(row) - 1 and row[i - 1] == row[i] == row[i + 1] == 1 for i in range(len(row))]
        at, line = -1, []
        for i in range(len(row)):
            at += not (inside[i] and inside[i - 1])
            line.append(at)
        out.append(line)
    return torch.tensor(out)


def rotation(at, width: int):
    angle = at[:, None, :, None] * 10_000.0 ** (-torch.arange(0, width, 2) / width)
    cos, sin = (torch.cat([f(angle)] * 2, -1) for f in (torch.cos, torch.sin))

    def turn(x):
        a, b = x.chunk(2, -1)
        return x * cos + torch.cat([-b, a], -1) * sin

    return turn


def save(folder: Path) -> CogVLM:
    """A tiny random model, and its folder."""
    model = CogVLM()
    randomize(model)
    with torch.no_grad():
        for mark in (model.model.vision.boi, model.model.vision.eoi):
            mark.normal_(generator=torch.Generator().manual_seed(1))
    folder.mkdir()
    save_file({**model.state_dict(), "model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4)}, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(CONFIG))
    return model.eval()
