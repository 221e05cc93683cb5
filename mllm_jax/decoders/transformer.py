"""The decoder: one transformer whose options cover the language models and text towers of the cookbook.

What layers do not have in common is in their `cycle`: windows, experts, what reads the media beside the row.
"""

from dataclasses import replace
from itertools import groupby
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from mllm_jax.config import ConfigError, config
from mllm_jax.decoders.layers import Layer, Memory, Scene
from mllm_jax.nn import stack, visibility
from mllm_jax.nn.attention import LayerCache
from mllm_jax.nn.block_config import BlockConfig
from mllm_jax.nn.lookup import lookup
from mllm_jax.nn.param import Embedding, LayerNorm, RMSNorm, normal, param, zeros
from mllm_jax.nn.position import LinearScaling, Llama3Scaling, Rope, Rotation
from mllm_jax.nn.visibility import Visibility
from mllm_jax.sharding import compute_dtype, constrain
from mllm_jax.types import Batch, Mean, struct


@config
class DecoderConfig(BlockConfig):
    vocab: int
    depth: int
    rope: Rope | None = Rope()          # None: positions are learned
    positions: int | None = None        # size of the learned table
    position_offset: int = 0            # row of the table that is position 0 (2 in OPT and BART)
    causal: bool = True                 # False: a position sees all of its segment (text tower of SigLIP)
    head: str = "own"                   # what makes logits: its "own" matrix, one with a bias ("biased"), the "tied" embedding, or "none"
    embed_scale: float = 1.0            # factor on the embeddings (Gemma: the root of the width)
    added: int = 0                      # so many tokens, the last ones, came later: their rows are parameters of their own
    cycle: tuple[Any, ...] = (Layer(),)     # layer i is of the kind i modulo so many: decoders/layers.py

    def build(self, *, rngs: nnx.Rngs) -> "Decoder":
        return Decoder(self, rngs=rngs)

    def tiny(self) -> "DecoderConfig":
        rope = self.rope and replace(self.rope, sections=self.rope.sections and (2, 1, 1))
        cycle = tuple(layer.tiny() for layer, _ in groupby(self.cycle))         # of neighbours that are alike, one
        return replace(
            self, vocab=272, width=32, depth=max(2, len(cycle)), heads=4, mlp=64, kv_heads=2 if self.kv_heads else None,
            head_dim=None, rope=rope, positions=self.positions and 320 + self.position_offset, cycle=cycle,
            added=64 if self.added else 0,      # of the tokens for bytes, with those for blanks and new lines, that all rows hold
            embed_scale=self.embed_scale if self.embed_scale == 1 else 32**0.5)

    @property
    def origin(self) -> "DecoderConfig":
        """The language model that it grew from, whose checkpoints it can start from; the rest of it starts fresh.

        On text all axes of a position are the same, so that rotations by axes are those of the language model.
        """
        rope = self.rope and replace(self.rope, sections=None, interleaved=False)
        return replace(self, rope=rope, cycle=tuple(layer.origin for layer in self.cycle))

    @property
    def memory_width(self) -> int | None:
        """Width of the media tokens that layers read beside the row; None if no layer reads."""
        return next((layer.reads.width for layer in self.cycle if getattr(layer, "reads", None)), None)


LLAMA = DecoderConfig(vocab=32_000, width=4096, depth=32, heads=32, mlp=11_008, norm=RMSNorm(eps=1e-5))
VICUNA_7B, VICUNA_13B = LLAMA, replace(LLAMA, width=5120, depth=40, heads=40, mlp=13_824)
LLAMA_3_1_8B = replace(
    LLAMA, vocab=128_256, kv_heads=8, mlp=14_336, rope=Rope(theta=5e5, scaling=Llama3Scaling()))
