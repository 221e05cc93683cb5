"""Floating point operations of a training step, counted from the images and tokens really present.

A matmul of n weights does, for each token it reads,

    2 n     forward
    2 n     for the gradient of its weights, if they train
    2 n     for the gradient of its input, if something before it trains

so 6 where all trains, 4 where frozen weights pass gradients, 2 where they do not; and 4 for the first of the
trained layers, which passes none.  Attention counts visible pairs only, the output matrix supervised
positions only, an encoder the layers that it runs.  Norms, activations, the optimizer, padding and what is
recomputed (rematerialization) do not count: this is the work that the model asks for.

Arithmetic on configurations; no array is made.  A new kind of part is a row in PARTS, of layer in LAYERS, a
connector one in flops_connectors.py.
"""

from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import field, replace
from fnmatch import fnmatch
from math import prod
from typing import Any

from mllm_jax.connectors.pool import NestedConfig
from mllm_jax.decoders.expert import ExpertLayer
from mllm_jax.decoders.layers import Layer
from mllm_jax.decoders.transformer import DecoderConfig
from mllm_jax.encoders.native import NativeViTConfig
from mllm_jax.encoders.vit import ViTConfig
from mllm_jax.models.bridge import BridgeConfig
from mllm_jax.models.dual_encoder import DualEncoderConfig
from mllm_jax.models.mllm import MLLMConfig
from mllm_jax.nn.block_config import BlockConfig
from mllm_jax.nn.lora import LoRA
from mllm_jax.nn.moe import MoEConfig
from mllm_jax.train.flops_connectors import CONNECTORS, former
from mllm_jax.train.matmul import Matmul, Product, Trains
from mllm_jax.types import record


@record
class Counts:
    """What a step reads, over all hosts."""

    rows: float = 0                     # rows that hold an example
    tokens: float = 0                   # positions that are not padding
    squares: float = 0                  # sum over packed examples of length^2
    trained: float = 0                  # positions with a weight in the loss
    media: float = 0                    # of the tokens, those of media; told by the items
    items: Mapping[str, float] = field(default_factory=dict)    # modality -> media items, or patches where the layout is packed
    pairs: Mapping[str, float] = field(default_factory=dict)    # packed modality -> sum over frames of patches^2


def full_counts(rows: int, spec: Any, towers: Mapping[str, Any]) -> Counts:
    """Of so many rows (pack.RowSpec), each one example that fills it, with all the media it has room for, trained wherever it may be."""
    n, items = rows * spec.seq_len, {m: room.items * rows for m, room in spec.media.items()}
    return Counts(rows=rows, tokens=n, squares=n * spec.seq_len, trained=rows * (spec.trained or spec.seq_len), items=items,
                  pairs={m: k * prod(towers[m].nominal.grid) for m, k in items.items()})


def step_flops(model: Any, trained: Collection[str], counts: Counts) -> float:
    """Floating point operations of one step forward and backward, of all devices together.

    `trained` are the paths of the parameters that train, for example the keys of the trained dictionary.
    Raises KeyError if a part of the model is of a kind that is not in PARTS.
    """
    return sum(flops_by_part(model, trained, counts).values())


def flops_by_part(model: Any, trained: Collection[str], counts: Counts) -> dict[str, float]:
    """The same, for each part of the model in the order of execution, e.g. {"inputs/image/encoder": ...}."""
    trained = frozenset(trained)
    lora = model if isinstance(model, LoRA) else None
    plain = lora.model if lora else model
    # Every prefix of a trained path, so that "does anything below this train" is one look-up.
    learning = {path.rsplit("/", n)[0] for path in trained for n in range(path.count("/") + 1)}
    out: dict[str, float] = {}
    for part, passes, products in PARTS[type(plain)](plain, counts, learning.__contains__):
        out.setdefault(part, 0.0)
        for m in products:
            back = passes or m.after in learning
            if not m.path:                                          # activations with activations: both get a gradient
                out[part] += 2 * m.inputs * m.outputs * m.times * (3 if back else 1)
                continue
            out[part] += 2 * m.inputs * m.outputs * m.times * (1 + (m.path in trained) + back)
            layer = m.path.removesuffix("/kernel")
            if lora and layer != m.path and any(fnmatch(layer, target) for target in lora.targets):
                a, b = (f"{layer}/lora/{x}" in trained for x in "ab")
                out[part] += 2 * m.inputs * lora.rank * m.times * (1 + a + back)
                out[part] += 2 * lora.rank * m.outputs * m.times * (1 + b + (a or back))
    return out


