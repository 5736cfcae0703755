"""This package as the oracles see it: in the simulator, as a server and clients, and as optimizers that send JSON."""

import json
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

import functional_optimodules as fo
from functional_optimodules.federated import Client, Federation, Server
from functional_optimodules.federated.protocol.message import Message
from functional_optimodules.federated.state import own_sides
from functional_optimodules.modules.personal import ditto_loss

# Steps that are given in each round, so that all rounds with as many participants are one program.
GIVEN = 7
# Their clients remember what is no message: when one is lost, they go back to the state before the round.
RESTORED = "diloco", "ef-topk", "ef-sign"


class Recipe(NamedTuple):
    """What makes a federation of an algorithm, in the names of `Federation`."""

    client: fo.Optimizer
    server: fo.Optimizer
    uplink: tuple[Any, ...] = ()
    aggregation: Any = "mean"
    local: tuple[str, ...] = ()


def recipe(algorithm, num_clients, hyper):
    """Return the recipe of an algorithm.

    Raises:
      NotImplementedError: if the package has none.
    """
    lrate, server_lrate = hyper["lrate"], hyper.get("server_lrate", 1.0)

    def client(*modules, regularizers=(), w_decay=0.0):
        return fo.Optimizer(lrate, w_decay, regularizers, modules)

    def server(*modules):
        return fo.Optimizer(server_lrate, modules=modules)

    def chosen(*names):
        return {name: hyper[name] for name in names}

    def proximal(weight):
        return [("fedprox", {"alpha": hyper[weight]})] if hyper.get(weight) else []

    descent = client()
    if hyper.get("momentum") and algorithm in ("fedavg", "fednova"):
        descent = client(("momentum", {"beta": hyper["momentum"], "round_reset": True}))
    match algorithm:
        case "fedavg":
            return Recipe(descent, server())
        case "fedprox":
            return Recipe(client(regularizers=proximal("mu")), server())
        case "fednova":
            if hyper["mu"]:
                descent = client(regularizers=proximal("mu"))
            uplink = ("fednova-client", {"momentum": hyper["momentum"], "proximal": lrate * hyper["mu"]})
            return Recipe(descent, server("fednova-server"), (uplink,))
        case "fedexp":
            return Recipe(descent, server(("fedexp-server", chosen("eps"))), ("fedexp-client",))
        case "ditto":
            if hyper["personal_lrate"] != lrate:
                raise NotImplementedError("both models are trained at the same rate")
            ditto = ("ditto", {"alpha": hyper["lam"]})
            return Recipe(client(regularizers=[ditto]), server(), local=("personal/**",))
        case "fedavgm":
            return Recipe(descent, server(("fedavgm", {"beta": hyper["server_momentum"]})))
        case "fedadam" | "fedyogi" | "fedadagrad":
            betas = ("beta_1",) if algorithm == "fedadagrad" else ("beta_1", "beta_2")
            return Recipe(descent, server((algorithm, chosen(*betas, "tau"))))
        case "fedacg":
            return Recipe(client(regularizers=proximal("beta")), server(("fedacg", {"momentum": hyper["lam"]})))
        case "diloco":
            adam = ("adam", chosen("beta_1", "beta_2", "eps"))
            outer = ("momentum", {"beta": hyper["server_momentum"], "nesterov": True})
            return Recipe(client(adam, w_decay=lrate * hyper["w_decay"]), server(outer))
        case "scaffold":
            return Recipe(client("scaffold-client"), server(("scaffold-server", {"num_clients": num_clients})))
        case "feddyn":
            dual = ("feddyn-client", chosen("alpha"))
            return Recipe(client(dual), server(("feddyn-server", {"num_clients": num_clients})))
        case "mime" | "mimelite":
            return Recipe(client(f"{algorithm}-client"), server(("mime-server", {"beta_1": hyper["momentum"]})))
        case "scaffnew":
            return Recipe(client(("scaffnew", {"probability": hyper["p"]})), server())
        case "fedcm":
            return Recipe(client(("fedcm-client", chosen("alpha"))), server("fedcm-server"))
        case "median":
            return Recipe(descent, server(), aggregation="median")
        case "trimmed-mean":
            return Recipe(descent, server(), aggregation=("trimmed-mean", {"share": hyper["beta"]}))
        case "krum":
            return Recipe(descent, server(), aggregation=("krum", {"attackers": int(hyper["byzantine"])}))
        case "multi-krum":
            config = {"attackers": int(hyper["byzantine"]), "selected": int(hyper["chosen"])}
            return Recipe(descent, server(), aggregation=("multi-krum", config))
        case "geometric-median":
            # The mean that Weiszfeld's passes begin at is a pass too.
            config = {"passes": 1 + int(hyper["passes"]), "smoothing": hyper["smoothing"]}
            return Recipe(descent, server(), aggregation=("geometric-median", config))
        case "centered-clipping":
            config = {"passes": int(hyper["passes"]), "radius": hyper["radius"]}
            return Recipe(descent, server(), aggregation=("centered-clipping", config))
        case "ef-topk":
            return Recipe(descent, server(), (("top-k", {"fraction": hyper["k"] / 3}),))
        case "ef-sign":
            return Recipe(descent, server(), ("sign",))
        case "fedbuff":
            raise NotImplementedError("who takes part is not given, but follows from a clock")
    raise NotImplementedError(f"the package has no {algorithm}")