# SmolLM2 (arXiv:2502.02737) as SmolVLM has it: for rows of 16k, with a head of its own and more tokens.
SMOLLM2_135M = replace(LLAMA, vocab=49_280, width=576, depth=30, heads=9, kv_heads=3, mlp=1536, rope=Rope(theta=1e5))
SMOLLM2_360M = replace(SMOLLM2_135M, width=960, depth=32, heads=15, kv_heads=5, mlp=2560)
SMOLLM2_1_7B = replace(LLAMA, vocab=49_155, width=2048, depth=24, heads=32, mlp=8192, rope=Rope(theta=273_768.0))
MISTRAL_7B = replace(LLAMA, kv_heads=8, mlp=14_336)
MOBILE_LLAMA_1_4B = replace(LLAMA, width=2048, depth=24, heads=16, mlp=5632, norm=RMSNorm(eps=1e-6))
MOBILE_LLAMA_2_7B = replace(LLAMA, width=2560, mlp=6912, norm=RMSNorm(eps=1e-6))
QWEN_7B = DecoderConfig(vocab=151_936, width=4096, depth=32, heads=32, mlp=11_008, qkv_bias=True)
QWEN2_7B = DecoderConfig(
    vocab=152_064, width=3584, depth=28, heads=28, kv_heads=4, mlp=18_944, qkv_bias=True, rope=Rope(theta=1e6))
QWEN2_0_5B = replace(QWEN2_7B, vocab=151_936, width=896, depth=24, heads=14, kv_heads=2, mlp=4864, head="tied")
QWEN2_72B = replace(QWEN2_7B, width=8192, depth=80, heads=64, kv_heads=8, mlp=29_568)
QWEN2_1_5B = replace(QWEN2_0_5B, width=1536, depth=28, heads=12, mlp=8960)
QWEN2_5_3B = replace(QWEN2_0_5B, width=2048, depth=36, heads=16, mlp=11_008)
QWEN2_5_32B = replace(QWEN2_7B, width=5120, depth=64, heads=40, kv_heads=8, mlp=27_648)
QWEN3_8B = DecoderConfig(
    vocab=151_936, width=4096, depth=36, heads=32, kv_heads=8, head_dim=128, mlp=12_288, qk_norm=True, rope=Rope(theta=1e6))
QWEN3_1_7B = replace(QWEN3_8B, width=2048, depth=28, heads=16, mlp=6144, head="tied")
QWEN3_4B = replace(QWEN3_8B, width=2560, mlp=9728, head="tied")
STABLELM_2_1_6B = DecoderConfig(
    vocab=100_352, width=2048, depth=24, heads=32, mlp=5632, norm=LayerNorm(), qkv_bias=True, rope=Rope(part=0.25))
PHI_2 = DecoderConfig(
    vocab=51_200, width=2560, depth=32, heads=32, mlp=10_240, gated=False, activation="gelu_tanh", norm=LayerNorm(), norms="parallel",
    qkv_bias=True, out_bias=True, mlp_bias=True, rope=Rope(part=0.4), head="biased")
GEMMA_2B = DecoderConfig(
    vocab=256_000, width=2048, depth=18, heads=8, kv_heads=1, head_dim=256, mlp=16_384, activation="gelu_tanh",
    norm=RMSNorm(offset=1.0), head="tied", embed_scale=2048**0.5)
# Five layers that see 1,024 positions, and one that sees all, whose rotations are stretched for long contexts.
GEMMA3_4B = replace(
    GEMMA_2B, vocab=262_208, width=2560, depth=34, kv_heads=4, mlp=10_240, embed_scale=2560**0.5, qk_norm=True, norms="both",
    rope=Rope(theta=1e6, scaling=LinearScaling(factor=8.0)), cycle=(Layer(window=1024, rope=Rope(theta=1e4)),) * 5 + (Layer(),))
GEMMA3_12B = replace(GEMMA3_4B, width=3840, depth=48, heads=16, kv_heads=8, mlp=15_360, embed_scale=3840**0.5)
GEMMA3_27B = replace(
    GEMMA3_4B, width=5376, depth=62, heads=32, kv_heads=16, head_dim=128, mlp=21_504, embed_scale=5376**0.5, query_scale=168**-0.5)
OPT_2_7B = DecoderConfig(
    vocab=50_272, width=2560, depth=32, heads=32, mlp=10_240, gated=False, activation="relu", norm=LayerNorm(), qkv_bias=True,
    out_bias=True, mlp_bias=True, rope=None, positions=2050, position_offset=2, head="tied")
