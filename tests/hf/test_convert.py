"""Folder to folder: no byte changes, and no more memory than a tensor is used."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from mllm_jax.config import ConfigError
from mllm_jax.hf.convert import convert_folder
from mllm_jax.hf.export import export
from mllm_jax.hf.families import describe
from mllm_jax.hf.load import load
from mllm_jax.hf.tensors import tensors_of
from tests.hf import tiny
from tests.hf.test_load import same

ROOT = Path(__file__).parent.parent.parent


def stored(folder) -> dict:
    """The bytes of every tensor, under the names of the table."""
    family, _ = describe(Path(folder))
    return {family.canonical(k): (t.dtype, t.shape, t.view().tobytes()) for k, t in tensors_of(Path(folder)).items()}


@pytest.mark.parametrize("name", [*tiny.DECODERS, "clip", "siglip", "clip_vision", "siglip_vision", *tiny.LLAVAS])
def test_there_and_back_is_the_same_bytes(saved, tmp_path, name):
    folder = saved(name).folder
    native = convert_folder(folder, tmp_path / "native")
    back = convert_folder(native, tmp_path / "back", "hf", max_shard_bytes=30_000)
    assert stored(back) == stored(folder)
    assert (back / "config.json").read_bytes() == (folder / "config.json").read_bytes()
    # The other way about: ours, to theirs, to ours; and the native folder loads as the original does.
    (cfg, params), (native_cfg, from_native) = load(folder), load(native)
    assert native_cfg == cfg
    same(from_native, params)
    family = "mistral" if name == "mistral" else None
    exported = export(params, cfg, tmp_path / "out", image_token=1 if "llava" in name else None, family=family)
    assert stored(exported) == stored(folder)
    same(load(exported)[1], params)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_is_the_same_bytes(torch, tmp_path, dtype):
    model, processor = tiny.build("llava-siglip-qwen2")
    model.to(getattr(torch, dtype)).save_pretrained(tmp_path / "x", max_shard_size="30KB")
    processor.save_pretrained(tmp_path / "x")
    assert len(list((tmp_path / "x").glob("*.safetensors"))) > 2
    native = convert_folder(tmp_path / "x", tmp_path / "native")
    assert stored(convert_folder(native, tmp_path / "back", "hf")) == stored(tmp_path / "x")
    cfg, params = load(tmp_path / "x", dtype=None)
    assert stored(export(params, cfg, tmp_path / "out", image_token=1)) == stored(tmp_path / "x")


def test_what_cannot_be_converted_says_so(saved, tmp_path):
    folder = saved("llama").folder
    with pytest.raises(ConfigError, match="to='gguf'"):
        convert_folder(folder, tmp_path / "x", "gguf")
    with pytest.raises(ConfigError, match="converted from itself"):
        convert_folder(folder, folder)
    assert not list(tmp_path.iterdir())


def test_a_failure_leaves_nothing_behind(saved, tmp_path, monkeypatch):
    from mllm_jax.hf import tensors

    done = convert_folder(saved("llama").folder, tmp_path / "x")
    before = stored_bytes(done)
    count = iter(range(5))

    def full(self, *args, **kwargs):
        if next(count, None) is None:
            raise OSError(28, "No space left on device")

    monkeypatch.setattr(tensors.Writer, "write", full)
    with pytest.raises(OSError, match="No space left"):
        convert_folder(saved("llama").folder, tmp_path / "x")
    assert [p.name for p in tmp_path.iterdir()] == ["x"] and stored_bytes(done) == before


def stored_bytes(folder: Path) -> dict:
    return {p.name: p.read_bytes() for p in folder.iterdir()}


def test_peak_memory_is_at_most_two_tensors(tmp_path):
    """200 MB of random weights, largest tensor 66 MB; benchmarks/convert_memory.py does the same with 2 GB."""
    command = [sys.executable, str(ROOT / "benchmarks" / "convert_memory.py"), "--megabytes", "200", "--folder", str(tmp_path)]
    env = {k: v for k, v in os.environ.items() if k != "XLA_FLAGS"}
    out = subprocess.run(command, capture_output=True, text=True, timeout=300, env=env, cwd=ROOT)
    assert out.returncode == 0, out.stdout + out.stderr
    ratios = [float(line.split()[-1]) for line in out.stdout.splitlines() if line.endswith(tuple("0123456789"))]
    assert len(ratios) == 2 and max(ratios) <= 2.0, out.stdout


def test_numpy_writes_what_is_not_contiguous(tmp_path):
    from mllm_jax.hf.tensors import Writer

    x = np.arange(12, dtype=np.float32).reshape(3, 4)
    with Writer(tmp_path / "a.safetensors", {"t": (x.dtype, (4, 3)), "s": (x.dtype, ())}, {}) as w:
        w.write("t", x.T)
        w.write("s", np.full((), 7, np.float32))
        with pytest.raises(AssertionError):
            w.write("s", np.full((), 7.0))                      # float64, which would run into the next tensor
    from safetensors.numpy import load_file

    got = load_file(tmp_path / "a.safetensors")
    np.testing.assert_array_equal(got["t"], x.T)
    assert got["s"] == 7
