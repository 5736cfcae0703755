"""What the places of a federated round cost: clipping and compression on the uplink, medians instead of means.

    python -m benchmarks.rounds.places

100 clients of 100 examples, batches of 20, one local epoch, a 784-64-10 perceptron: rounds
of one federation after the other, in turn in one process, each beside plain federated
averaging, which stands there twice: what it differs from itself is noise.
"""

import functools

import jax
import jax.numpy as jnp

import functional_optimodules as fo
from benchmarks.report import parse_arguments, section, write
from benchmarks.rounds.problem import BATCH, RATE, losses, make_clients, make_params
from benchmarks.timing import RATIOS, TIMES, at_most, interleave, ratio_row, time_rows
from functional_optimodules.federated import FederatedData, Federation

PLAIN = "federated averaging"
OPTIONS = {
    PLAIN: {},
    f"{PLAIN}, again": {},
    "uplink: l2-global-clipping": {"uplink": ["l2-global-clipping"]},
    "uplink: top-k with error feedback": {"uplink": ["top-k"]},
    "uplink: qsgd": {"uplink": [("qsgd", {"seed": 0})]},
    "uplink: sign": {"uplink": ["sign"]},
    "uplink: powersgd": {"uplink": ["powersgd"]},
    "aggregation: norm-bounded-mean": {"aggregation": ("norm-bounded-mean", {"bound": 1.0})},
    "aggregation: geometric-median": {"aggregation": "geometric-median"},
    "aggregation: median": {"aggregation": "median"},
    "aggregation: trimmed-mean": {"aggregation": "trimmed-mean"},
    "aggregation: krum": {"aggregation": ("krum", {"attackers": 10})},
}
TARGETS = {
    "uplink: l2-global-clipping": 1.05,
    "uplink: top-k with error feedback": 2.0,
    "aggregation: median": 2.0,
}


def make_round(options, data):
    """Return a function that runs a round from where the last one ended."""
    federation = Federation(losses, fo.Optimizer(RATE), batch_size=BATCH, **options)
    step = jax.jit(lambda state, data, who: federation.round(state, data, who), donate_argnums=0)
    state, everyone = federation.init(make_params("perceptron"), data), jnp.arange(data.num_clients)

    def call():
        nonlocal state
        state, metrics = step(state, data, everyone)
        return metrics

    return call


def measure(participants, seconds):
    """Return the rows of both tables."""
    data = FederatedData.from_clients(make_clients(participants))
    times = interleave({name: make_round(options, data) for name, options in OPTIONS.items()}, seconds)
    case = f"{participants} clients"
    ratios = []
    for name in list(OPTIONS)[1:]:
        target = at_most(TARGETS[name]) if name in TARGETS else {}
        ratios.append(ratio_row(case, times, name, PLAIN, **target))
    return time_rows(case, times), ratios


def main():
    args = parse_arguments(__doc__, participants=(100, "clients in a round"), seconds=(60.0, "how long to time"))
    case = functools.partial(measure, seconds=args.seconds)
    headers = ("round", *TIMES[1:]), ("round", *RATIOS[1:])
    tables = section("A round", case, [args.participants], *headers)
    intro = ["100 examples a client, batches of 20, one epoch; a 784-64-10 perceptron of 50,890 parameters."]
    write(args.results / "rounds" / "places.md", "What the places of a round cost", intro, tables)


if __name__ == "__main__":
    main()