def _block(
    cfg: BlockConfig, path: str, layers: float, tokens: float, pairs: float, *, moe: MoEConfig | None = None, after: str = "",
) -> list[Matmul]:
    """A stack of transformer layers at `path`: so many layers, tokens and visible pairs in each layer.

    Of experts those count that a token chooses, whether or not they have room for it.
    """
    after = after or path
    d, h, g = cfg.width, cfg.heads, cfg.kv_heads or cfg.heads
    k, n = cfg.head_dim or d // h, layers * tokens
    heads = {"q": (d, h * k), "k": (d, g * k), "v": (d, g * k), "o": (h * k, d)}
    wide = {"gate": (d, cfg.mlp)} if cfg.gated else {}
    wide |= {"up": (d, cfg.mlp), "down": (cfg.mlp, d)}
    uses, mlp = (1, "mlp") if moe is None else (moe.top_k, "mlp/experts")
    named = [(f"attn/{x}", s, n) for x, s in heads.items()] + [(f"{mlp}/{x}", s, n * uses) for x, s in wide.items()]
    out = [Matmul(path=f"{path}/{x}/kernel", inputs=i, outputs=o, times=times, after=after) for x, (i, o), times in named]
    if moe is not None:
        out += [Matmul(path=f"{path}/mlp/router", inputs=d, outputs=moe.experts, times=n, after=after),
                Matmul(path="", inputs=uses, outputs=d, times=n, after=after)]      # the weighted sum of what they give
    # Scores and their product with the values: 2 k operations for each pair and head, twice.
    return [*out, Matmul(path="", inputs=2 * k, outputs=h, times=layers * pairs, after=after)]


def _vit(cfg: ViTConfig, path: str, items: float, depth: int, pooled: bool, trains: Trains) -> Iterator[Product]:
    patches = cfg.grid**2
    n = patches + cfg.class_token
    at = lambda x: f"{path}/{x}"
    yield path, False, [Matmul(path=at("patch/kernel"), inputs=cfg.patch_dim, outputs=cfg.width, times=items * patches)]
    passes = any(trains(at(x)) for x in ("patch", "class_token", "position", "pre_norm"))
    yield path, passes, _block(cfg, at("blocks/0"), depth, items * n, items * n * n)
    if pooled and cfg.pool == "map":
        passes = passes or trains(at("blocks")) or trains(at("norm"))
        one, many = _block(cfg, at("pool"), 1, items, items * n), ("k/kernel", "v/kernel")
        pool = [Matmul(**{**vars(m), "times": items * n}) if m.path.endswith(many) else m for m in one]
        # Keys and values read the patches, whose gradient is wanted only where something before them trains.
        yield path, passes, [Matmul(**{**vars(m), "after": ""}) if m.path.endswith(many) else m for m in pool]


def _native(cfg: NativeViTConfig, path: str, patches: float, pairs: float, trains: Trains) -> Iterator[Product]:
    """Patches that are there, with those of their own frame, or of a window, which is counted whole where it is cut off."""
    yield path, False, [Matmul(path=f"{path}/patch/kernel", inputs=cfg.patch_dim, outputs=cfg.width, times=patches)]
    passes, wide = trains(f"{path}/patch") or trains(f"{path}/position"), cfg.depth if cfg.window is None else len(cfg.full)
    near = min(pairs, patches * cfg.window**2) if cfg.window else pairs
    pairs = (wide * pairs + (cfg.depth - wide) * near) / cfg.depth
    yield path, passes, _block(cfg, f"{path}/blocks/0", cfg.depth, patches, pairs)


@record
class Beside:
    """Media tokens that layers read beside the rows."""

    tokens: float = 0
    each: float = 0                     # of one item, which is what a position sees
    learns: bool = False                # their gradient is wanted


