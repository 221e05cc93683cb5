"""Folder to folder, without a model in memory: a Hugging Face folder <-> our own weights beside its other files.

Ours is one safetensors file of our paths, with the layers stacked, as the model has them; a stack is written
layer by layer where it belongs.  Bytes are moved and put into another order, never rounded.  Reading from it
is a plain read, which is what a pod wants when it starts many times from one checkpoint.
"""

import shutil
from pathlib import Path

from mllm_jax.config import ConfigError
from mllm_jax.hf.export import SHARD_BYTES, write_hf
from mllm_jax.hf.families import describe
from mllm_jax.hf.hub import folder_of
from mllm_jax.hf.load import reader
from mllm_jax.hf.tensors import INDEX, NATIVE, Writer, replacing

KEPT = (".json", ".jinja", ".model", ".txt", ".md")


def convert_folder(source: str | Path, folder: str | Path, to: str = "native", *, max_shard_bytes: int = SHARD_BYTES) -> Path:
    """Writes `folder` and returns it; `to` is "native" or "hf", and each of them may be the source.

    Never holds more than about one tensor of the Hugging Face folder.  Configuration and tokenizer files are
    copied as they are.  Buffers that the family ignores (position ids, frequencies) are left out.

    Raises:
      ConfigError: as `load.load`; or the layers of a stack have different types.
    """
    if to not in ("native", "hf"):
        raise ConfigError(f"to={to!r}: a folder is converted to 'native' or to 'hf'")
    source, folder = folder_of(source), Path(folder)
    if folder.resolve() == source.resolve():
        raise ConfigError(f"{folder} is converted from itself; give another place")
    family, cfg = describe(source)
    read, links = reader(source, str(source), family, cfg)
    dtypes, depth = {}, {}
    for link in links:
        dtype = read(link).dtype
        depth[link.ours] = depth.get(link.ours, 0) + 1
        if dtypes.setdefault(link.ours, dtype) != dtype:
            raise ConfigError(f"{source}: {link.theirs} is {dtype}, other layers of {link.ours} are {dtypes[link.ours]}; "
                              "save the model in one type")
    with replacing(folder) as new:
        for file in sorted(source.iterdir()):
            if file.suffix in KEPT and file.name != INDEX and file.is_file():
                shutil.copyfile(file, new / file.name)
            elif file.name in family.tokenizers and file.is_dir():
                shutil.copytree(file, new / file.name)
        if to == "hf":
            write_hf(new, family, links, ((x, read(x)) for x in links), dtypes, max_shard_bytes)
        else:
            stacks = {x.ours: (dtypes[x.ours], x.shape if x.layer is None else (depth[x.ours], *x.shape)) for x in links}
            with Writer(new / NATIVE, stacks, {"format": "mllm_jax"}) as writer:
                for x in links:
                    writer.write(x.ours, read(x), layer=x.layer)
    return folder
