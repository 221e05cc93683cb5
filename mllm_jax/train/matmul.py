"""What the count of operations is made of: matmuls, by the path of their weights."""

from collections.abc import Callable

from mllm_jax.types import record


@record
class Matmul:
    """Weights of inputs x outputs, applied `times` (tokens x layers); without a path, a product of activations."""

    path: str
    inputs: float
    outputs: float
    times: float
    after: str = ""                     # a subtree that, if it trains, makes this pass gradients


Product = tuple[str, bool, list[Matmul]]      # part, whether its input already carries a gradient, its matmuls
Trains = Callable[[str], bool]             # whether anything at or below a path trains
