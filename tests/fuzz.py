"""Mutated states, messages, configurations and experiments: what comes from outside is taken or refused, nothing else.

    python -m tests.fuzz --count 1000000

Each input is a good one with some of its values replaced, removed, added or swapped, or a good text with some of its
characters so. What refuses it must raise a documented exception, say so in few words, in bounded time, and leave every
state as it was; what takes it must go on working. The counts are printed, and every fault with its number, by which
`--only` runs it again.
"""

import argparse
import collections
import contextlib
import copy
import json
import math
import random
import resource
import sys
import tempfile
import time
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

import functional_optimodules as fo
from functional_optimodules.experiments.config import Experiment
from functional_optimodules.federated import Client, Federation, Message, Server
from functional_optimodules.wire.arrays import encode_array

GRADS = {"a": jnp.array([1.0, -2.0]), "b": {"c": jnp.array(3.0)}}
DOCUMENTED = (KeyError, TypeError, ValueError, NotImplementedError, FloatingPointError)
MOST_SECONDS = 10.0
MOST_CHARACTERS = 5000
MOST_GROWTH = 2.0  # GB

_F32, _I32, _NAN = "float32", "int32", float("nan")
NUMBERS = [(0, _F32), (-1, _I32), (2**31 - 1, _I32), (1, _I32), (3e38, _F32), (_NAN, _F32), (_NAN, "bfloat16")]
VECTORS = [([1.0, _NAN], _F32), ([1.0, 2.0], "float16"), ([1, 2], "complex64"), ([True], "bool"), ([[1.0, 2.0]], _F32)]
ARRAYS = [encode_array(jnp.asarray(value, dtype)) for value, dtype in NUMBERS + VECTORS]

INTEGERS = [0, 1, -1, 2, -5, 1000, 10**6, 2**31 - 1, 2**31, 2**63, 2**64, 10**30, 10**5000, -(10**400)]
REALS = [None, True, False, 0.5, 1e-45, 1e38, -1e38, 1e300, _NAN, float("inf"), -float("inf")]
NAMES = [
    *("client", "server", "scaffold", "adam", "warmup", "optax", "sgd", "lbfgs", "contrib.dpsgd", "inf", "nan", "0x10"),
    *("", "a", "b/c", "a/b/c", _F32, "float64", "int4", "key:threefry2x32", "key:", "f8, )", "AAAA", "=", "AAAAAAAA"),
    *("x" * 2000, "A" * 100_000, "\x00", "\u00e9", "\ud800", "1e400"),
]
LISTS = [[], [0], [[]], [2**40], [-2], [True, 2], [1] * 65, ["adam", {}], ["warmup", {"base": 1, "warmup": 2}]]
CONTAINERS = [*LISTS, {}, {"a": 0}, {str(number): number for number in range(300)}, list(range(300))]
ATOMS = INTEGERS + REALS + NAMES + CONTAINERS
TEXTS = [*'=[]{}"\n,0-e.\x00', "nan", "inf", "1e999", "true", "[[" * 300, "9" * 5000]


def deep(levels: int, of: Any, keyed: bool) -> Any:
    for _ in range(levels):
        of = {"a": of} if keyed else [of]
    return of


def places(value: Any) -> list[tuple[Any, Any]]:
    """Return every container within a value, with each of its keys or indices."""
    found, pending = [], [value]
    while pending:
        node = pending.pop()
        items = node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list) else ()
        for key, inner in items:
            found.append((node, key))
            pending.append(inner)
    return found


def mutated(good: Any, rng: random.Random) -> Any:
    """Return a copy of a value of JSON with up to three of its places changed, and mostly one."""
    value = json.loads(json.dumps(good))
    for _ in range(rng.choice((1, 1, 1, 1, 1, 1, 1, 2, 2, 3)) if rng.random() > 0.03 else 0):
        found = places(value)
        if not found or rng.random() < 0.01:
            return anything(rng)
        node, key = rng.choice(found)
        change = rng.randrange(6)
        if change == 0:
            del node[key]
        elif change == 1:
            other, place = rng.choice(places(json.loads(json.dumps(good))))
            node[key] = other[place]
        elif change == 2 and isinstance(node, dict):
            node[rng.choice(NAMES)] = node.pop(key)
        elif change == 3 and isinstance(node, list):
            node.insert(key, anything(rng))
        else:
            node[key] = anything(rng)
    return value


def anything(rng: random.Random) -> Any:
    pick = rng.random()
    if pick < 0.02:
        return deep(rng.choice((50, 101, 2000)), rng.choice(INTEGERS + REALS), rng.random() < 0.5)
    return copy.deepcopy(rng.choice(ARRAYS if pick < 0.2 else ATOMS))


