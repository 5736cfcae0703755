"""Steps with PyTorch's AdamW, in a process of their own. It needs PyTorch and NumPy."""

import numpy as np
import torch

from benchmarks.worker import serve, timed


class Torch:
    """One case at a time."""

    def make(self, kind, shapes, settings):
        """Make the case, "foreach" or "fused", and return what the peer is."""
        torch.set_num_threads(settings["threads"])
        trees = []
        for seed in (0, 1):
            rng = np.random.default_rng(seed)
            trees.append([torch.from_numpy(0.1 * rng.standard_normal(shape, np.float32)) for shape in shapes])
        self.params = [torch.nn.Parameter(array) for array in trees[0]]
        for param, gradient in zip(self.params, trees[1], strict=True):
            param.grad = gradient
        self.max_norm = settings["max_norm"]
        self.optimizer = torch.optim.AdamW(
            self.params,
            lr=settings["lrate"],
            betas=(0.9, settings["beta_2"]),
            eps=settings["eps"],
            weight_decay=settings["decay"] / settings["lrate"],
            **{kind: True},
        )
        return f"PyTorch {torch.__version__}"

    def take(self):
        # The gradients stay clipped from step to step: the same numbers, and the same work.
        torch.nn.utils.clip_grad_norm_(self.params, self.max_norm, foreach=True)
        self.optimizer.step()

    def step(self):
        """Take a step, and return its seconds."""
        return timed(self.take)[0]

    def squares(self):
        """Return the sum of the squares of the parameters."""
        return sum(float(param.detach().double().square().sum()) for param in self.params)


if __name__ == "__main__":
    serve(Torch())