def _decoder(
    cfg: DecoderConfig, path: str, passes: bool, counts: Counts, trains: Trains, memory: Beside = Beside(),
) -> Iterator[Product]:
    passes = passes or any(trains(f"{path}/{x}") for x in ("embedding", "position"))
    for j, layer in enumerate(cfg.cycle):
        layers = len(range(j, cfg.depth, len(cfg.cycle)))
        if getattr(layer, "reads", None) is not None:
            at, keys = f"{path}/blocks/{j}/reads", ("attn/k/kernel", "attn/v/kernel")
            whole = _block(layer.reads.block, at, layers, counts.tokens, counts.tokens * memory.each, after=f"{path}/blocks")
            yield path, passes, [m for m in whole if not m.path.endswith(keys)]
            yield path, memory.learns, [
                Matmul(path=m.path, inputs=layer.reads.width, outputs=m.outputs, times=layers * memory.tokens)
                for m in whole if m.path.endswith(keys)]
        yield path, passes, LAYERS[type(layer)](cfg, layer, f"{path}/blocks/{j}", layers, counts, f"{path}/blocks")
    if cfg.head != "none":
        passes = passes or trains(f"{path}/blocks") or trains(f"{path}/norm")
        old, new = ("head", "head_added") if cfg.head in ("own", "biased") else ("embedding/table", "embedding/added")
        yield path, passes, [Matmul(path=f"{path}/{matrix}", inputs=cfg.width + (cfg.head == "biased"), outputs=n, times=counts.trained)
                             for matrix, n in ((old, cfg.vocab - cfg.added), (new, cfg.added))]


def _layer(cfg: DecoderConfig, layer: Layer, path: str, layers: float, counts: Counts, after: str) -> list[Matmul]:
    return _block(cfg, path, layers, counts.tokens, _pairs(cfg, layer.window, counts), moe=layer.mlp, after=after)


def _expert_layer(cfg: DecoderConfig, layer: ExpertLayer, path: str, layers: float, counts: Counts, after: str) -> list[Matmul]:
    """What a position asks for: one set of weights, though both are applied to it."""
    media = min(counts.media, counts.tokens)
    text = _block(cfg, path, layers, counts.tokens - media, _pairs(cfg, layer.window, counts), after=after)
    return text + _block(cfg, f"{path}/expert", layers, media, 0, after=after)


LAYERS: dict[type, Callable] = {Layer: _layer, ExpertLayer: _expert_layer}


def _pairs(cfg: DecoderConfig, window: int | None, counts: Counts) -> float:
    """Visible pairs of a layer; with a window those of examples as long as a position's is on average.

    What media tokens see of one another ahead (`sees`) is not counted.
    """
    if not cfg.causal:
        return counts.squares
    length = counts.squares / counts.tokens if counts.tokens else 0
    if window is None or length <= window:
        return (counts.squares + counts.tokens) / 2
    return counts.tokens * (window - window * (window - 1) / (2 * length))


def _mllm(cfg: MLLMConfig, counts: Counts, trains: Trains) -> Iterator[Product]:
    learns, media, memory = False, 0.0, Beside()
    for modality, tower in cfg.inputs.items():
        items, encoder, path = counts.items.get(modality, 0), tower.encoder, f"inputs/{modality}"
        if tower.view.packed:
            yield from PARTS[type(encoder)](encoder, f"{path}/encoder", items, counts.pairs.get(modality, 0), trains)
        else:
            yield from PARTS[type(encoder)](encoder, f"{path}/encoder", items, encoder.run_depth, False, trains)
        beside, each = tower.route == "memory", prod(encoder.num_tokens(tower.nominal.grid))
        tokens = items if tower.view.packed else items * each
        below = trains(f"{path}/encoder")
        yield from PARTS[type(tower.connector)](
            tower.connector, f"{path}/connector", encoder.width, cfg.decoder.memory_width if beside else cfg.decoder.width,
            tokens, below, trains)
        learns = learns or below or trains(f"{path}/connector")
        made = prod(tower.num_tokens(tower.nominal.grid))
        if beside:
            memory = Beside(tokens=items * made, each=made, learns=below or trains(f"{path}/connector"))
        media += 0 if beside else tokens * made / each
    for reading in _readings(cfg, replace(counts, media=media)):
        yield from PARTS[type(cfg.decoder)](cfg.decoder, "decoder", learns, reading, trains, memory)