def mutated_text(good: str, rng: random.Random) -> str:
    """Return a text with one to three of its pieces replaced, removed, added or doubled."""
    for _ in range(rng.choice((1, 1, 2, 3))):
        start = rng.randrange(len(good) + 1)
        end = min(len(good), start + rng.choice((0, 0, 1, 3, 20)))
        middle = rng.choice((rng.choice(TEXTS), "", good[start:end] * 2, chr(rng.randrange(32, 1000))))
        good = good[:start] + middle + good[end:]
    return good


class Target(NamedTuple):
    """What takes inputs.

    Attributes:
      make: makes an input.
      take: takes it.
      state: what must be the same after a refusal.
    """

    make: Callable[[random.Random], Any]
    take: Callable[[Any], Any]
    state: Callable[[], Any]


def state_target(make: Callable[[], Any]) -> Target:
    """Restore states in a brick that has one, and in new ones; what is taken must be stepped on and saved."""
    donor, used = make(), make()
    for brick in (donor, used):
        brick.run(GRADS, params=GRADS)
    donor.on_round_start()
    good = donor.get_state()
    before = used.get_state()

    def take(saved: Any) -> None:
        used.set_state(saved)
        new = make()
        new.set_state(saved)
        if isinstance(saved, dict) and saved["params"] == good["params"]:
            new.run(GRADS, params=GRADS)
            new.get_state()
        used.set_state(before)

    return Target(lambda rng: mutated(good, rng), take, used.get_state)


def everyday_target() -> Target:
    """Build optimizers of groups, wrappers, live and watched numbers; what is built must say what it is, and step."""
    good = EVERYDAY.get_config()

    def take(config: Any) -> None:
        optimizer = fo.Optimizer.from_config(config)
        optimizer.tabulate(GRADS)
        state = optimizer.init(GRADS)
        jax.eval_shape(optimizer.update, GRADS, state, GRADS, **dict.fromkeys(optimizer.asks().step - {"lrate"}, GRADS))
        optimizer.metrics(state)
        optimizer.eval_params(state, GRADS)

    return Target(lambda rng: mutated(good, rng), take, lambda: None)


def live_target() -> Target:
    """Set live numbers of an optimizer that has a state."""
    optimizer = fo.Optimizer.from_config(EVERYDAY.get_config())
    optimizer.run(GRADS, params=GRADS)
    good = {path: float(optimizer.hyperparameters()[path]) for path, by in optimizer._driven().items() if by is None}
    before = optimizer.get_state()

    def take(values: Any) -> None:
        optimizer.set_hyperparameters(values)
        optimizer.set_state(before)

    return Target(lambda rng: mutated(good, rng), take, optimizer.get_state)


def clock_target() -> Target:
    scheduler = fo.Warmup(("warmup-rounds", {"base": ("linear-decay", {"base": 1, "rate": 0.1}), "warmup": 2}), 2)
    good = scheduler.get_state()

    def take(saved: Any) -> None:
        scheduler.set_state(saved)
        scheduler.get_next_rate()
        scheduler.set_state(good)

    return Target(lambda rng: mutated(good, rng), take, scheduler.get_state)


def server_target(known: bool) -> Target:
    """Send what clients might to a server of several modules: one that knows the parameters, or new ones."""
    client = fo.Optimizer(0.1, modules=["scaffold-client", "fedexp-client"])
    client.run(GRADS, params=GRADS, **dict.fromkeys(client.asks().step, 1.0))
    client.finish_round(**{name: GRADS if name == "delta" else 1.0 for name in client.asks().end})
    sent = client.collect_aux_var()
    good = {name: {"ann": message, "bob": message} for name, message in sent.items()}
    server = fo.Optimizer(1.0, modules=[("scaffold-server", {"num_clients": 3}), "fedexp-server"])
    if known:
        server.setup(GRADS)
    empty = server.get_state()

    def take(messages: Any) -> None:
        server.process_aux_var(messages)
        server.collect_aux_var()
        server.reset() if not known else server.set_state(empty)

    return Target(lambda rng: mutated(good, rng), take, server.get_state)


def client_target() -> Target:
    server, client = fo.ScaffoldServerModule(), fo.ScaffoldClientModule()
    for each in (server, client):
        each.setup(GRADS)
    good, before = server.collect_aux_var(), client.get_state()

    def take(message: Any) -> None:
        client.process_aux_var(message)
        client.run(GRADS)
        client.set_state(before)

    return Target(lambda rng: mutated(good, rng), take, client.get_state)


def quadratic(params: Any, batch: Any) -> Any:
    return (params["a"] ** 2).sum() * batch + params["b"]["c"]