def loss(params, batch):
    away = params["w"] - batch["centre"]
    return jnp.einsum("bd,bde,be->b", away, batch["curvature"], away) / 2


PERSONAL_LOSS = ditto_loss(loss)
one_round = jax.jit(Federation.round, static_argnums=0)


class Simulation(NamedTuple):
    """A federation of the simulator."""

    federation: Federation
    state: Any
    problem: Any
    hyper: Any


class Simulator:
    """The adapter of `Federation`."""

    def make(self, algorithm, problem, hyper):
        made = recipe(algorithm, problem.num_clients, hyper)
        params = {"w": jnp.asarray(problem.start, jnp.float32)}
        if algorithm == "ditto":
            params = {"shared": params, "personal": params}
        federation = Federation(PERSONAL_LOSS if algorithm == "ditto" else loss, **made._asdict())
        return Simulation(federation, federation.init(params, problem.num_clients), problem, hyper)

    def round(self, run, plan):
        problem, who, lost = run.problem, plan.participants, plan.dropped
        if len(who) > 2:
            # One program more for rounds of two, where others are not asked, and one for all else, where they drop out.
            others = tuple(set(range(problem.num_clients)) - set(who))
            who, lost = who + others, lost + others
        who = np.array(who)
        order = np.arange(GIVEN) % problem.num_batches
        centres = problem.centres[who][:, order]
        curvatures = np.broadcast_to(problem.curvatures[who][:, None], (*centres.shape, centres.shape[-1]))
        data = {"centre": centres[:, :, None], "curvature": curvatures[:, :, None]}
        state, _ = one_round(
            run.federation,
            run.state,
            jax.tree.map(np.float32, data),
            who,
            num_steps=np.array(plan.steps, np.int32)[who],
            weights=np.float32(problem.weights[who]),
            dropped=np.isin(who, lost),
        )
        return run._replace(state=state)

    def params(self, run):
        params = run.state.params
        return np.asarray(params.get("shared", params)["w"])

    def variates(self, run):
        """Return what the algorithm keeps besides, as the oracle names it."""
        clients = range(run.problem.num_clients)
        if "shared" in run.state.params:
            own = [run.federation.model(run.state, client)["personal"]["w"] for client in clients]
            return {"personal": np.array(own)}
        sides = own_sides(run.federation, run.state)
        held = sides.client.hold(run.state.params)
        rows = [[leaf[slot] for leaf in run.state.bank] for slot in run.state.slots]
        # Some learn of the round that was when the next one begins.
        begun = [sides.client.begin_round(sides.restored(row, held).client, held) for row in rows]
        return shown(run.hyper, run.state.server, [sides.client.portable(state) for state in begun])


def shown(hyper, server, clients):
    """Return the variates by the oracles' names, from the states of the server's optimizer and of the clients'."""
    found = {}
    for name, variate in {"scaffold-client": "c_i", "feddyn-client": "h_i", "scaffnew": "h_i"}.items():
        if clients and name in clients[0].modules:
            found[variate] = np.array([state.modules[name].local["w"] for state in clients])
    if "scaffold-server" in server.modules:
        found["c"] = np.asarray(server.modules["scaffold-server"].total["w"]) / len(clients)
    if "feddyn-server" in server.modules:
        found["h"] = hyper["alpha"] * np.asarray(server.modules["feddyn-server"].excess["w"])
    return found


