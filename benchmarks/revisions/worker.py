"""Steps of one checkout, by the public interface alone: it runs on old code and new code alike."""

import functools

import jax

import functional_optimodules as fo
from benchmarks.rounds.our_worker import make as make_round
from benchmarks.step.trees import TREES, Facade, Stepper, first, given_step, normal, our_optimizer
from benchmarks.worker import serve, timed


def facade(method, pack, params, gradients):
    optimizer, params, gradients = our_optimizer(), pack(params), pack(gradients)
    if method == "apply":
        return Facade(optimizer, params, gradients, donate=True)
    return lambda: first(optimizer.run(gradients, params=params))


def pure(params, gradients):
    optimizer, packed = our_optimizer(), fo.pack(params)
    return Stepper(jax.jit(given_step(optimizer), donate_argnums=(0, 1)), packed, optimizer.init(packed), gradients)


STEPS = {
    "run, trees": functools.partial(facade, "run", lambda tree: tree),
    "run, packed": functools.partial(facade, "run", fo.pack),
    "apply, trees": functools.partial(facade, "apply", lambda tree: tree),
    "apply, packed": functools.partial(facade, "apply", fo.pack),
    "pure step, kept packed": pure,
}


class Side:
    """One case at a time."""

    def make(self, case, what):
        """Make a case on a tree, or a round of a method with a model, and return the seconds of one step."""
        if case in STEPS:
            self.call = STEPS[case](normal(TREES[what]), normal(TREES[what], seed=1))
        else:
            self.call = make_round(what, case, 100, 100, "float32")
        self.steps(2)
        return self.steps(2)

    def steps(self, count):
        """Return the mean seconds of some steps, after one that is not timed."""
        self.wait()
        return timed(lambda: [self.wait() for _ in range(count)])[0] / count

    def wait(self):
        jax.block_until_ready(self.call())


if __name__ == "__main__":
    serve(Side())
