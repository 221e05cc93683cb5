"""Where a model comes from: a folder, or a name on the Hub, `hf://org/name` or `hf://org/name@revision`."""

from pathlib import Path

from mllm_jax.config import ConfigError

WANTED = ("*.json", "*.safetensors", "*.jinja", "*.model", "*.txt")     # no weights of other frameworks
PICKLES = ("pytorch_model*.bin",)       # only where there is nothing else; see torch_bin.py


def folder_of(source: str | Path) -> Path:
    """The local folder of a model, downloaded into the cache of huggingface_hub if it is not there.

    Raises:
      ConfigError: no such folder, or the Hub does not answer and the cache does not have it.
    """
    name = str(source)
    if not name.startswith("hf://"):
        path = Path(name).expanduser()
        if not path.is_dir():
            raise ConfigError(f"there is no folder {path}; give a folder that holds config.json, or hf://org/name")
        return path
    # Here, because it takes half a second and a folder needs none of it.
    from huggingface_hub import snapshot_download

    repo, _, revision = name.removeprefix("hf://").partition("@")
    try:
        folder = Path(snapshot_download(repo, revision=revision or None, allow_patterns=WANTED))
        if not any(folder.glob("*.safetensors")):
            snapshot_download(repo, revision=revision or None, allow_patterns=PICKLES)
        return folder
    except Exception as error:  # noqa: BLE001          # of requests, httpx or the Hub; each means the same to the reader
        why = str(error).strip().splitlines()[0] if str(error).strip() else ""
        raise ConfigError(f"{name} cannot be fetched ({type(error).__name__}: {why}); where there is no network, download "
                          f"it elsewhere (`hf download {repo}`) and give the folder instead") from None