def peers() -> tuple[Server, Client, Message, Message]:
    """Return a server and a client in the midst of a round, what the client was sent, and what it reports."""
    client, server = (fo.Optimizer(0.1, modules=[module]) for module in ("scaffold-client", "scaffold-server"))
    federation = Federation(quadratic, client, server)
    at, one = Server(federation, GRADS, ["ann", "bob"]), Client(federation, "ann", np.ones(2, np.float32))
    sent = at.broadcast()["ann"]
    one.begin(sent)
    return at, one, sent, one.report()


def carried(good: Message, rng: random.Random) -> Any:
    """Return a message in one of its forms, mutated."""
    if rng.random() < 0.5:
        return mutated(good.to_json(), rng)
    data = bytearray(good.to_bytes())
    size = int.from_bytes(data[12:16], "little")
    if rng.random() < 0.5:
        head = mutated(json.loads(zlib.decompress(data[16 : 16 + size])), rng)
        try:
            packed = zlib.compress(json.dumps(head).encode())
        except (ValueError, RecursionError):  # what Python does not write nobody can send
            return head
        begin = 16 + len(packed) + -(16 + len(packed)) % 64
        return bytes(data[:12] + len(packed).to_bytes(4, "little") + packed).ljust(begin, b"\0") + data[16 + size :]
    for _ in range(rng.choice((1, 2, 3))):
        data[rng.randrange(len(data))] = rng.randrange(256)
    return bytes(data[: rng.choice((len(data), rng.randrange(len(data))))])


def report_target() -> Target:
    server, _, _, good = peers()
    arrived = server._open.reports.arrived  # type: ignore[union-attr]

    def take(message: Any) -> None:
        server.receive("ann", message)
        arrived.clear()

    return Target(lambda rng: carried(good, rng), take, lambda: (server.round, list(arrived)))


def broadcast_target() -> Target:
    _, client, good, _ = peers()

    def take(message: Any) -> None:
        new = Client(client.federation, "ann", np.ones(2, np.float32))
        new.begin(message)
        new.report()

    return Target(lambda rng: carried(good, rng), take, lambda: None)


RATE = (
    "optax",
    {
        "schedule": "join_schedules",
        "config": {"schedules": [("warmup", {"base": 1, "warmup": 2}), 0.1], "boundaries": [2]},
    },
)
OPTIMIZERS = [
    fo.Optimizer(
        ("warmup", {"base": ("cosine-annealing", {"base": 0.1, "max_lr": 1.0, "duration": 9}), "warmup": 3}),
        0.01,
        regularizers=["fedprox", ("ridge", {"alpha": 0.1})],
        modules=["scaffold-client", ("gaussian-noise", {"std": 0.1, "seed": 3}), ("adam", {"amsgrad": True})],
    ),
    *(
        fo.Optimizer(1.0, modules=[("optax", {"transform": name, "config": config})])
        for name, config in [
            ("lion", {"b1": 0.9}),
            ("scale_by_lbfgs", {"memory_size": 5}),
            ("add_noise", {"eta": 0.1, "gamma": 0.5, "key": 1}),
            ("add_decayed_weights", {"weight_decay": 0.5, "mask": {"a": True, "b": {"c": False}}}),
            ("chain", {"args": ["momentum", ("optax", {"transform": "sgd", "config": {"learning_rate": RATE}})]}),
            ("partition", {"transforms": {"x": "adam", "y": "momentum"}, "param_labels": [("a", "x"), ("**", "y")]}),
        ]
    ),
]
EVERYDAY = fo.Optimizer(
    ("warmup", {"base": 0.1, "warmup": 2}),
    modules=["l2-global-clipping"],
    groups=[
        fo.Group("a", name="first", lrate=0.1, modules=["adam"]),
        fo.Group(["b/*", "**/c"], ndim=0, max_size=2, factor=0.5, w_decay=0.1, modules=["momentum"]),
    ],
    wrappers=[("accumulation", {"steps": 1}), "ema", "skip-non-finite"],
    live=["lrate/base", "groups/first/**", ("groups/1/modules/momentum/beta", ("warmup", {"base": 0.9, "warmup": 3}))],
    watch=["*", "groups/*/*_norm", "l2-global-clipping/clipped"],
    packed=True,
)
OPTIMIZERS.append(EVERYDAY)
CONFIGS = [optimizer.get_config() for optimizer in OPTIMIZERS]
TOML = """
seeds = [0, 1]

[rounds]
count = 3
participants = 5
batch_size = 32

[data]
source = "digits"
split = "dirichlet"
num_clients = 10
alpha = 0.3

[model]
hidden = [32, 16]

[client]
lrate = ["warmup", {base = 0.1, warmup = 10}]
modules = [["scaffold-client", {}], ["optax", {transform = "lion", config = {b1 = 0.9}}]]
regularizers = [["fedprox", {alpha = 0.01}]]

[server]
lrate = 1.0
modules = ["scaffold-server"]

[sweep]
"client.w_decay" = [0.0, 0.1]
"""


