"""A worker that takes steps with PyTorch's AdamW when asked: JSON in, seconds out. It needs PyTorch and NumPy.

A case is `["make", kind, shapes, settings]`, with "foreach" or "fused" for the kind, or `["step"]`.
"""

import numpy as np
import torch
from step_worker import answer


def make(kind, shapes, settings):
    """Return a function that takes a step, and the parameters."""
    torch.set_num_threads(settings["threads"])
    trees = []
    for seed in (0, 1):
        rng = np.random.default_rng(seed)
        trees.append([torch.from_numpy(0.1 * rng.standard_normal(shape, np.float32)) for shape in shapes])
    params = [torch.nn.Parameter(array) for array in trees[0]]
    for param, gradient in zip(params, trees[1], strict=True):
        param.grad = gradient
    optimizer = torch.optim.AdamW(
        params,
        lr=settings["lrate"],
        betas=(0.9, settings["beta_2"]),
        eps=settings["eps"],
        weight_decay=settings["decay"] / settings["lrate"],
        **{kind: True},
    )

    def step():
        # The gradients stay clipped from step to step: the same numbers, and the same work.
        torch.nn.utils.clip_grad_norm_(params, settings["max_norm"], foreach=True)
        optimizer.step()

    return step, params


if __name__ == "__main__":
    answer(
        make,
        f"PyTorch {torch.__version__}",
        lambda params: sum(float(param.detach().double().square().sum()) for param in params),
    )