OPT_6_7B = replace(OPT_2_7B, width=4096, mlp=16_384)
CLIP_TEXT_L = DecoderConfig(
    vocab=49_408, width=768, depth=12, heads=12, mlp=3072, gated=False, activation="quick_gelu", norm=LayerNorm(),
    qkv_bias=True, out_bias=True, mlp_bias=True, rope=None, positions=77, head="none")
CLIP_TEXT_B = replace(CLIP_TEXT_L, width=512, heads=8, mlp=2048)
SIGLIP_TEXT_B = replace(
    CLIP_TEXT_L, vocab=32_000, mlp=3072, activation="gelu_tanh", norm=LayerNorm(eps=1e-6), positions=64, causal=False)
SIGLIP_TEXT_SO400M = replace(SIGLIP_TEXT_B, width=1152, depth=27, heads=16, mlp=4304)


@struct
class Cache:
    """What a decoder remembers of a row: keys and values of all layers, who may see them, and of media beside the row."""

    k: jax.Array                        # f[l b t g k]
    v: jax.Array                        # f[l b t g k]
    segments: jax.Array                 # i32[b t], 0 where nothing is written yet
    order: jax.Array                    # i32[b t]
    index: jax.Array                    # i32[]: where the next token goes
    memory: Memory | None = None        # what the last position saw, the next ones see; without its tokens
    keys: tuple = ()                    # of the memory, for each place of the cycle: Keys f[n b m g k] of its layers, or None


