"""How to split one data set over clients, for experiments.

Each function returns, for each client, an int64 array of the indices of its
examples, which `FederatedData.from_indices` takes. No client is left empty. The
same seed gives the same split.
"""

from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike, NDArray

Indices = NDArray[np.int64]
Seed = int | Sequence[int] | np.random.Generator

_TRIES = 1000


def iid(num_examples: int, num_clients: int, seed: Seed = 0) -> list[Indices]:
    """Deal examples out at random, in numbers equal to within one.

    Args:
      num_examples: how many there are.
      num_clients: how many clients.
      seed: a seed, or a generator, of NumPy.

    Raises:
      ValueError: if there are fewer examples than clients.
    """
    _check(num_examples, num_clients)
    order = np.random.default_rng(seed).permutation(num_examples)
    return [np.sort(part) for part in np.array_split(order, num_clients)]


def dirichlet(
    labels: ArrayLike, num_clients: int, alpha: float = 0.5, seed: Seed = 0, min_examples: int = 1
) -> list[Indices]:
    """Deal the examples of each label out in shares drawn from a Dirichlet distribution.

    The draw is repeated until every client has enough examples.

    Args:
      labels: the label of each example: any values that sort.
      num_clients: how many clients.
      alpha: the concentration, > 0: small is skewed, large nearly i.i.d.
      seed: a seed, or a generator, of NumPy.
      min_examples: how many examples each client has at least, >= 1.

    Raises:
      ValueError: if an argument is out of range, or no draw gives every client
        that many.

    References:
      Yurochkin et al., "Bayesian nonparametric federated learning of neural
      networks", ICML 2019, arXiv:1905.12022.
      Hsu et al., "Measuring the effects of non-identical data distribution for
      federated visual classification", arXiv:1909.06335.
    """
    labels = _labels(labels, num_clients)
    if not alpha > 0:
        raise ValueError(f"dirichlet: alpha={alpha!r} should be > 0")
    if not 1 <= min_examples <= len(labels) // num_clients:
        raise ValueError(
            f"dirichlet: min_examples={min_examples!r} should be from 1 to {len(labels) // num_clients}, an even share"
        )
    rng = np.random.default_rng(seed)
    for _ in range(_TRIES):
        dealt: list[list[Indices]] = []
        for label in np.unique(labels):
            rows = rng.permutation(np.flatnonzero(labels == label))
            shares = rng.dirichlet(np.full(num_clients, alpha))
            cuts = (np.cumsum(shares)[:-1] * len(rows)).astype(int)
            dealt.append(np.split(rows, cuts))
        parts = [np.sort(np.concatenate(each)) for each in zip(*dealt, strict=True)]
        if min(map(len, parts)) >= min_examples:
            return parts
    raise ValueError(
        f"dirichlet: in {_TRIES} draws with alpha={alpha}, some of {num_clients} clients always had less than "
        f"{min_examples} of the {len(labels)} examples: take a larger alpha or fewer clients"
    )


def sorted_shards(labels: ArrayLike, num_clients: int, similarity: float = 0.0, seed: Seed = 0) -> list[Indices]:
    """Deal a share of the examples out at random and the rest sorted by label, in equal numbers.

    Args:
      labels: the label of each example: any values that sort.
      num_clients: how many clients.
      similarity: the share that is dealt out at random, in [0, 1].
      seed: a seed, or a generator, of NumPy.

    Raises:
      ValueError: if an argument is out of range, or there are fewer examples than
        clients.

    References:
      Hsu et al., arXiv:1909.06335, as used by Karimireddy et al., "SCAFFOLD:
      stochastic controlled averaging for federated learning", section 7.
    """
    labels = _labels(labels, num_clients)
    if not 0 <= similarity <= 1:
        raise ValueError(f"sorted_shards: similarity={similarity!r} should be a share in [0, 1]")
    rng = np.random.default_rng(seed)
    order = rng.permutation(len(labels))
    alike = round(similarity * len(labels))
    rest = order[alike:]
    rest = rest[np.argsort(labels[rest], kind="stable")]
    # Who gets one more of the one gets one less of the other.
    even = np.array_split(order[:alike], num_clients)[::-1]
    counts = np.array([len(part) for part in np.array_split(order, num_clients)]) - [len(part) for part in even]
    skewed = np.split(rest, np.cumsum(counts)[:-1])
    return [np.sort(np.concatenate(parts)) for parts in zip(even, skewed, strict=True)]


def by_id(ids: ArrayLike) -> list[Indices]:
    """Give each example to the client that it belongs to.

    Args:
      ids: the client of each example: any values that sort. Clients are numbered
        in their order.

    Raises:
      ValueError: if `ids` is not one value an example, or empty.
    """
    ids = _labels(ids, 1)
    order = np.argsort(ids, kind="stable")
    _, starts = np.unique(ids[order], return_index=True)
    return np.split(order, starts[1:])


def _labels(labels: ArrayLike, num_clients: int) -> NDArray[np.generic]:
    labels = np.asarray(labels)
    if labels.ndim != 1:
        raise ValueError(f"labels and ids are one value an example, not of shape {list(labels.shape)}")
    _check(len(labels), num_clients)
    return labels


def _check(num_examples: int, num_clients: int) -> None:
    if num_clients < 1:
        raise ValueError(f"num_clients={num_clients!r} should be at least 1")
    if num_examples < num_clients:
        raise ValueError(f"{num_examples} examples for {num_clients} clients: some would have none")
