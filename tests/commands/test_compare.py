"""What `compare` prints: values as one would write them, and no line without end."""

from mllm_jax.commands.compare import WIDTH, line, written
from mllm_jax.config import load
from mllm_jax.decoders.layers import Layer
from mllm_jax.recipe import Adam, Data


def test_fields_at_their_defaults_are_left_out():
    assert written((Layer(window=3), Layer())) == "(Layer(window=3), Layer())" and written(("a",)) == "('a',)"
    data = Data(sources={"shapes": 1.0}, batch_size=2, seq_len=8)
    assert written(data) == "Data(sources={'shapes': 1.0}, batch_size=2, seq_len=8)"
    optimizer = Adam(lr=1e-3, lr_scale={"decoder/*": 0.5})
    assert eval(written(optimizer)) == optimizer and line("arXiv:1") == "arXiv:1"


def test_a_long_value_ends_in_dots():
    text = line(load("projector/llava_15").model)
    assert len(text) == WIDTH and text.startswith("MLLMConfig(inputs=") and text.endswith(" ...")
