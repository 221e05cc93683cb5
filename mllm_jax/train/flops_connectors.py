"""Matmuls of connectors, for the count of operations in flops.py.

A function of CONNECTORS is given the configuration, its path, the widths before and after it, the tokens of all items
that enter, whether they carry a gradient, and what trains.  Pooling and interpolation are not counted: they are means.
"""

from collections.abc import Callable, Iterator
from itertools import pairwise
from typing import Any

from mllm_jax.connectors.conv import CAbstractorConfig, LDPConfig, LDPv2Config, eighths
from mllm_jax.connectors.deformable import DAbstractorConfig
from mllm_jax.connectors.glu import GLUConfig
from mllm_jax.connectors.merge import MergeConfig
from mllm_jax.connectors.mlp import MLPConfig
from mllm_jax.connectors.pool import NestedConfig, PoolConfig
from mllm_jax.connectors.qformer import QFormerConfig
from mllm_jax.connectors.resampler import PerceiverConfig, SincosResamplerConfig
from mllm_jax.connectors.shuffle import ShuffleConfig
from mllm_jax.train.matmul import Matmul, Product, Trains

Sizes = dict[str, tuple[float, float, float]]       # path of a layer -> (inputs, outputs, times)


def products(path: str, sizes: Sizes, passes: bool, scores: tuple[tuple[float, float, float], ...] = ()) -> Iterator[Product]:
    """The first layer reads what enters; the others, and products of activations, stand after weights of the connector."""
    after = ""
    for name, (inputs, outputs, times) in sizes.items():
        yield path, passes, [Matmul(path=f"{path}/{name}/kernel", inputs=inputs, outputs=outputs, times=times, after=after)]
        after = path
    if scores:
        yield path, passes, [Matmul(path="", inputs=i, outputs=o, times=n, after=path) for i, o, n in scores]


def _mlp(cfg: MLPConfig, path: str, d_in: int, d_out: int, tokens: float, passes: bool, trains: Trains) -> Iterator[Product]:
    widths = [d_in] + [d_out] * cfg.depth
    for i, (a, b) in enumerate(pairwise(widths)):
        yield path, passes, [Matmul(path=f"{path}/layers/{i}/kernel", inputs=a, outputs=b, times=tokens)]
        passes = passes or trains(f"{path}/layers/{i}")


def _glu(cfg: GLUConfig, path: str, d_in: int, d: int, tokens: float, passes: bool, trains: Trains) -> Iterator[Product]:
    sizes: Sizes = {"proj": (d_in, d, tokens), "mlp/gate": (d, cfg.hidden, tokens), "mlp/up": (d, cfg.hidden, tokens),
                    "mlp/down": (cfg.hidden, d, tokens)}
    yield from products(path, sizes, passes)


def _pool(cfg: PoolConfig, path: str, d_in: int, d_out: int, tokens: float, passes: bool, trains: Trains) -> Iterator[Product]:
    for part, n in ((cfg.before, tokens), (cfg.after, tokens * cfg.to**2 / cfg.grid**2)):
        if part is not None:
            at = f"{path}/{'before' if part is cfg.before else 'after'}"
            for _, back, matmuls in CONNECTORS[type(part)](part, at, d_in, d_out, n, passes, trains):
                yield path, back, matmuls
            d_in, passes = d_out, passes or trains(at)


def _shuffle(cfg: ShuffleConfig, path: str, d_in: int, d_out: int, tokens: float, passes: bool, trains: Trains) -> Iterator[Product]:
    square = cfg.side**2
    passes = passes or trains(f"{path}/mlp/norm")
    for _, back, matmuls in _mlp(cfg.mlp, f"{path}/mlp", d_in * square, d_out, tokens / square, passes, trains):
        yield path, back, matmuls