class Decoder(nnx.Module):
    def __init__(self, cfg: DecoderConfig, *, rngs: nnx.Rngs):
        self.cfg = cfg
        if cfg.head == "biased" and cfg.added:
            raise ConfigError(f"added={cfg.added} tokens beside a head with a bias are not supported; let the vocabulary grow, with added=0")
        old = cfg.vocab - cfg.added
        self.embedding = Embedding(old, cfg.width, added=cfg.added, rngs=rngs)
        self.position = param(rngs, (cfg.positions, cfg.width), "position embed", normal(0.01)) if cfg.rope is None else None
        self.blocks = stack.make([lambda r, layer=layer: layer.build(cfg, rngs=r) for layer in cfg.cycle], cfg.depth, rngs=rngs)
        self.norm = cfg.norm.build(cfg.width, rngs=rngs)
        self.head = param(rngs, (cfg.width, old), "embed vocab", normal(0.02)) if cfg.head in ("own", "biased") else None
        self.head_bias = param(rngs, (old,), "vocab", zeros) if cfg.head == "biased" else None
        self.head_added = param(rngs, (cfg.width, cfg.added), "embed vocab", normal(0.02)) if cfg.head == "own" and cfg.added else None

    @property
    def unembed(self) -> jax.Array | None:
        """f32[d v]: hidden @ unembed are the logits.  A bias is the last row, and hidden states end in a 1."""
        if self.cfg.head == "none":
            return None
        tied = self.head is None
        tables = (self.embedding.table, self.embedding.added) if tied else (self.head, self.head_added)
        parts = [constrain(x[...].T if tied else x[...], "embed vocab") for x in tables if x is not None]
        if self.head_bias is not None:
            # Gathered before they are joined, for their parts lie on other devices.
            whole = [constrain(x, "embed_act vocab") for x in (*parts, self.head_bias[...][None])]
            return constrain(jnp.concatenate(whole), "embed_act vocab")
        return parts[0] if len(parts) == 1 else constrain(jnp.concatenate(parts, axis=1), "embed vocab")

    def embed(self, tokens: jax.Array) -> jax.Array:
        """i32[b s] -> f[b s d]."""
        return self.embedding(tokens) * jnp.asarray(self.cfg.embed_scale, compute_dtype())

    def __call__(
        self, x: jax.Array, batch: Batch, *, memory: Memory | None = None, deep: jax.Array | None = None, cache: Cache | None = None,
    ) -> tuple[jax.Array, dict[str, Mean], Cache | None]:
        """Embeddings f[b s d] -> (hidden states f[b s d], d + 1 where the head is biased, auxiliary losses, the cache with these positions in it).

        `deep` f[n b s d] is added to what the first n layers give (DeepStack, arXiv:2406.04334).
        """
        x = self.locate(x, batch.positions)
        new = memory is not None
        if cache is not None:
            memory = cache.memory if memory is None else memory
        scene, rotations = self.scene(batch, memory), self.rotations(batch.positions)
        if cache is not None:
            cache, sees = remember(cache, scene)
            scene = replace(scene, sees=sees)

        def step(carry: tuple, layer: nnx.Module, i: jax.Array, j: int) -> tuple:
            x, kv = carry
            if kv is not None:
                kept = jax.tree.map(lambda a: a[i // len(self.blocks)], cache.keys[j]) if cache.keys and not new else None
                kv = LayerCache(k=kv[0], v=kv[1], layer=i, index=cache.index, memory=kept)
            x, kv, aux = layer(constrain(x, "batch seq embed_act"), scene.of_layer(i), rotations[j], kv)
            if deep is not None:
                x = x + jnp.where(i < len(deep), deep[jnp.minimum(i, len(deep) - 1)], 0).astype(x.dtype)
            return (x, kv and (kv.k, kv.v)), (aux, kv.memory if kv is not None and new else None)

        (x, kv), outs = stack.run(self.blocks, step, (x, cache and (cache.k, cache.v)), depth=self.cfg.depth)
        aux: dict[str, Mean] = {}
        for name, many in (pair for out, _ in outs for pair in out.items()):
            one = jax.tree.map(lambda a: jnp.sum(a, axis=0), many)
            aux[name] = aux[name] + one if name in aux else one
        if cache is not None:
            keys = tuple(kept for _, kept in outs) if new else cache.keys
            cache = replace(cache, k=kv[0], v=kv[1], index=cache.index + x.shape[1], keys=keys)
        x = self.norm(x)
        if self.head_bias is not None:
            x = jnp.concatenate([x, jnp.ones_like(x[..., :1])], axis=-1)
        return x, aux, cache

    def locate(self, x: jax.Array, positions: jax.Array) -> jax.Array:
        """Embeddings f[b s d] with the learned vectors of i32[b s 3] added, where positions are learned."""
        if self.position is None:
            return x
        return x + lookup(self.position[...], positions[..., 0] + self.cfg.position_offset, "position").astype(x.dtype)

    def scene(self, batch: Batch, memory: Memory | None = None) -> Scene:
        sees = visibility.of_batch(batch, causal=self.cfg.causal)
        return Scene(sees=sees, kinds=batch.kinds, mask=batch.segments > 0, draws=batch.draws, memory=memory)

    def rotations(self, positions: jax.Array) -> list[Rotation | None]:
        """How the layers of each place in the cycle turn queries and keys at i32[b s 3]."""
        ropes = [layer.rope or self.cfg.rope for layer in self.cfg.cycle]
        made = {rope: rope(positions, self.cfg.head_dim or self.cfg.width // self.cfg.heads) for rope in set(ropes) - {None}}
        return [made.get(rope) for rope in ropes]

    def empty_cache(self, rows: int, length: int) -> Cache:
        """A cache for so many rows of at most so many positions."""
        cfg = self.cfg
        kv = (cfg.depth, rows, length, cfg.kv_heads or cfg.heads, cfg.head_dim or cfg.width // cfg.heads)
        none = jnp.zeros((rows, length), jnp.int32)
        return Cache(k=jnp.zeros(kv, compute_dtype()), v=jnp.zeros(kv, compute_dtype()), segments=none, order=none,
                     index=jnp.zeros((), jnp.int32))


def remember(cache: Cache, scene: Scene) -> tuple[Cache, Visibility]:
    """The cache with the new positions written at its index, and what those see of it.

    Causal order is the place in the cache; an order given in blocks must not pass it.
    """
    put = lambda old, x: jax.lax.dynamic_update_slice(old, x, (0, cache.index))
    new, start, order = scene.sees, cache.index, scene.sees.order + cache.index
    memory = scene.memory and replace(scene.memory, tokens=None, slot=scene.memory.slot[:, -1:])
    cache = replace(cache, segments=put(cache.segments, new.segments), order=put(cache.order, order), memory=memory)
    sees = Visibility(segments=new.segments, order=order, key_segments=cache.segments, key_order=cache.order, start=start)
    return cache, sees
