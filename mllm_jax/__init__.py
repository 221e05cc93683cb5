"""mllm_jax: multimodal LLMs in JAX, from bytes to a trained, evaluated and exported model."""

__version__ = "0.1.0"
