"""The parameters of a model that grew from the one of a checkpoint: same layers, in turns of another length, some with experts.

Layer i is entry i // c of the stack `blocks/{i % c}` (nn/stack.py), so that where every second layer becomes sparse all
stacks change.  Experts begin as copies of the feed-forward layer in whose place they stand (sparse upcycling,
arXiv:2212.05055); their router is new.
"""

import re
from collections.abc import Mapping

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec

from mllm_jax.nn.experts import dense
from mllm_jax.nn.param import Params
from mllm_jax.types import record

PLACE = re.compile(r"(.*\bblocks/)(\d+)(/.*)")
Shapes = Mapping[str, jax.ShapeDtypeStruct]


@record
class Origin:
    """Where the layers of a stacked parameter are in a checkpoint."""

    rows: tuple[tuple[str, int], ...]   # of each layer the path of its stack, and which entry it is
    copies: bool                        # of one matrix, for all experts


def origins(wanted: Shapes, saved: Shapes) -> dict[str, Origin]:
    """The origin of every wanted parameter that the checkpoint has, but not by its name and with its shape.

    A decoder of another depth has none: it did not grow from that one.
    """
    out = {}
    for path in wanted:
        if (match := PLACE.fullmatch(path)) is None:
            continue
        head, place, tail = match[1], int(match[2]), match[3]
        theirs, ours = _stacks(saved, head), _stacks(wanted, head)
        name = tail if any(f"{head}{j}{tail}" in saved for j in range(len(theirs))) else dense(tail)
        if sum(theirs) != sum(ours) or len(theirs) == len(ours) and name == tail:
            continue
        layers = range(place, sum(ours), len(ours))
        rows = tuple((f"{head}{i % len(theirs)}{name}", i // len(theirs)) for i in layers)
        if all(path in saved for path, _ in rows):
            out[path] = Origin(rows=rows, copies=name != tail)
    return out


def fresh(found: Mapping[str, Origin]) -> set[str]:
    """Routers of experts that are copies."""
    return {f"{path.partition('/experts/')[0]}/router" for path, origin in found.items() if origin.copies}


def needed(found: Mapping[str, Origin], wanted: Shapes, saved: Shapes) -> dict[str, jax.ShapeDtypeStruct]:
    """What must be read for these: stacks of the checkpoint, sharded as what is made of them."""
    out = {}
    for path, origin in found.items():
        where = wanted[path].sharding
        if origin.copies and isinstance(where, NamedSharding):
            where = NamedSharding(where.mesh, PartitionSpec(*where.spec[:1], *where.spec[2:]))
        for theirs, _ in origin.rows:
            out[theirs] = jax.ShapeDtypeStruct(saved[theirs].shape, wanted[path].dtype, sharding=where)
    return out


def grow(found: Mapping[str, Origin], wanted: Shapes, params: Params) -> Params:
    """The wanted parameters, of those that were read."""
    def make(params: Params) -> Params:
        out = {}
        for path, origin in found.items():
            layers = jnp.stack([params[theirs][i] for theirs, i in origin.rows])
            out[path] = jnp.broadcast_to(layers[:, None], wanted[path].shape) if origin.copies else layers
        return out

    return jax.jit(make, out_shardings={path: wanted[path].sharding for path in found})(params)


def _stacks(shapes: Shapes, head: str) -> list[int]:
    """How many layers the stacks have that begin with this path."""
    sizes = {int(match[2]): shapes[path].shape[0] for path in shapes if (match := PLACE.fullmatch(path)) and match[1] == head}
    return [sizes[j] for j in sorted(sizes)]
