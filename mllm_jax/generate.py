"""Text from a model: the prompt at once, then token after token, in one compiled program for each shape.

Prompts stand at the right of their rows, so that all of them end in the same column; what is left of a
prompt has segment 0 and is seen by nobody.  Rows are independent: which other prompts share the batch,
how many devices there are and which bucket a prompt falls into change neither the answer (up to float
rounding) nor the random numbers, which come from (seed, id of the example, step) alone.
"""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh

from mllm_jax.config import ConfigError, config
from mllm_jax.data.batch import prompt_batch
from mllm_jax.data.pack import rooms
from mllm_jax.data.templates import Template
from mllm_jax.data.tokenize import encode_prompt
from mllm_jax.hosts import gather, is_writer, local_rows
from mllm_jax.models.mllm import Entering, MLLMConfig
from mllm_jax.nn.param import Params, abstract, axes_of, merge, split
from mllm_jax.sharding import Layout, constrain, host_share, put_rows, row_shards, sharding_of_parameter, use
from mllm_jax.sharding import rows as by_rows
from mllm_jax.types import Batch, Example, record


@config
class Sampling:
    """How the next token is chosen; the filters apply in this order, as in `transformers`.

    Tokens that tie with the last one kept by a filter are kept too.
    """

    temperature: float = 0.0            # 0: always the likeliest token, the lowest id if several tie
    top_k: int | None = None            # only so many of the likeliest tokens
    top_p: float = 1.0                  # only the fewest likeliest tokens whose probabilities reach this sum
    max_new_tokens: int = 128

    def __post_init__(self):
        if self.temperature < 0 or not 0 < self.top_p <= 1 or (self.top_k is not None and self.top_k < 1):
            raise ConfigError(f"sampling needs temperature >= 0, 0 < top_p <= 1 and top_k >= 1 or None; got {self}")
        if self.max_new_tokens < 1:
            raise ConfigError(f"max_new_tokens is {self.max_new_tokens}; it must be at least 1")


