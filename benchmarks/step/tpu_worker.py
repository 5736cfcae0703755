"""Steps compiled for a TPU that is described and not there: what the compiler says of them."""

from benchmarks.chips import described_chips  # before JAX is imported

# isort: split
import dataclasses
import math
import re
import time

import jax
import jax.numpy as jnp
import optax
from jax.sharding import SingleDeviceSharding

import functional_optimodules as fo
from benchmarks.step.trees import TREES, given_step, loss_fn, optax_chain, our_optimizer, trained_step, uniform
from benchmarks.worker import serve
from functional_optimodules.packing.policy import worthwhile
from functional_optimodules.packing.tree import Packing, Small

# A TPU v5e: 197 TFLOP/s in bfloat16 are so many cycles of four units of 128 x 128.
HERTZ = 1.5e9
BATCH = 128
HOME = SingleDeviceSharding(described_chips(2, 2)[0])


def network(layers, width):
    """The shapes of a residual network, a kernel and a bias each layer."""
    shapes = {"w": (width, width), "b": (width,)}
    return {f"layer_{index:04}/{name}": shape for index in range(layers) for name, shape in shapes.items()}


def network_loss(params, inputs):
    hidden = inputs
    for name in sorted({path.split("/")[0] for path in params}):
        hidden = hidden + 0.01 * jnp.tanh(hidden @ params[f"{name}/w"] + params[f"{name}/b"])
    return jnp.mean(hidden**2)


def inside_step(tx, packing):
    """Return a step with trees in and out, packed in between; the state stays packed."""

    def step(params, state, gradients):
        updates, state = tx.update(packing.pack(gradients), state, packing.pack(params))
        return optax.apply_updates(params, fo.unpack(updates)), state

    return step


@dataclasses.dataclass
class Case:
    """A step to compile.

    Attributes:
      question: `loss`, with a loss over named leaves; `given`, with the gradients given; `inside`, the same with trees
        in and out, and packed in between.
      side: `optax`, `tree` or `packed`.
      tree: the name of one of `trees.py`; else:
      leaves: how many, of a number of elements, or, with a width, layers of a network.
      elements: of each leaf.
      width: of the layers.
      small: the most bytes of a vector and of a matrix that are packed; by default what the library chooses for a TPU.
    """

    question: str
    side: str
    tree: str | None = None
    leaves: int = 0
    elements: int = 0
    width: int = 0
    small: tuple[int, int] | None = None

    def shapes(self):
        if self.tree:
            return TREES[self.tree]
        return network(self.leaves, self.width) if self.width else uniform(self.leaves, self.elements)

    def packing(self, params):
        """Return how the parameters are packed, or `None` where they are not."""
        if self.side != "packed":
            return None
        if self.small:
            return Packing.of(params, Small(*self.small))
        return worthwhile(there(params), inside=self.question == "inside")

    def step(self):
        """Return the step and the shapes of its arguments."""
        params = {name: jax.ShapeDtypeStruct(shape, jnp.float32) for name, shape in self.shapes().items()}
        tx = optax_chain() if self.side == "optax" else our_optimizer()
        packing = self.packing(params)
        held = params if packing is None else jax.eval_shape(packing.pack, params)
        state = jax.eval_shape(tx.init, held)
        if self.question == "loss":
            loss = network_loss if self.width else loss_fn
            batch = jax.ShapeDtypeStruct((BATCH, self.width) if self.width else (), jnp.float32)
            return trained_step(tx, loss), (held, state, batch)
        if self.question == "inside" and packing is not None:
            return inside_step(tx, packing), (params, state, params)
        return given_step(tx), (held, state, held)


def there(tree):
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=HOME), tree)


KERNELS, COPIES = ("fusion", "convolution", "reduce", "custom-call"), ("copy", "copy-start", "slice-start")
WORK = re.compile(rf" = (?:\(.*?\)|\S+) ({'|'.join(KERNELS + COPIES)})\(")


def work(text):
    """Return how many kernels and copies a program has, and the cycles that its compiler expects of the kernels."""
    lines = text[text.index("\nENTRY") :].splitlines()
    kinds = [found[1] for line in lines if (found := WORK.search(line))]
    cycles = sum(int(found[1]) for line in lines if (found := re.search(r'"estimated_cycles":"(\d+)"', line)))
    return sum(kind in KERNELS for kind in kinds), sum(kind in COPIES for kind in kinds), cycles


class Compiler:
    """What answers `tpu`: see `Case`."""

    def compile(self, case):
        step, arguments = Case(**case).step()
        # Not by the clock on the wall: what else the machine does is not asked.
        start = time.process_time()
        lowered = jax.jit(step, donate_argnums=(0, 1)).lower(*map(there, arguments))
        traced = time.process_time()
        compiled = lowered.compile()
        done = time.process_time()
        cost = compiled.cost_analysis()
        kernels, copies, cycles = work(compiled.as_text())
        # What has no estimate counts as -1 second.
        unknown = max(0, math.ceil(-cost["optimal_seconds"]))
        return {
            "trace_s": traced - start,
            "compile_s": done - traced,
            "kernels": kernels,
            "copies": copies,
            "bytes": cost["bytes accessed"],
            "temporary": compiled.memory_analysis().temp_size_in_bytes,
            "optimal_s": cost["optimal_seconds"] + unknown,
            "unknown": unknown,
            "kernels_s": cycles / HERTZ,
        }


if __name__ == "__main__":
    serve(Compiler())
