"""Flags for the TPU compiler: which, for which chips, and what comes of them."""

import re

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from mllm_jax import compiler
from mllm_jax.compiler import OF_CHIP, ONLY, SETS, flags
from mllm_jax.config import ConfigError, load
from mllm_jax.sharding import Layout
from mllm_jax.train import step


@pytest.fixture(scope="module")
def chips():
    pytest.importorskip("libtpu")
    from mllm_jax.plan.topology import not_kept, topology

    with not_kept():
        yield topology("v5e:4x4").devices


def test_other_devices_get_none():
    assert flags("auto", jax.devices()[0]) is None and flags("scatter", jax.devices()[0]) is None


def test_a_word_that_is_no_set_names_the_nearest():
    with pytest.raises(ConfigError, match="no set of compiler flags is called 'scater'; nearest: scatter"):
        Layout(flags="overlap+scater").make_mesh()


def test_a_set_of_other_chips_is_refused(chips):
    with pytest.raises(ConfigError, match="sparsecore is for v5p and v6e, and these are v5e; use flags=auto"):
        flags("sparsecore", chips[0])


@pytest.mark.parametrize(("shape", "names"), [
    ("v5e:2x2", ["scatter", "overlap"]), ("v6e:2x2", ["sparsecore"]), ("v5p:2x2x1", ["scatter", "sparsecore"])])
def test_the_compiler_knows_all_of_them(shape, names, chips):
    from mllm_jax.plan.topology import topology

    device = topology(shape).devices[0]
    assert all(flags(name, device) == SETS[name] for name in names)
    assert all(kind in ONLY.get(name, (kind,)) for kind, own in OF_CHIP.items() for name in own)


def test_a_chip_has_its_own_and_the_users_stay_as_they_are(chips, monkeypatch):
    assert flags("auto", chips[0]) == SETS["gather"] | SETS["scatter"] and flags("none", chips[0]) is None
    assert flags("scatter+overlap", chips[0]) == SETS["scatter"] | SETS["overlap"]
    first, *rest = SETS["scatter"] | SETS["gather"]
    monkeypatch.setenv("LIBTPU_INIT_ARGS", f"--xla_tpu_scoped_vmem_limit_kib=98304 --{first}=false")
    assert set(flags("auto", chips[0])) == set(rest)


def test_what_the_compiler_does_not_know_is_left_out_with_a_warning(chips, monkeypatch):
    monkeypatch.setitem(SETS, "scatter", SETS["scatter"] | {"xla_tpu_of_another_year": "true"})
    with pytest.warns(UserWarning, match="does not know the flag xla_tpu_of_another_year"):
        known = flags("scatter", chips[0])
    assert "xla_tpu_of_another_year" not in known and len(known) == 2


@pytest.mark.parametrize("words", ["auto", "none"])
def test_weights_are_gathered_and_products_not_cut(words, chips):
    """Of 4096 positions a chip with a weight split over 16 chips, which XLA would pass on in parts."""
    mesh = Layout(mesh={"fsdp": -1}).make_mesh(list(chips))
    split = NamedSharding(mesh, PartitionSpec("fsdp"))
    x, w = (jax.ShapeDtypeStruct(shape, jnp.bfloat16, sharding=split) for shape in ((16, 4096, 4096), (4096, 11_008)))
    product = jax.jit(lambda x, w: x @ w, out_shardings=split, compiler_options=flags(words, chips[0]))
    assert ("collective-permute" in product.lower(x, w).compile().as_text()) == (words == "none")


@pytest.mark.parametrize("words", ["auto", "none"])
def test_gradients_are_scattered_where_an_all_reduce_would_move_twice_the_bytes(words, chips):
    mesh = Layout(mesh={"fsdp": -1}).make_mesh(list(chips))
    split = NamedSharding(mesh, PartitionSpec("fsdp"))
    x = jax.ShapeDtypeStruct((16, 256, 1024), jnp.bfloat16, sharding=split)
    gradient = jax.jit(lambda x, y: jnp.einsum("bnd,bnf->df", x, y), out_shardings=split, compiler_options=flags(words, chips[0]))
    # In the text of the program both are an all-reduce, one of them inside a fusion; the compiler notes how it is carried out.
    how = re.findall(r'"emitter":"(\w+)"', gradient.lower(x, x).compile().as_text())
    assert any("AllReduceScatter" in one for one in how) == (words == "auto"), how


def test_the_step_that_is_planned_and_trained_has_them(chips, monkeypatch):
    mesh = Layout(mesh={"fsdp": -1}).make_mesh(list(chips))
    monkeypatch.setattr(compiler, "flags", lambda words, device: {f"xla_tpu_{words}": "true"})
    monkeypatch.setattr(step, "make_step", lambda *_, **__: lambda state, batch, key: state + batch)
    one = jax.ShapeDtypeStruct((16,), jnp.float32, sharding=NamedSharding(mesh, PartitionSpec("fsdp")))
    stage = load("first/digits").stages["instruct"]
    with pytest.raises(jax.errors.JaxRuntimeError, match="No such compile option: 'xla_tpu_auto'"):
        step.jit_step(None, stage, None, Layout(), mesh).lower(one, one, one).compile()