def generate(
    graph: nnx.GraphDef, params: Params, batch: Batch, sampling: Sampling, stop_ids: jax.Array, keys: jax.Array, pad_id: int = 0,
) -> jax.Array:
    """New tokens i32[b n] after the prompts of a batch: up to and with the first stop token, then `pad_id`.

    Jit it with `sampling` and `graph` constant.  Rows without a prompt (segment 0 throughout) are done from the
    start; the loop ends when all rows are.

    Args:
      batch: prompts, each ending in the last column.
      stop_ids: i32[k]; any of them ends a row.
      keys: one key for each row; step i draws with the key folded with i.
    """
    model = merge(graph, params)
    b, s = batch.tokens.shape
    n = sampling.max_new_tokens
    cache = model.decoder.empty_cache(b, s + n)
    cache = replace(cache, k=_constrain_cache(cache.k), v=_constrain_cache(cache.v))
    logits, cache = model.extend(model.embed(batch), batch, cache)
    real = batch.segments[:, -1] > 0
    # With positions on three axes (images have rows and columns) text goes on after the largest of them.
    start = jnp.max(jnp.where(batch.segments[..., None] > 0, batch.positions, -1), axis=(1, 2)) + 1

    def choose(logits: jax.Array, i: jax.Array, done: jax.Array, out: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        token = jnp.where(done, pad_id, sample(logits, sampling, jax.vmap(lambda key: jax.random.fold_in(key, i))(keys)))
        out = jax.lax.dynamic_update_slice(out, token[:, None], (0, i))
        return token, done | jnp.any(token[:, None] == stop_ids, axis=1), out

    def more(carry: tuple) -> jax.Array:
        i, _, done, _, _ = carry
        return (i < n) & ~jnp.all(done)

    def step(carry: tuple) -> tuple:
        i, token, done, out, cache = carry
        position = jnp.broadcast_to((start + i - 1)[:, None, None], (b, 1, 3))
        zeros = jnp.zeros((b, 1), jnp.int32)
        one = Batch(tokens=token[:, None], targets=zeros, weights=zeros.astype(jnp.float32), positions=position, kinds=zeros,
                    segments=batch.segments[:, -1:])
        logits, cache = model.extend(Entering(x=model.decoder.embed(one.tokens)), one, cache)
        token, done, out = choose(logits, i, done, out)
        return i + 1, token, done, out, cache

    token, done, out = choose(logits, jnp.asarray(0), ~real, jnp.full((b, n), pad_id, jnp.int32))
    return jax.lax.while_loop(more, step, (jnp.asarray(1), token, done, out, cache))[3]


def sample(logits: jax.Array, sampling: Sampling, keys: jax.Array) -> jax.Array:
    """One token i32[b] for each row of logits f32[b v], each row with its own key."""
    if sampling.temperature == 0:
        return jnp.argmax(logits, axis=-1).astype(jnp.int32)
    return jax.vmap(jax.random.categorical)(keys, filtered(logits, sampling)).astype(jnp.int32)


def filtered(logits: jax.Array, sampling: Sampling) -> jax.Array:
    """Logits f32[b v] divided by the temperature, minus infinity where a token is not to be drawn."""
    logits = logits.astype(jnp.float32) / sampling.temperature
    if sampling.top_k is not None and sampling.top_k < logits.shape[-1]:
        least = jax.lax.top_k(logits, sampling.top_k)[0][:, -1:]
        logits = jnp.where(logits < least, -jnp.inf, logits)
    if sampling.top_p < 1:
        falling = jnp.flip(jnp.sort(logits, axis=-1), axis=-1)
        p = jax.nn.softmax(falling, axis=-1)
        kept = jnp.cumsum(p, axis=-1) - p < sampling.top_p          # of the likelier ones; so the first is always kept
        least = jnp.min(jnp.where(kept, falling, jnp.inf), axis=-1, keepdims=True)
        logits = jnp.where(logits < least, -jnp.inf, logits)
    return logits


def row_keys(seed: jax.Array, hashes: jax.Array) -> jax.Array:
    """Keys [b] of the rows with these hashes u32[b 2]."""
    fold = jax.random.fold_in
    return jax.vmap(lambda h: fold(fold(jax.random.key(seed), h[0]), h[1]))(hashes)


def id_hash(id: str) -> np.ndarray:
    """u32[2], the same on every machine."""
    return np.frombuffer(hashlib.blake2b(id.encode(), digest_size=8).digest(), "<u4")


def _constrain_cache(x: jax.Array) -> jax.Array:
    return constrain(x, "batch cache kv_heads head_dim")


# --- many prompts -------------------------------------------------------------------------------------------------


@record
class Answer:
    text: str                           # without the stop token, and without blanks around it
    num_tokens: int                     # generated, with the stop token
    stopped: bool                       # False: cut off at max_new_tokens


class Generator:
    """Answers of one model to any number of examples, on one device or many, in batches of like prompts.

        generator = Generator(recipe.model, params, tokenizer, template="vicuna_v1")
        generator(examples, Sampling(max_new_tokens=32))        # a text for each example, in their order

    Compiles one program for each (prompt bucket, media items, sampling).  `params` are global arrays, or numpy.
    """

    def __init__(
        self, model: MLLMConfig, params: Mapping[str, Any], tokenizer: Any, *, layout: Layout | None = None, mesh: Mesh | None = None,
        template: str = "plain", rows: int = 16,
    ):
        self.towers, self.tokenizer, self.template = model.inputs, tokenizer, Template(template, tokenizer)
        self.layout = layout or Layout()
        self.mesh = self.layout.make_mesh() if mesh is None else mesh
        self.rows = batch_rows(rows, self.mesh)
        module = abstract(model)
        graph, self.params = split(module)[0], place(params, module, self.layout, self.mesh)
        self.stops = np.asarray(self.template.stops, np.int32)

        def program(params: Params, batch: Batch, sampling: Sampling, seed: jax.Array, hashes: jax.Array) -> jax.Array:
            return generate(graph, params, batch, sampling, self.stops, row_keys(seed, hashes), tokenizer.pad_token_id)

        self.program = jax.jit(program, static_argnames="sampling", out_shardings=by_rows(self.mesh))

    def __call__(self, examples: Sequence[Example], sampling: Sampling | None = None, seed: int = 0) -> list[str]:
        """A text for each example.  With several processes each passes all examples, and gets all texts."""
        sampling = sampling or Sampling()
        rows = min(self.rows, batch_rows(len(examples), self.mesh))
        texts: dict[int, str] = {}
        for shape, ids in schedule([self.shape(e) for e in examples], rows):
            mine = host_rows(ids, rows, self.mesh)
            answers = self.run([examples[i] for i, _ in mine], shape, sampling, seed)
            texts |= {i: answer.text for (i, real), answer in zip(mine, answers) if real}
        every = {int(i): text for part in gather(texts) for i, text in part.items()}
        return [every[i] for i in range(len(examples))]

    def shape(self, example: Example) -> tuple[int, ...]:
        """What must be equal for examples of one batch: (positions of a row, room for each modality), both rounded up."""
        prompt = encode_prompt(example, template=self.template, tokenizer=self.tokenizer, towers=self.towers)
        counts = rooms(prompt)
        return bucket(len(prompt)), *((n := counts.get(m, 0)) and bucket(n, 1) for m in self.towers)

    def run(self, examples: Sequence[Example], shape: tuple[int, ...], sampling: Sampling, seed: int = 0) -> list[Answer]:
        """Answers to this process's rows of a global batch; all processes call it with the same shape."""
        items = dict(zip(self.towers, shape[1:]))
        batch = prompt_batch(
            examples, template=self.template, tokenizer=self.tokenizer, towers=self.towers, seq_len=shape[0], items=items)
        batch = replace(batch, media={m: x for m, x in batch.media.items() if items[m]})
        hashes = np.stack([id_hash(e.id) for e in examples])
        batch, hashes = jax.tree.map(lambda x: put_rows(x, self.mesh), (batch, hashes))
        with use(self.layout, self.mesh):
            tokens = self.program(self.params, batch, sampling, np.uint32(seed), hashes)
        return [self._answer(row) for row in local_rows(tokens)]

    def _answer(self, row: np.ndarray) -> Answer:
        ends = np.flatnonzero(np.isin(row, self.stops))
        end = ends[0] if len(ends) else len(row)
        text = self.tokenizer.decode(row[:end].tolist(), skip_special_tokens=True).strip()
        return Answer(text=text, num_tokens=min(int(end) + 1, len(row)), stopped=len(ends) > 0)


def bucket(n: int, smallest: int = 16) -> int:
    """The size to which n is padded: a power of two or three quarters of one, so at most a third is padding."""
    size = smallest
    while size < n:
        size *= 2
    return size * 3 // 4 if size > smallest and size % 4 == 0 and n <= size * 3 // 4 else size


def batch_rows(rows: int, mesh: Mesh) -> int:
    """At least so many rows, and as many for each shard of the mesh."""
    shards = row_shards(mesh)
    return max(1, -(-rows // shards)) * shards


def schedule(shapes: Sequence[tuple], rows: int) -> list[tuple[tuple, list[int]]]:
    """Batches of at most `rows` requests of one shape, as (shape, indices); every index is in exactly one of them.

    A pure function of its arguments, so that all hosts make the same one.
    """
    groups: dict[tuple, list[int]] = {}
    for i, shape in enumerate(shapes):
        groups.setdefault(tuple(shape), []).append(i)
    return [(shape, ids[at : at + rows]) for shape, ids in sorted(groups.items()) for at in range(0, len(ids), rows)]


def host_rows(ids: Sequence[int], rows: int, mesh: Mesh) -> list[tuple[int, bool]]:
    """This process's rows of a batch, as (index, whether it answers for it).

    A batch that is not full repeats its first request; of processes that hold the same rows one answers.
    """
    share, hosts = host_share(mesh)
    writer = is_writer(mesh)
    padded = [(i, writer) for i in ids] + [(ids[0], False)] * (rows - len(ids))
    return padded[share * rows // hosts : (share + 1) * rows // hosts]


def place(params: Mapping[str, Any], module: nnx.Module, layout: Layout, mesh: Mesh) -> Params:
    """Parameters on the devices of the mesh, as the layout shards them; those that are there already stay."""
    axes, devices = axes_of(module), set(mesh.devices.flat)

    def put(path: str, x: Any) -> jax.Array:
        if isinstance(x, jax.Array) and set(x.sharding.device_set) == devices:
            return x
        host = np.asarray(x)
        return jax.make_array_from_callback(host.shape, sharding_of_parameter(axes[path], host.shape, layout, mesh), lambda i: host[i])

    return {path: put(path, x) for path, x in params.items()}
