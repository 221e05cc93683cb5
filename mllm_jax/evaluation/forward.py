"""Forward passes of evaluation on a mesh: unit vectors of a dual encoder, and log-likelihoods of a language model.

Each takes this process's rows of a global batch and gives back what it found for them; all processes call
them in the same order with the same shapes.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from mllm_jax.config import ConfigError
from mllm_jax.data.batch import collate, decode_items
from mllm_jax.data.errors import BadExample
from mllm_jax.data.pack import one_row, rooms, row_spec
from mllm_jax.data.templates import Template
from mllm_jax.data.tokenize import encode
from mllm_jax.generate import batch_rows, bucket, host_rows, place
from mllm_jax.hosts import local_rows
from mllm_jax.models.bridge import BridgeConfig
from mllm_jax.models.dual_encoder import DualEncoderConfig
from mllm_jax.models.mllm import MLLMConfig
from mllm_jax.nn.param import abstract, merge, split
from mllm_jax.objectives.cross_entropy import token_log_probs
from mllm_jax.sharding import Layout, put_rows, use
from mllm_jax.sharding import rows as by_rows
from mllm_jax.types import Batch, Example
from mllm_jax.types import Sequence as Tokens


class Forward:
    """A model on a mesh, with functions (model, batch) -> arrays compiled once for each shape of batch."""

    def __init__(self, model: Any, params: Mapping[str, Any], tokenizer: Any, layout: Layout, mesh: Mesh, template: str):
        self.towers, self.tokenizer, self.template = model.inputs, tokenizer, Template(template, tokenizer)
        self.layout, self.mesh = layout, mesh
        module = abstract(model)
        self.graph, self.params = split(module)[0], place(params, module, layout, mesh)

    def compile(self, function: Callable[[Any, Batch], Any], *, replicated: bool = False) -> Callable[[Batch], Any]:
        """Numpy rows of this process -> its rows of the result; of all rows if `replicated`."""
        out = NamedSharding(self.mesh, PartitionSpec()) if replicated else by_rows(self.mesh)
        program = jax.jit(lambda params, batch: function(merge(self.graph, params), batch), out_shardings=out)

        def call(batch: Batch) -> Any:
            with use(self.layout, self.mesh):
                result = program(self.params, jax.tree.map(lambda x: put_rows(x, self.mesh), batch))
            return jax.tree.map(np.asarray if replicated else local_rows, result)

        return call

    def batch(self, sequences: Sequence[Tokens], seq_len: int, items: Mapping[str, int]) -> Batch:
        """One sequence a row, padded at the right; pixels are exact."""
        spec = row_spec(seq_len, items, self.towers, self.tokenizer.pad_token_id)
        rows = [one_row(s, spec) for s in sequences]
        decoded = [decode_items(row.media, self.towers, exact=True) for row in rows]
        for item in (d for row in decoded for d in row):
            if isinstance(item, BadExample):
                raise item
        batch = collate(rows, decoded, spec)
        return replace(batch, media={m: x for m, x in batch.media.items() if spec.media[m].items})


class Embedder(Forward):
    """Unit vectors of images (or another modality) and texts."""

    def __init__(self, model: DualEncoderConfig | BridgeConfig, *args: Any, modality: str = "image", seq_len: int | None = None):
        super().__init__(model, *args)
        if not self.template.pairs:
            raise ConfigError(f"a dual encoder reads pairs, and the template {self.template.name!r} is of conversations; "
                              "name clip or siglip")
        if (seq_len := seq_len or model.text.positions) is None:
            raise ConfigError("the text tower has no table of positions to give the length of a text; pass seq_len")
        self.modality, self.seq_len = modality, seq_len
        self._text = self.compile(lambda m, batch: m.embed_text(batch))
        self._every_text = self.compile(lambda m, batch: m.embed_text(batch), replicated=True)
        self._media = self.compile(lambda m, batch: m.embed_media(modality, batch))

    def texts(self, texts: Sequence[str]) -> np.ndarray:
        """f32[b d] of this process's rows."""
        return self._text(self._pairs([Example(id=text, captions=(text,)) for text in texts], 0))

    def every_text(self, texts: Sequence[str], rows: int) -> np.ndarray:
        """f32[n d] of n texts that all processes know, the same on all of them."""
        rows = min(batch_rows(rows, self.mesh), batch_rows(len(texts), self.mesh))
        out = []
        for at in range(0, len(texts), rows):
            ids = list(range(at, min(at + rows, len(texts))))
            mine = [texts[i] for i, _ in host_rows(ids, rows, self.mesh)]
            out.append(self._every_text(self._pairs([Example(id=t, captions=(t,)) for t in mine], 0))[: len(ids)])
        return np.concatenate(out)

    def media(self, examples: Sequence[Example]) -> np.ndarray:
        """f32[b d], or f32[b n d], of the first medium of each example of this process's rows."""
        # The text goes unused; a pair must have one.
        return self._media(self._pairs([replace(e, captions=("-",), media=e.media[:1]) for e in examples], 1))

    def _pairs(self, examples: Sequence[Example], items: int) -> Batch:
        towers = {self.modality: self.towers[self.modality]}
        sequences = [
            encode(e, template=self.template, tokenizer=self.tokenizer, towers=towers, max_len=self.seq_len) for e in examples]
        return self.batch(sequences, self.seq_len, {m: items if m == self.modality else 0 for m in self.towers})


class Scorer(Forward):
    """Negative log-likelihoods of what an example trains, its answers."""

    def __init__(self, model: MLLMConfig, *args: Any):
        super().__init__(model, *args)

        def nll(m: Any, batch: Batch) -> tuple[jax.Array, jax.Array]:
            out = m(batch)
            logp = token_log_probs(out.hidden, out.unembed, batch.targets)
            weights = batch.weights.astype(jnp.float32)
            return -jnp.sum(logp * weights, axis=1), jnp.sum(weights, axis=1)

        self._nll = self.compile(nll)

    def encode(self, example: Example) -> Tokens:
        return encode(example, template=self.template, tokenizer=self.tokenizer, towers=self.towers)

    def shape(self, example: Example) -> tuple[int, ...]:
        tokens = self.encode(example)
        counts = rooms(tokens)
        return bucket(len(tokens)), *((n := counts.get(m, 0)) and bucket(n, 1) for m in self.towers)

    def nll(self, examples: Sequence[Example], shape: tuple[int, ...]) -> tuple[np.ndarray, np.ndarray]:
        """(sum of weight times nll f32[b], sum of weights f32[b]) of this process's rows."""
        batch = self.batch([self.encode(e) for e in examples], shape[0], dict(zip(self.towers, shape[1:], strict=True)))
        return self._nll(batch)