class Deployment:
    """Peers that keep their own state, and send nothing but JSON."""

    def __init__(self, algorithm, problem, hyper):
        made, self.problem = recipe(algorithm, problem.num_clients, hyper), problem
        if made.local or made.aggregation != "mean":
            raise NotImplementedError("the stateful side has no aggregation, and keeps no part of a model")
        self.params = {"w": jnp.asarray(problem.start, jnp.float32)}
        self.server = sent_as_json(made.server)
        self.server.setup(self.params)
        self.clients = [sent_as_json(made.client) for _ in range(problem.num_clients)]
        self.uplinks = [sent_as_json(fo.Optimizer(1.0, modules=made.uplink)) for _ in self.clients]
        self.restores = algorithm in RESTORED
        if self.restores:
            for optimizer in (*self.clients, *self.uplinks):
                optimizer.setup(self.params)

    def gradient(self, client, params, step=None):
        return {"w": jnp.asarray(self.problem.gradient(client, np.float64(params["w"]), step), jnp.float32)}

    def mean(self, trees, clients):
        weights = self.problem.weights[list(clients)]
        return jax.tree.map(lambda *leaves: jnp.float32(np.average(leaves, axis=0, weights=weights)), *trees)

    def train(self, client, x, broadcast, steps, shared):
        """Take a client's round: return its delta, and its message."""
        optimizer, uplink, y = self.clients[client], self.uplinks[client], x
        optimizer.start_round()
        uplink.start_round()
        if broadcast:
            optimizer.process_aux_var(broadcast)
        asked = optimizer.asks().step
        for step in range(steps):
            if "anchor_gradient" in asked:
                shared = {**shared, "anchor_gradient": self.gradient(client, x, step)}
            y = optimizer.apply_gradients(y, self.gradient(client, y, step), **shared)
        delta = jax.tree.map(jnp.subtract, y, x)
        known = {
            "delta": delta,
            "num_steps": jnp.int32(steps),
            "weight": jnp.float32(self.problem.weights[client]),
            "full_gradient": self.gradient(client, x),
        }
        optimizer.finish_round(**{name: known[name] for name in optimizer.asks().end})
        known = {name: known[name] for name in uplink.asks().step}
        sent = uplink.compute_updates_from_gradients(x, jax.tree.map(jnp.negative, delta), **known)
        return sent, as_json(optimizer.collect_aux_var() | uplink.collect_aux_var())

    def round(self, plan):
        broadcast, x, shared = as_json(self.server.collect_aux_var()), self.server.share_params(self.params), {}
        if any("mean_gradient" in optimizer.asks().step for optimizer in self.clients):
            shared["mean_gradient"] = self.mean([self.gradient(i, x) for i in plan.arrived], plan.arrived)
        deltas, uploads = [], {}
        for client in plan.participants:
            sides = self.clients[client], self.uplinks[client]
            states = [as_json(side.get_state()) for side in sides] if self.restores else []
            delta, message = self.train(client, x, broadcast, plan.steps[client], shared)
            if client not in plan.dropped:
                deltas.append(delta)
                uploads[str(client)] = message
                continue
            for side in sides:
                side.retract_aux_var()
            for side, state in zip(sides, states, strict=self.restores):
                side.set_state(state)
        if any(uploads.values()):
            self.server.process_aux_var(uploads)
        gradients = jax.tree.map(jnp.negative, self.mean(deltas, plan.arrived))
        known = {"joined": jnp.float32(len(deltas))} if "joined" in self.server.asks().step else {}
        self.params = self.server.apply_gradients(self.params, gradients, **known)


class Peers:
    """The adapter of the stateful side."""

    def make(self, algorithm, problem, hyper):
        return Deployment(algorithm, problem, hyper)

    def round(self, run, plan):
        run.round(plan)
        return run

    def params(self, run):
        return np.asarray(run.params["w"])


class Messages:
    """The adapter of `Server` and `Client`, between which bytes go; the clients' loops are the problem's own."""

    def make(self, algorithm, problem, hyper):
        made, params = recipe(algorithm, problem.num_clients, hyper), {"w": jnp.asarray(problem.start, jnp.float32)}
        if algorithm == "ditto":
            params = {"shared": params, "personal": params}
        federation = Federation(loss, **made._asdict())
        names = [str(client) for client in range(problem.num_clients)]
        server = Server(federation, params, names)
        return server, [Client(federation, name) for name in names], problem, hyper

    def round(self, run, plan):
        server, clients, problem, _ = run
        names = [str(client) for client in plan.participants]
        weights = {name: float(problem.weights[int(name)]) for name in names}
        finished = None
        while finished is None:
            for name, message in server.broadcast(names, weights).items():
                number = int(name)
                report = self.work(clients[number], number, message.to_bytes(), plan.steps[number], problem)
                if number not in plan.dropped:
                    server.receive(name, report.to_bytes())
            finished = server.finish_round()
        return run

    def work(self, client, number, message, steps, problem):
        """Take a client's round, or its first pass, and return its report."""

        def gradient(at, step=None):
            return jax.tree.map(lambda w: jnp.float32(problem.gradient(number, np.float64(w), step)), at)

        start = at = client.begin(message)
        if Message.from_bytes(message).about["kind"] == "first":
            return client.report(gradient=gradient(start))
        for step in range(steps):
            at = client.apply_gradients(gradient(at, step), anchor_gradient=gradient(start, step))
        return client.report(full_gradient=gradient(start))

    def params(self, run):
        params = run[0].params
        return np.asarray(params.get("shared", params)["w"])


def as_json(value):
    return json.loads(json.dumps(value, allow_nan=False))


def sent_as_json(optimizer):
    """Return an optimizer that was made from another's configuration as text."""
    return fo.Optimizer.from_config(as_json(optimizer.get_config()))