def _c_abstractor(cfg: CAbstractorConfig, path: str, d_in: int, d_out: int, tokens: float, passes: bool, trains: Trains):
    w, items = cfg.width, tokens / cfg.grid**2
    few, sizes = items * cfg.to**2, {}
    for stage, d_stage, n in (("before", d_in, tokens), ("after", w, few)):
        for block, d, layers in (("first", d_stage, 1), ("blocks/0", w, cfg.depth - 1)):
            at, n_, items_ = f"{stage}/{block}", n * layers, items * layers
            sizes |= {f"{at}/conv1": (d, w, n_), f"{at}/conv2": (9, w, n_), f"{at}/conv3": (w, w, n_),
                      f"{at}/excite/down": (w, round(d / 4), items_), f"{at}/excite/up": (round(d / 4), w, items_)}
            sizes |= {f"{at}/shortcut": (d, w, n_)} if d != w else {}
    yield from products(path, sizes, passes or trains(f"{path}/position"))
    for _, _, matmuls in _mlp(cfg.readout, f"{path}/readout", w, d_out, few, True, trains):
        yield path, passes or trains(path), matmuls


def _ldp(cfg: LDPConfig, path: str, d_in: int, d: int, tokens: float, passes: bool, trains: Trains) -> Iterator[Product]:
    items, hidden = tokens / cfg.grid**2, eighths(d // 4)
    sizes: Sizes = {"mlp/layers/0": (d_in, d, tokens), "mlp/layers/1": (d, d, tokens)}
    for block, n in (("mix", tokens), ("halve", items * (-(-cfg.grid // 2)) ** 2)):
        sizes |= {f"{block}/depthwise": (9, d, n), f"{block}/excite/down": (d, hidden, items),
                  f"{block}/excite/up": (hidden, d, items), f"{block}/pointwise": (d, d, n)}
    yield from products(path, sizes, passes)


def _ldp_v2(cfg: LDPv2Config, path: str, d_in: int, d: int, tokens: float, passes: bool, trains: Trains) -> Iterator[Product]:
    few = tokens / cfg.grid**2 * cfg.to**2
    yield from products(path, {"mlp/layers/0": (d_in, d, tokens), "mlp/layers/1": (d, d, tokens), "position": (9, d, few)}, passes)


def _merge(cfg: MergeConfig, path: str, d_in: int, d_out: int, tokens: float, passes: bool, trains: Trains) -> Iterator[Product]:
    square = cfg.side**2
    for merger, n in (("merger", tokens), ("deep", tokens * cfg.deep)):
        wide, few = d_in * square, n / square
        sizes: Sizes = {f"{merger}/up": (wide, wide, few), f"{merger}/down": (wide, d_out, few)}
        yield from products(path, sizes if n else {}, passes or trains(f"{path}/{merger}/norm"))


def _perceiver(cfg: PerceiverConfig, path: str, d: int, d_out: int, tokens: float, passes: bool, trains: Trains) -> Iterator[Product]:
    items = tokens / ((cfg.grid**2 + cfg.class_token) * (cfg.frames or 1))
    queries, inner, layers = items * cfg.queries, cfg.heads * cfg.head_dim, cfg.depth
    seen, wide = (tokens + queries) * layers, cfg.expand * d
    sizes: Sizes = {f"attn/{x}": (d, inner, n) for x, n in (("k", seen), ("v", seen), ("q", queries * layers))}
    sizes |= {"attn/o": (inner, d, queries * layers), "up": (d, wide, queries * layers), "down": (wide, d, queries * layers)}
    sizes = {f"blocks/0/{k}": v for k, v in sizes.items()} | ({"out": (d, d_out, queries)} if d_out != d else {})
    # Keys of a layer after the first carry the gradient of the queries among them.
    yield from products(path, sizes, passes or trains(path), ((2 * cfg.head_dim, cfg.heads, cfg.queries * seen),))


def _sincos(cfg: SincosResamplerConfig, path: str, d_in: int, d_out: int, tokens: float, passes: bool, trains: Trains):
    w, queries = cfg.width, tokens / cfg.grid**2 * cfg.to**2
    sizes: Sizes = {"fit": (d_in, w, tokens)} if d_in != w else {}
    passes = passes or ("fit" not in sizes and trains(path))        # then a norm comes first
    sizes |= {"attn/k": (w, w, tokens), "attn/v": (w, w, tokens), "attn/o": (w, w, queries)}
    # Queries are learned: no gradient goes through them to the encoder.
    yield from products(path, {"attn/q": (w, w, queries)}, trains(path))
    yield from products(path, sizes | {"out": (w, d_out, queries)}, passes, ((2 * w, 1, cfg.to**2 * tokens),))


def _d_abstractor(cfg: DAbstractorConfig, path: str, d_in: int, d_out: int, tokens: float, passes: bool, trains: Trains):
    w, h, p, layers, few = cfg.width, cfg.heads, cfg.points, cfg.depth, tokens / cfg.grid**2 * cfg.to**2
    sizes: Sizes = {f"attn/{x}": (w, w, few * layers) for x in "qkvo"}
    sizes |= {"look/v": (w, w, tokens * layers), "look/offsets": (w, 2 * h * p, few * layers), "look/weights": (w, h * p, few * layers),
              "look/o": (w, w, few * layers), "up": (w, cfg.mlp, few * layers), "down": (cfg.mlp, w, few * layers)}
    sizes = ({"fit": (d_in, w, tokens)} if d_in != w else {}) | {f"blocks/0/{k}": v for k, v in sizes.items()}
    # A point is a mean of four patches; that the program looks by a matrix is its own affair.
    scores = ((2 * w, 1, cfg.to**2 * few * layers), (4 * p, w, few * layers))
    passes = passes or (d_in == w and trains(path))
    yield from products(path, sizes | ({"out": (w, d_out, few)} if d_out != w else {}), passes, scores)


def _qformer(cfg: QFormerConfig, path: str, d_in: int, d_out: int, tokens: float, passes: bool, trains: Trains) -> Iterator[Product]:
    """The text of every item counts as if it were full."""
    items, text = tokens / cfg.tokens, cfg.words.length if cfg.words else 0
    pairs = items * (cfg.queries + text) ** 2
    yield from former(cfg, path, d_in, items=items, text=items * text, pairs=pairs, passes=passes, trains=trains)
    yield path, passes or trains(f"{path}/former"), [
        Matmul(path=f"{path}/out/kernel", inputs=cfg.width, outputs=d_out, times=items * cfg.queries)]


def former(
    cfg: QFormerConfig, path: str, d_in: int, *, items: float, text: float, pairs: float, passes: bool, trains: Trains,
) -> Iterator[Product]:
    """A pass of the queries of all items and so many tokens of text, of which so many pairs see one another."""
    w, queries, heads = cfg.width, items * cfg.queries, cfg.heads
    for j, reads in enumerate(cfg.cycle):
        layers = len(range(j, cfg.depth, len(cfg.cycle)))
        at = lambda name, j=j: f"former/blocks/{j}/{name}"
        sizes: Sizes = {at(f"attn/{x}"): (w, w, (queries + text) * layers) for x in "qkvo"}
        sizes |= {at("mlp/up"): (w, cfg.mlp, queries * layers), at("mlp/down"): (cfg.mlp, w, queries * layers)}
        if text:
            sizes |= {at("text_mlp/up"): (w, cfg.mlp, text * layers), at("text_mlp/down"): (cfg.mlp, w, text * layers)}
        if reads:
            sizes |= {at("cross/q"): (w, w, queries * layers), at("cross/o"): (w, w, queries * layers)}
        seen = (pairs + (items * cfg.queries * cfg.tokens if reads else 0)) * layers
        # Queries and words are learned: what reads them passes gradients on.
        yield from products(path, sizes, passes or trains(f"{path}/former"), ((2 * w / heads, heads, seen),))
        if reads:                       # what is read carries a gradient where the encoder trains
            yield path, passes, [Matmul(path=f"{path}/{at(f'cross/{x}')}/kernel", inputs=d_in, outputs=w, times=items * cfg.tokens * layers)
                                 for x in "kv"]


CONNECTORS: dict[type, Callable[[Any, str, int, int, float, bool, Trains], Iterator[Product]]] = {
    MLPConfig: _mlp,
    NestedConfig: _mlp,
    PoolConfig: _pool,
    CAbstractorConfig: _c_abstractor,
    DAbstractorConfig: _d_abstractor,
    GLUConfig: _glu,
    LDPConfig: _ldp,
    LDPv2Config: _ldp_v2,
    MergeConfig: _merge,
    PerceiverConfig: _perceiver,
    ShuffleConfig: _shuffle,
    SincosResamplerConfig: _sincos,
    QFormerConfig: _qformer,
}
