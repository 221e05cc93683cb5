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


def test_what_stages_share_with_the_recipe_is_said_once(capsys):
    from mllm_jax.cli import main

    assert main(["compare", "projector/llava_15", "projector/mobilevlm"]) == 0
    printed = capsys.readouterr().out
    assert printed.count("LDPConfig(grid=24)") == 1 and "stages.align.model" not in printed
    assert main(["compare", "projector/mobilevlm", "projector/llava_15", "--tiny"]) == 0
