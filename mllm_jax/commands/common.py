"""What several verbs share: their options, starting the machine, and opening a trained model."""

import argparse
import re
from pathlib import Path
from typing import Any

from mllm_jax.config import ConfigError

LAYOUT_HELP = "how programs are laid out: auto, cpu-8, v5e-256, ..., or a file of plan --search; v5e-8:microbatches=4 changes fields"


def add_layout(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--layout", default="auto", metavar="NAME", help=LAYOUT_HELP)


def add_data_root(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--data-root", type=Path, metavar="DIR", help="folder that paths of data sets begin at (default: here)")


def add_model(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", metavar="RUN_OR_FOLDER", help="a run (runs/first-digits) or a Hugging Face folder")


def add_changes(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--set", action="append", default=[], metavar="path.to.field=value", dest="changes",
                        help="read the same weights with another value, such as inputs.image.view.size=448; repeat for more")


def start(args: argparse.Namespace, platform: str | None = None) -> tuple[Any, Any]:
    """(the runtime, the layout) of this process; nothing may have imported jax before."""
    from mllm_jax.launch import runtime

    name = getattr(args, "layout", "auto")
    devices = runtime.pretended_devices(name)
    running = runtime.start("cpu" if devices else platform, verbose=args.verbose, cpu_devices=devices or 1)

    import jax

    return running, find_layout(name, jax.default_backend())


def find_layout(name: str, platform: str) -> Any:
    """The layout of that name, its words checked: tracing would refuse them only after the data are read, or machines rented."""
    from mllm_jax.launch import layouts
    from mllm_jax.nn import quantized
    from mllm_jax.nn.remat import policy

    layout = layouts.find(name, platform)
    policy(layout.remat)
    quantized.check(layout.quantize)
    return layout


def overrides_of(args: argparse.Namespace) -> list[str]:
    """The changes of the recipe: those that belong to its layout, where that is a file, and then the user's."""
    from mllm_jax.launch import layouts

    return [*layouts.overrides(args.layout, args.recipe), *args.overrides]


def run_name(recipe: str, *, tiny: bool) -> str:
    """`projector/llava_15:size=13b` -> `projector-llava_15-size-13b`, the folder of a run."""
    name = recipe.removeprefix("configs/").removesuffix(".py")
    return re.sub(r"[/:=,]", "-", name) + ("-tiny" if tiny else "")


def is_run(folder: Path) -> bool:
    return (folder / "recipe.json").exists()


def open_model(source: str, layout: Any, changes: list[str] = ()) -> tuple[Any, Any, dict, Any]:
    """(recipe or None, model config, parameters, tokenizer) of a run folder or of a Hugging Face folder or name.

    `changes` of the model's configuration, written path.to.field=value, are those that leave its parameters as they are.

    Raises:
      ConfigError: it is neither, or a change would need other parameters.
    """
    recipe, cfg, params, tokenizer = _open(source, layout)
    if not changes:
        return recipe, cfg, params, tokenizer

    from mllm_jax.config import override
    from mllm_jax.hf.family import parameter_shapes

    cfg = override(cfg, *changes)
    shapes = parameter_shapes(cfg)
    if odd := sorted(k for k in shapes.keys() | params.keys() if k not in params or shapes.get(k) != params[k].shape):
        raise ConfigError(f"--set {' --set '.join(changes)} changes the shapes of parameters, {odd[0]} first; the trained weights do "
                          "not fit. Change what only computes, such as the windows of a pool")
    return recipe, cfg, params, tokenizer


def _open(source: str, layout: Any) -> tuple[Any, Any, dict, Any]:
    folder = Path(source)
    if is_run(folder):
        from mllm_jax.train.run import restore_params

        return restore_params(folder, layout)
    if not source.startswith("hf://") and not (folder / "config.json").exists():
        what = "holds neither recipe.json (a run) nor config.json (a Hugging Face folder)" if folder.is_dir() else "is not a folder"
        raise ConfigError(f"{source!r} {what}; give a run such as runs/first-digits, an exported folder, or hf://org/name")

    from mllm_jax.data.tokenizer import load_tokenizer
    from mllm_jax.hf.hub import folder_of
    from mllm_jax.hf.load import load

    folder = folder_of(source)
    cfg, params = load(folder)
    return None, cfg, params, load_tokenizer(str(folder))


def text_of(recipe: Any, cfg: Any) -> tuple[str, int | None]:
    """(template, positions of a text or None) that a model was trained with.

    Of a recipe, those of its last stage that trained such a model; of a Hugging Face folder, the tokenizer's own chat
    format, or the pair format of the family.
    """
    writes = hasattr(cfg, "decoder")
    if recipe is None:
        return ("tokenizer", None) if writes else ("clip" if getattr(cfg.text, "causal", True) else "siglip", cfg.text.positions)
    alike = [s.data for s in recipe.stages.values() if hasattr(s.model or recipe.model, "decoder") == writes]
    return alike[-1].template, None if writes else alike[-1].seq_len
