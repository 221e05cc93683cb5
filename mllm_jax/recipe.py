"""A published system: its model, and the stages that trained it."""

from collections.abc import Mapping
from dataclasses import field, replace
from typing import Any

from mllm_jax.config import ConfigError, config, nearest


@config
class Optimizer:
    """What every optimizer has; `Adam`, `Lion`, `Adafactor` and `SGD` say which update is made of the gradient."""

    lr: float                           # peak learning rate
    warmup: float = 0.03                # linear warm-up: part of the steps if below 1, otherwise steps
    schedule: str = "cosine"            # after the warm-up: "cosine", "linear", "constant" or "rsqrt"
    end: float = 0.0                    # learning rate at the end, as a part of the peak
    clip: float | None = 1.0            # largest global norm of the gradient
    weight_decay: float = 0.0           # decoupled; never on biases, norms, scales and gates
    decays: tuple[str, ...] = ("*",)    # globs over the parameter paths that it reaches
    lr_scale: Mapping[str, float] = field(default_factory=dict)     # glob over parameter paths -> factor


@config
class Adam(Optimizer):
    """AdamW (arXiv:1711.05101)."""

    b1: float = 0.9
    b2: float = 0.999
    eps: float = 1e-8


@config
class Lion(Optimizer):
    """Lion (arXiv:2302.06675)."""

    b1: float = 0.9
    b2: float = 0.99


@config
class Adafactor(Optimizer):
    """Adafactor (arXiv:1804.04235): factored second moments whose decay is 1 - step^-decay_rate, momentum `b1` or none."""

    b1: float | None = None
    decay_rate: float = 0.8


@config
class SGD(Optimizer):
    momentum: float = 0.0


@config
class Data:
    """What a stage reads, and how rows are made of it."""

    sources: Mapping[str, float]        # data set (a name of data/datasets.py, or "format:path") -> sampling weight
    batch_size: int                     # rows of the global batch
    seq_len: int                        # positions of a row
    template: str = "plain"             # chat format, a name of data/templates.py; "tokenizer": the tokenizer's own
    items: Mapping[str, int] = field(default_factory=dict)   # modality -> room of a row: tiles, or patches if packed; default: one medium
    trained: int | None = None          # most trained positions of a row: logits are computed of so many.  None: any number, of all
    pack: bool = True                   # several examples in a row; pairs (contrastive) are never packed
    overlong: str = "raise"             # an example longer than a row: "raise", "drop", or "truncate" its text at the end
    on_bad_example: str = "raise"       # an example that cannot be read: "raise" or "skip" (counted)
    reduction: str = "token"            # what counts alike in the loss: each "token", each "example", or n tokens as their "root"
    augment: tuple[Any, ...] = ()       # changes of the media, keyed by the id of the example
    seed: int = 0
    workers: int = 0                    # processes that read, for each shard
    shards: int | None = None           # parts of the stream, which fix its order on any hosts; None: as many as hosts when it begins


@config
class LowRank:
    """Adapters instead of training whole matrices (LoRA, arXiv:2106.09685); with rank 0 there are none."""

    rank: int = 0
    alpha: float | None = None          # None: twice the rank
    parts: tuple[str, ...] = ("decoder",)   # subtrees whose linear layers get adapters, and of which nothing else trains
    layers: tuple[str, ...] = ("*",)    # globs below a part: which of its linear layers, such as "*/attn/*"


@config
class Stage:
    data: Data
    objectives: Mapping[str, Any]
    optimizer: Optimizer
    steps: int
    train: tuple[str, ...] = ("*",)     # globs over parameter paths; the rest is frozen
    model: Any = None                   # None: the model of the recipe
    weights: Mapping[str, str] = field(default_factory=dict)   # subtree -> hf://, a folder, stage://, recipe://, copy://
    lora: LowRank = LowRank()
    ema: float | None = None            # decay of a moving average of the trained parameters
    evals: Mapping[str, Any] = field(default_factory=dict)     # name -> evaluation/tasks.py value, run after the stage


@config
class Recipe:
    paper: str
    model: Any
    stages: Mapping[str, Stage]         # in order
    tokenizer: str = "bytes"            # hf://name, a folder, "bytes", or "bpe:SIZE" trained on the recipe's own text
    params: float | None = None         # published size, checked by a test
    samples: int = 8                    # generated after the last stage and shown in the report

    def tiny(self) -> "Recipe":
        """The same system small enough for a laptop: same code paths, small widths, data that is already here."""
        stages = {name: _tiny_stage(stage, stage.model or self.model) for name, stage in self.stages.items()}
        return replace(self, model=self.model.tiny(), stages=stages, tokenizer="bytes", params=None)

    def stage_name(self, name: str | None = None, called: str = "the recipe") -> str:
        """The name, or that of the last stage for None; raises ConfigError if there is no such stage."""
        name = name or list(self.stages)[-1]
        if name not in self.stages:
            raise ConfigError(f"{called} has no stage {name!r}; nearest: {nearest(name, self.stages)}")
        return name


BUILT_IN = ("shapes", "digits")         # data that needs no files


def _tiny_stage(stage: Stage, model: Any) -> Stage:
    """Sources that need files become the built-in scenes of shapes; weights that must be downloaded are left out."""
    local = {k: v for k, v in stage.weights.items() if v.startswith(("stage://", "copy://"))}
    here = {name: weight for name, weight in stage.data.sources.items() if name.startswith(BUILT_IN)}
    # Bytes are tokens in a tiny recipe, and a system prompt alone has 150 of them; a caption of pairs is cut.
    seq_len = 320 if hasattr(model, "decoder") else stage.data.seq_len
    items = {m: min(n, 4 * model.tiny().inputs[m].room) for m, n in stage.data.items.items()}
    data = replace(stage.data, sources=here or {"shapes": 1.0}, batch_size=8, seq_len=seq_len, items=items,
                   trained=stage.data.trained and seq_len)
    return replace(stage, model=stage.model and stage.model.tiny(), steps=20, data=data, weights=local,
                   evals={name: task.tiny() for name, task in stage.evals.items()})
