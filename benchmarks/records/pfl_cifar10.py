"""pfl-research's CIFAR-10 task: 1,500 rounds of 50 clients of 50 examples, batches of 10, a network of 1.63 M.

    python -m benchmarks.records.pfl_cifar10 --whole          # on a GPU, all 1,500 rounds
    python -m benchmarks.records.pfl_cifar10 --participants 4 # on a CPU, some small rounds beside pfl and a Python loop

A convolution with weights of each client's own is, for many clients at once, one with groups: the ways to run them are
compared, by XLA's convolution or by slices and one product, client by client or in chunks. `--data` is a NumPy archive
with `x_train`, N x 32 x 32 x 3 bytes, and `y_train`; without it the numbers are drawn at random, which costs the same.
"""

import functools
import time

import jax
import jax.numpy as jnp
import numpy as np
import optax

from benchmarks.conformance.report import PEERS
from benchmarks.environments import make_environment
from benchmarks.records.cifar import BATCH, EXAMPLES, PARTICIPANTS, RATE, ROUNDS, limit, load, make_losses, make_params
from benchmarks.report import parse_arguments, section, write
from benchmarks.timing import RATIOS, TIMES, interleave, ratio_row, time_rows
from benchmarks.worker import Worker
from functional_optimodules import Optimizer
from functional_optimodules.federated import FederatedData, Federation

GOAL = 15.0
# Of one H200: float32 as TF32 on its tensor cores, without sparsity, and its memory, by its data sheet.
FLOPS, BANDWIDTH = 495e12, 4.8e12


def make_federation(form, mapping):
    return Federation(make_losses(form), Optimizer(RATE), batch_size=BATCH, mapping=mapping)


def make_round(form, mapping, data, participants):
    """Return a function that runs a round of a fresh sample from where the last one ended."""
    federation = make_federation(form, mapping)
    step = jax.jit(lambda state, data: federation.run(state, data, 1, participants=participants), donate_argnums=0)
    state = federation.init(make_params(), data)

    def call():
        nonlocal state
        state, history = step(state, data)
        return history

    return call


def make_loop(form, images, labels, participants):
    """Return a function that runs a round as a Python loop over a jitted step of optax, fed from NumPy."""
    optimizer, losses = optax.sgd(RATE), make_losses(form)

    @jax.jit
    def step(params, state, batch):
        gradients = jax.grad(lambda p: jnp.mean(losses(p, batch)))(params)
        updates, state = optimizer.update(gradients, state, params)
        return optax.apply_updates(params, updates), state

    add = jax.jit(functools.partial(jax.tree.map, lambda total, new, old: total + (new - old) / participants))
    params, rng = jax.tree.map(jnp.asarray, make_params()), np.random.default_rng(2)

    def call():
        nonlocal params
        total = params
        for client in rng.choice(len(images), participants, replace=False):
            local, state = params, optimizer.init(params)
            for rows in rng.permutation(EXAMPLES).reshape(-1, BATCH):
                local, state = step(local, state, {"x": images[client][rows], "y": labels[client][rows]})
            total = add(total, local, params)
        params = total
        return params

    return call


def run_whole(form, mapping, data):
    """Return the seconds that all rounds take, compiled, and then again, from the first round on."""
    federation, taken = make_federation(form, mapping), []
    for _ in range(2):
        state, start = federation.init(make_params(), data), time.perf_counter()
        federation.fit(state, data, ROUNDS, participants=PARTICIPANTS, every=ROUNDS)
        taken.append(time.perf_counter() - start)
    return taken


def measure(participants, images, labels, mappings, seconds, least, worker):
    """Return the rows of both tables, and which of ours is the fastest."""
    clients = [{"x": x, "y": y} for x, y in zip(images, labels, strict=True)]
    data = FederatedData.from_clients(clients)
    ours = {f"ours, {form}, {mapping}": (form, mapping) for form in ("lax", "product") for mapping in mappings}
    sides = {name: make_round(*way, data, participants) for name, way in ours.items()}
    sides |= {f"Python loop, {form}": make_loop(form, images, labels, participants) for form in ("lax", "product")}
    if worker is not None:
        sides["pfl-research"] = lambda: worker.ask("round")[0]
    times = interleave(sides, seconds, least)
    best = min(ours, key=lambda name: np.median(times[name]))
    case = f"{participants} clients"
    return (
        time_rows(case, times),
        [ratio_row(case, times, name, best) for name in times if name != best],
        ours[best],
        data,
    )


def main():
    gpu = jax.default_backend() != "cpu"
    args = parse_arguments(
        __doc__,
        data=("", "the archive"),
        participants=(PARTICIPANTS, "clients in a timed round"),
        clients=(1000 if gpu else 100, "clients in all"),
        seconds=(60.0, "about how long to time rounds"),
        least=(5, "at least so many rounds of each side"),
        whole=(False, "run all 1,500 rounds in the fastest way, twice"),
        no_pfl=(False, "leave pfl-research out, which needs a package index"),
    )
    images, labels = load(args.data, args.clients)
    mappings = ["scan", min(10, args.participants), "vmap"] if gpu else ["scan", min(5, args.participants)]
    worker = None
    if not args.no_pfl:
        worker = Worker(make_environment(PEERS["pfl"][0]), "benchmarks.records.cifar_pfl")
        worker.ask("make", args.data, args.clients, args.participants)
    found = []

    def case(participants):
        *tables, best, data = measure(participants, images, labels, mappings, args.seconds, args.least, worker)
        found.extend((best, data))
        return tables

    tables = section("A round", case, [args.participants], ("round", *TIMES[1:]), ("round", *RATIOS[1:]))
    if worker is not None:
        worker.close()
    flops, moved = limit()
    intro = [
        f"All {ROUNDS:,} rounds are {flops / 1e15:.2f} PFLOP, and move {moved / 1e12:.1f} TB of weights at the least:",
        "each step reads them forwards and backwards, and reads and writes them as it adds the gradient.",
        f"On an H200 that is {flops / FLOPS:.1f} s of arithmetic as TF32, and {moved / BANDWIDTH:.1f} s of memory,",
        "but for what its cache holds.",
        "",
        "- lax: XLA's own convolution; product: nine slices side by side and one product;",
        "- scan: client by client; a number: so many at once; vmap: all at once.",
    ]
    if args.whole:
        (form, mapping), everyone = found
        first, again = run_whole(form, mapping, everyone)
        said = "reached" if again <= GOAL else "missed"
        intro += [
            "",
            f"All {ROUNDS:,} rounds in the fastest way: {first:.1f} s with compilation, {again:.1f} s without;",
            f"goal {GOAL:.0f} s: {said}.",
        ]
    write(args.results / "records" / "pfl_cifar10.md", "pfl-research's CIFAR-10 task", intro, tables)


if __name__ == "__main__":
    main()
