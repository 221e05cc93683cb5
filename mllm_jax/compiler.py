"""What XLA's compiler for TPUs is told beside the program: flags in sets with names, and the sets of each kind of chip.

A layout chooses: flags=auto (those of the chip, below), none, or names of sets joined by "+".  They go with the step that is
compiled, so that `plan` compiles what `train` runs.  A flag that LIBTPU_INIT_ARGS names stays as it is there, and flags that
this libtpu does not know are left out.  The sets are after MaxText's (benchmarks/xla_flags_library.py in
github.com/AI-Hypercomputer/maxtext); what they gain and cost is in docs/performance.md.
"""

import functools
import os
import re
import warnings

import jax
from jax.sharding import SingleDeviceSharding

from mllm_jax.chips import CHIPS, chip_of
from mllm_jax.config import ConfigError, nearest

_CORES = "xla_tpu_enable_sparse_core_collective_offload"
SETS: dict[str, dict[str, str]] = {
    # Gradients of split parameters stay reduce-scatters, where an all-reduce would move twice the bytes over the same links.
    # The first flag is named for cores that v5e has not; there, too, it keeps the compiler from taking them apart.
    "scatter": {f"{_CORES}_nd_reduce_scatter": "true", "xla_tpu_use_minor_sharding_for_major_trivial_input": "true"},
    # Weights are gathered whole before a product.  On 16 chips and fewer XLA cuts products of much into as many as there are chips, which pass
    # parts of the weight on; those take twice as long, and the wires longer still.
    "gather": {"xla_jf_spmd_threshold_for_windowed_einsum_mib": "1000000"},
    # Collectives run on SparseCores, beside the products.
    "sparsecore": {
        **{f"{_CORES}_{name}": "true" for name in (
            "all_gather", "2d_all_gather", "3d_all_gather", "reduce_scatter", "nd_reduce_scatter", "all_reduce")},
        **{f"xla_tpu_enable_async_collective_fusion_fuse_{name}": "false" for name in ("all_gather", "all_reduce", "reduce_scatter")},
        "xla_tpu_use_tc_device_shape_on_sc": "true", "xla_tpu_use_minor_sharding_for_major_trivial_input": "true"},
    # Collectives are cut into steps that ride on products: a compile takes many times as long.
    "overlap": {
        **{f"xla_tpu_enable_async_collective_fusion{name}": "true" for name in ("", "_fuse_all_gather", "_multiple_steps")},
        "xla_tpu_overlap_compute_collective_tc": "true", "xla_enable_async_all_gather": "true"},
}
ONLY = {"sparsecore": ("v5p", "v6e"), "overlap": ("v5e",)}             # the others refuse to compile, or have no such cores
OF_CHIP: dict[str, tuple[str, ...]] = {
    "v4": ("gather",), "v5e": ("gather", "scatter"), "v5p": ("gather", "sparsecore"), "v6e": ("gather", "sparsecore")}


def check_flags(words: str) -> None:
    """Raises ConfigError if these are not "auto", "none", or names of sets joined by "+"."""
    for word in words.split("+"):
        if word not in SETS and words not in ("auto", "none"):
            raise ConfigError(f"flags={words!r}: no set of compiler flags is called {word!r}; nearest: {nearest(word, ['auto', 'none', *SETS])}")


def sets(words: str, device: jax.Device) -> tuple[str, ...]:
    """The names of the sets that programs on such devices get; none on others than TPUs.

    Raises:
      ConfigError: no such words, or a set that is not for these chips.
    """
    check_flags(words)
    if device.platform != "tpu":
        return ()
    kind = next((name for name, chip in CHIPS.items() if chip is chip_of(device.device_kind)), "")
    names = OF_CHIP.get(kind, ()) if words == "auto" else () if words == "none" else tuple(words.split("+"))
    for name in names:
        if kind not in ONLY.get(name, (kind,)):
            these = f"{' and '.join(ONLY[name])}, and these are {kind or device.device_kind}"
            raise ConfigError(f"flags={words!r}: {name} is for {these}; use flags=auto")
    return names


def flags(words: str, device: jax.Device) -> dict[str, str] | None:
    """The options for programs on such devices, or None; `sets` says what it raises."""
    wanted = {flag: value for name in sets(words, device) for flag, value in SETS[name].items()}
    theirs = re.findall(r"--(\w+)", os.environ.get("LIBTPU_INIT_ARGS", ""))
    wanted = {flag: value for flag, value in wanted.items() if flag not in theirs}
    return dict(_known(device, tuple(wanted.items()))) or None


@functools.cache
def _known(device: jax.Device, wanted: tuple[tuple[str, str], ...]) -> tuple[tuple[str, str], ...]:
    """Those of the flags that this libtpu knows, found by a program of nothing."""
    one = jax.ShapeDtypeStruct((), "float32", sharding=SingleDeviceSharding(device))
    while wanted:
        try:
            jax.jit(lambda x: x).lower(one).compile(compiler_options=dict(wanted))
            break
        except jax.errors.JaxRuntimeError as error:
            unknown = re.search(r"No such compile option: '(\w+)'", str(error))
            if unknown is None:
                raise
            warnings.warn(f"this version of libtpu does not know the flag {unknown[1]}, which is left out", stacklevel=2)
            wanted = tuple((flag, value) for flag, value in wanted if flag != unknown[1])
    return wanted
