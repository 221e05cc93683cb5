"""Checkpoints that torch.save wrote, read without torch."""

import json
import os
import shutil

import numpy as np
import pytest

from mllm_jax.config import ConfigError
from mllm_jax.hf.load import load
from mllm_jax.hf.tensors import tensors_of
from mllm_jax.hf.torch_bin import read_pickle


def test_every_type_and_view_reads_as_torch_wrote_it(torch, tmp_path):
    base = torch.arange(24, dtype=torch.float32).reshape(4, 6)
    kinds = (torch.float64, torch.float16, torch.bfloat16, torch.int64, torch.int32, torch.uint8, torch.bool)
    tensors = {str(kind): (base % 3).to(kind) for kind in kinds}
    tensors |= {"parameter": torch.nn.Parameter(base), "rows of a larger one": base[1:3], "scalar": torch.tensor(2.5), "none": torch.zeros(0, 3)}
    torch.save(tensors, tmp_path / "x.bin")
    found = read_pickle(tmp_path / "x.bin")
    assert found.keys() == tensors.keys()
    for name, t in tensors.items():
        got = np.asarray(found[name].view())
        assert got.shape == tuple(t.shape), name
        np.testing.assert_array_equal(got.astype(np.float64), t.detach().to(torch.float64).numpy(), err_msg=name)


def test_a_folder_of_pickles_loads_as_one_of_safetensors(torch, saved, tmp_path):
    folder = saved("llama").folder
    _, want = load(folder)
    tensors = {k: torch.tensor(np.asarray(t.view())) for k, t in tensors_of(folder).items()}
    one, two = (shutil.copytree(folder, tmp_path / n, ignore=shutil.ignore_patterns("*.safetensors*")) for n in ("one", "two"))
    torch.save(tensors, one / "pytorch_model.bin")
    names = sorted(tensors)
    parts = {"pytorch_model-00001-of-00002.bin": names[::2], "pytorch_model-00002-of-00002.bin": names[1::2]}
    for file, mine in parts.items():
        torch.save({k: tensors[k] for k in mine}, two / file)
    index = {"weight_map": {k: file for file, mine in parts.items() for k in mine}}
    (two / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    for where in (one, two):
        _, got = load(where)
        assert got.keys() == want.keys()
        for name, value in want.items():
            np.testing.assert_array_equal(got[name], value, err_msg=name)


class Evil:
    def __reduce__(self):
        return os.system, ("touch evil",)


def test_a_pickle_that_is_a_program_is_refused_and_not_run(torch, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save({"x": torch.zeros(2), "y": Evil()}, tmp_path / "evil.bin")
    with pytest.raises(ConfigError, match=r"names \w+\.system, which is not a tensor and is not run"):
        read_pickle(tmp_path / "evil.bin")
    assert not (tmp_path / "evil").exists()


def test_what_cannot_be_read_says_why(torch, tmp_path):
    torch.save({"x": torch.arange(6.0).reshape(2, 3).T}, tmp_path / "turned.bin")
    with pytest.raises(ConfigError, match=r"stored with strides \(1, 3\)"):
        read_pickle(tmp_path / "turned.bin")
    torch.save({"x": torch.zeros(2)}, tmp_path / "old.bin", _use_new_zipfile_serialization=False)
    with pytest.raises(ConfigError, match="no checkpoint of PyTorch 1.6 or later"):
        read_pickle(tmp_path / "old.bin")
    torch.save({"x": 3}, tmp_path / "number.bin")
    with pytest.raises(ConfigError, match="not a dictionary of tensors"):
        read_pickle(tmp_path / "number.bin")
