"""Package and extras.  The folders configs/ and launch/ are installed as mllm_jax.configs and mllm_jax.launch."""

from pathlib import Path

from setuptools import find_packages, setup

here = Path(__file__).parent


def below(folder: str) -> list[str]:
    return [f"mllm_jax.{folder}"] + [f"mllm_jax.{folder}.{name}" for name in find_packages(folder)]


TEST = [
    "torch==2.13.0", "pytest>=8", "pytest-xdist>=3.6", "jaxtyping>=0.3", "beartype>=0.20", "psutil>=6", "ruff>=0.9",
    "webdataset>=1.0", "tensorflow-datasets>=4.9.9", "peft>=0.17", "libtpu==0.0.51", "qwix>=0.1.8",
]

setup(
    name="mllm_jax",
    version="0.1.0",
    description="Multimodal LLMs in JAX: build, train on TPU pods, evaluate sharded, export to Hugging Face",
    long_description=(here / "README.md").read_text() if (here / "README.md").exists() else "",
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.11",
    packages=find_packages(include=["mllm_jax", "mllm_jax.*"]) + below("configs") + below("launch"),
    package_dir={"mllm_jax.configs": "configs", "mllm_jax.launch": "launch"},
    package_data={"mllm_jax": ["**/*.css", "**/*.js"], "mllm_jax.configs": ["**/*.md"]},
    install_requires=[
        "jax>=0.10.2", "flax>=0.12.8", "optax>=0.2.8", "orbax-checkpoint>=0.12.8", "grain>=0.2.18,<0.3", "array_record>=0.8",
        "transformers>=5.20", "tokenizers>=0.22", "safetensors>=0.6", "huggingface_hub>=1.0", "jinja2>=3.1.6", "absl-py>=2", "sentencepiece>=0.2",
        "einops>=0.8", "numpy>=2.0", "pillow>=11.3", "av>=14", "pyarrow>=18", "msgpack>=1.1", "scikit-learn>=1.5", "tensorboardX>=2.6",
    ],
    extras_require={
        "tpu": ["jax[tpu]>=0.10.2"],
        "plan": ["libtpu==0.0.51"],
        "gpu": ["jax[cuda13]>=0.10.2"],
        "quant": ["qwix>=0.1.8"],
        "tfds": ["tensorflow-datasets>=4.9.9"],
        "hf-test": ["torch==2.13.0"],
        "test": TEST,
    },
    entry_points={"console_scripts": ["mllm-jax = mllm_jax.cli:console"]},
)
