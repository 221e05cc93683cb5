"""What every test runs under: eight CPU devices, a compilation cache, no network, one thread of torch.

The variables must be set before jax is imported, and pytest imports this file first.
"""

import gc
import os
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))            # so that helpers are `tests.hf.tiny` however pytest was started

os.environ["JAX_PLATFORMS"] = "cpu"
# Tests spend their time compiling: unoptimized code compiles in half of it, and with the older emitters of loops in a fifth.
FAST = "--xla_backend_optimization_level=0 --xla_cpu_use_fusion_emitters=false"
os.environ.setdefault("XLA_FLAGS", f"--xla_force_host_platform_device_count=8 {FAST}")
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(ROOT / ".jax_cache"))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.1")
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES", "-1")
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import pytest  # noqa: E402

from mllm_jax.launch.runtime import GARBAGE  # noqa: E402

gc.set_threshold(*GARBAGE)


def pytest_configure(config: pytest.Config) -> None:
    # A deprecation that our own lines cause is ours to mend.
    config.addinivalue_line("filterwarnings", r"error::DeprecationWarning:mllm_jax\.")


@pytest.fixture(scope="session")
def real_data() -> Path:
    """A folder of real images, sounds and videos, named by MLLM_JAX_REAL_DATA; tests without it are skipped."""
    folder = Path(os.environ.get("MLLM_JAX_REAL_DATA", ROOT.parent / "shared" / "data"))
    if not folder.is_dir():
        pytest.skip(f"no real data in {folder}; set MLLM_JAX_REAL_DATA to a folder that holds cc3m/images")
    return folder


@pytest.fixture(scope="session")
def torch():
    """torch on one thread, so that parallel tests do not fight for the processor."""
    module = pytest.importorskip("torch")
    module.set_num_threads(1)
    return module