def targets(folder: Path) -> dict[str, Target]:
    """Return what takes inputs, by name."""
    nothing = lambda: None  # noqa: E731
    file = folder / "experiment.toml"

    def read(text: str) -> None:
        file.write_text(text, encoding="utf-8", errors="surrogatepass")
        Experiment.read(file)

    return {
        "state of adam": state_target(fo.AdamModule),
        "state of an optimizer": state_target(
            lambda: fo.Optimizer(fo.LinearDecay(1.0, 0.1), modules=["momentum", ("gaussian-noise", {"seed": 1})])
        ),
        "state of optax": state_target(lambda: fo.OptaxModule("scale_by_amsgrad")),
        "state of an everyday optimizer": state_target(lambda: fo.Optimizer.from_config(EVERYDAY.get_config())),
        "everyday configuration": everyday_target(),
        "live numbers": live_target(),
        "clock": clock_target(),
        "messages to a server": server_target(known=True),
        "messages to a new server": server_target(known=False),
        "message to a client": client_target(),
        "report to a server": report_target(),
        "broadcast to a client": broadcast_target(),
        "configuration": Target(lambda rng: mutated(rng.choice(CONFIGS), rng), fo.Optimizer.from_config, nothing),
        "experiment": Target(lambda rng: mutated_text(TOML, rng), read, nothing),
    }


class Report(NamedTuple):
    """What became of inputs.

    Attributes:
      counts: how many, by target and by what became of them.
      faults: one line for each fault.
      slowest: seconds of the slowest.
      growth: by how much the memory of the process grew, in GB.
    """

    counts: dict[str, collections.Counter[str]]
    faults: list[str]
    slowest: float
    growth: float


@contextlib.contextmanager
def work() -> Iterator[dict[str, Target]]:
    with tempfile.TemporaryDirectory() as folder:
        yield targets(Path(folder))


def fuzz(count: int, seed: int = 0, only: int | None = None, seconds: float = math.inf) -> Report:
    """Feed a number of inputs to all targets in turn, or as many as there is time for."""
    counts: dict[str, collections.Counter[str]] = collections.defaultdict(collections.Counter)
    faults, slowest, end = [], 0.0, time.perf_counter() + seconds
    with work() as each:
        names = list(each)
        start = _gigabytes()
        for number in range(count) if only is None else (only,):
            name = names[number % len(names)]
            target, rng = each[name], random.Random(f"{seed} {number}")
            fault, found, took = _one(target, target.make(rng))
            counts[name][found] += 1
            slowest = max(slowest, took)
            if fault:
                faults.append(f"{number}, {name}: {fault}")
            if time.perf_counter() > end:
                break
        growth = _gigabytes() - start
    if growth > MOST_GROWTH:
        faults.append(f"the memory grew by {growth:.2f} GB")
    return Report(dict(counts), faults, slowest, growth)


def _one(target: Target, given: Any) -> tuple[str, str, float]:
    before, begin = target.state(), time.perf_counter()
    fault, found = "", "taken"
    try:
        target.take(given)
    except DOCUMENTED as error:
        found = type(error).__name__
        if len(str(error)) > MOST_CHARACTERS:
            fault = f"an error of {len(str(error))} characters: {str(error)[:200]}"
    except Exception as error:
        found = type(error).__name__
        fault = f"{found}: {str(error)[:200]}"
    seconds = time.perf_counter() - begin
    if seconds > MOST_SECONDS:
        fault = f"{seconds:.1f} s"
    if target.state() != before:
        fault = f"{found}, and the state has changed"
    return fault, found, seconds


def _gigabytes() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=100_000, help="how many inputs")
    parser.add_argument("--seconds", type=float, default=math.inf, help="the most time, after which it ends early")
    parser.add_argument("--seed", type=int, default=0, help="which")
    parser.add_argument("--only", type=int, help="the number of a single one")
    arguments = parser.parse_args()
    begin = time.perf_counter()
    report = fuzz(arguments.count, arguments.seed, arguments.only, arguments.seconds)
    for name, counts in report.counts.items():
        print(f"{name}: {counts.total():,}: " + ", ".join(f"{n:,} {found}" for found, n in counts.most_common()))
    total, seconds = sum(counts.total() for counts in report.counts.values()), time.perf_counter() - begin
    print(f"{total:,} inputs in {seconds:.0f} s, the slowest {report.slowest:.2f} s, memory +{report.growth:.2f} GB")
    print(f"{len(report.faults)} faults", *report.faults[:50], sep="\n")
    return 1 if report.faults else 0


if __name__ == "__main__":
    sys.exit(main())