def _readings(cfg: MLLMConfig, counts: Counts) -> list[Counts]:
    """What the decoder reads, once for each set where the tokens of a medium are nested (objectives/nested.py)."""
    for modality, tower in cfg.inputs.items():
        if isinstance(tower.connector, NestedConfig) and counts.tokens:
            full, *fewer = (side**2 for side in tower.connector.sides)
            less = [counts.items.get(modality, 0) * (full - size) / counts.tokens for size in fewer]
            return [counts, *(
                replace(counts, tokens=counts.tokens * (1 - part), squares=counts.squares * (1 - part) ** 2,
                        media=counts.media - counts.tokens * part) for part in less)]
    return [counts]


def _dual_encoder(cfg: DualEncoderConfig, counts: Counts, trains: Trains) -> Iterator[Product]:
    """Towers, projections, and the similarities of every row with every other."""
    def projected(modality: str, path: str, width: int, n: float) -> Iterator[Product]:
        if modality in cfg.project:
            yield f"project/{modality}", trains(path), [
                Matmul(path=f"project/{modality}/kernel", inputs=width, outputs=cfg.dim, times=n)]

    for modality, tower in cfg.inputs.items():
        path, items = f"inputs/{modality}", counts.items.get(modality, 0)
        yield from PARTS[type(tower.encoder)](tower.encoder, path, items, tower.encoder.depth, True, trains)
        yield from projected(modality, path, tower.encoder.width, items)
    yield from PARTS[type(cfg.text)](cfg.text, "text", False, counts, trains)
    yield from projected("text", "text", cfg.text.width, counts.rows)
    towers = {"text": "text"} | {m: f"inputs/{m}" for m in cfg.inputs}
    sides = sum(trains(path) or trains(f"project/{m}") for m, path in towers.items())
    # Each side that trains wants a gradient of its own.
    width = cfg.dim * (1 + sides)
    yield "similarity", False, [Matmul(path="", inputs=width, outputs=counts.rows, times=counts.rows)]


def _bridge(cfg: BridgeConfig, counts: Counts, trains: Trains) -> Iterator[Product]:
    """Two passes through the Q-Former: the caption twice behind the queries, and three pairs of an image and a text."""
    [(modality, tower)] = cfg.inputs.items()
    items, encoder, former_cfg, path = counts.items.get(modality, 0), tower.encoder, tower.connector, f"inputs/{modality}"
    yield from PARTS[type(encoder)](encoder, f"{path}/encoder", items, encoder.run_depth, False, trains)
    passes, n, w, tokens = trains(f"{path}/encoder"), former_cfg.queries, former_cfg.width, counts.tokens
    common = {"passes": passes, "trains": trains}
    causal = (counts.squares + tokens) / 2 + n * tokens
    both = items * n**2 + counts.squares + 2 * n * tokens
    yield from former(former_cfg, f"{path}/connector", encoder.width, items=items, text=2 * tokens,
                      pairs=items * n**2 + counts.squares + causal, **common)
    yield from former(former_cfg, f"{path}/connector", encoder.width, items=3 * items, text=3 * tokens, pairs=3 * both, **common)
    after = passes or trains(f"{path}/connector")
    heads = {f"{path}/connector/out": (w, cfg.dim, items * n), "text": (w, cfg.dim, counts.rows), "match": (w, 2, 3 * items * n)}
    if cfg.captions:
        heads |= {"caption/dense": (w, w, tokens)}
        table = Matmul(path=f"{path}/connector/former/embedding/table", inputs=w, outputs=cfg.text.vocab, times=counts.trained)
        yield "caption", after or trains("caption"), [table]
    for part, (i, o, times) in heads.items():
        yield part.removesuffix("/out").removesuffix("/dense"), after, [Matmul(path=f"{part}/kernel", inputs=i, outputs=o, times=times)]
    yield "similarity", after, [Matmul(path="", inputs=cfg.dim, outputs=n * counts.rows, times=counts.rows)]


PARTS: dict[type, Callable] = {
    BridgeConfig: _bridge,
    MLLMConfig: _mllm,
    DualEncoderConfig: _dual_encoder,
    ViTConfig: _vit,
    NativeViTConfig: _native,
    DecoderConfig: _decoder,
    **CONNECTORS,
}
