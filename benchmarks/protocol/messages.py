"""What messages between machines cost: a large report beside copying memory, and rounds of small clients over TCP.

    python -m benchmarks.protocol.messages

A report of 25 M parameters in the binary form: written (`to_bytes`), read and taken in (`receive`), and a copy of the
same bytes, in turn. Then rounds of 100 clients with a linear model of 784 x 10 and SCAFFOLD: the server in this
process and the clients in another one, a TCP connection on loopback between them, one message after the other. What
a client takes outside of its training is the round's time less that of its steps, by the number of clients.
"""

import multiprocessing
import socket
import struct
import time

import jax.numpy as jnp
import numpy as np

import functional_optimodules as fo
from benchmarks.report import parse_arguments, table, write
from benchmarks.timing import interleave, ratio
from functional_optimodules.federated import Client, Federation, Server

_SIZE = struct.Struct("<Q")
LEAST_OF_COPY, MOST_MS = 0.5, 5.0


def loss(params, batch):
    return ((batch["x"] @ params["w"] - batch["y"]) ** 2).sum(-1)


def large(parameters):
    """Return a server, a client's report to it, and that in bytes."""
    params = {"w": jnp.zeros((parameters // 100, 100))}
    server = Server(Federation(loss, fo.Optimizer(0.1)), params, ["one"])
    client = Client(server.federation, "one")
    client.begin(server.broadcast()["one"])
    gradients = np.random.default_rng(0).normal(size=params["w"].shape).astype(np.float32)
    client.apply_gradients({"w": jnp.asarray(gradients)})
    report = client.report()
    return server, report, report.to_bytes()


def time_large(parameters, seconds):
    server, report, data = large(parameters)
    target, source = np.empty(len(data), np.uint8), np.frombuffer(data, np.uint8)
    sides = {
        "copy": lambda: np.copyto(target, source),
        "receive": lambda: server.receive("one", data),
        "to_bytes": report.to_bytes,
    }
    return interleave(sides, seconds), len(data) / report.nbytes


def federation(clients):
    client = fo.Optimizer(0.05, modules=["scaffold-client"])
    server = fo.Optimizer(1.0, modules=[("scaffold-server", {"num_clients": clients})])
    return Federation(loss, client, server, batch_size=10)


def read(connection):
    (size,) = _SIZE.unpack(_exactly(connection, _SIZE.size))
    return _exactly(connection, size)


def _exactly(connection, size):
    data = bytearray(size)
    view, done = memoryview(data), 0
    while done < size:
        done += connection.recv_into(view[done:])
    return data


def send(connection, data):
    connection.sendall(_SIZE.pack(len(data)) + data)


def serve_clients(port, names):
    """Answer each message for a client by its report, and by how long its steps took."""
    rng = np.random.default_rng(0)
    examples = {
        name: {"x": rng.normal(size=(20, 784)).astype(np.float32), "y": rng.normal(size=(20, 10)).astype(np.float32)}
        for name in names
    }
    clients = {name: Client(federation(len(names)), name, data) for name, data in examples.items()}
    with socket.create_connection(("127.0.0.1", port)) as connection:
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        while name := read(connection).decode():
            client = clients[name]
            client.begin(read(connection))
            start = time.perf_counter()
            client.fit()
            taken = time.perf_counter() - start
            send(connection, client.report().to_bytes())
            send(connection, struct.pack("<d", taken))


def time_rounds(clients, rounds):
    """Return, of each round, the milliseconds that a client took, and those of its training."""
    names = [f"client-{number}" for number in range(clients)]
    server = Server(federation(clients), {"w": jnp.zeros((784, 10))}, names)
    found = []
    with socket.create_server(("127.0.0.1", 0)) as listener:
        process = multiprocessing.get_context("spawn").Process(
            target=serve_clients, args=(listener.getsockname()[1], names)
        )
        process.start()
        connection, _ = listener.accept()
        with connection:
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            for _ in range(rounds + 2):
                start, trained = time.perf_counter(), 0.0
                for name, message in server.broadcast().items():
                    send(connection, name.encode())
                    send(connection, message.to_bytes())
                    server.receive(name, read(connection))
                    trained += struct.unpack("<d", read(connection))[0]
                server.finish_round()
                found.append(1e3 * np.array([time.perf_counter() - start, trained]) / clients)
            send(connection, b"")
        process.join()
    return np.array(found[2:])  # the first two compile


def main():
    args = parse_arguments(
        __doc__,
        parameters=(25_000_000, "of the large report"),
        clients=(100, "of a round"),
        rounds=(20, "to time"),
        seconds=(20.0, "about how long to time the large report"),
    )
    times, size = time_large(args.parameters, args.seconds)
    rows = []
    for name in ("receive", "to_bytes"):
        speed, low, high = ratio(times["copy"], times[name])
        target = (
            (f">= {LEAST_OF_COPY}", "reached" if speed >= LEAST_OF_COPY else "missed")
            if name == "receive"
            else ("", "")
        )
        rows.append((name, f"{speed:.2f}", f"{low:.2f} to {high:.2f}", *target))
    rows.append(
        ("bytes of the message / of its arrays", f"{size:.4f}", "", "<= 1.05", "reached" if size <= 1.05 else "missed")
    )
    rounds = time_rounds(args.clients, args.rounds)
    outside, trained = np.median(rounds[:, 0] - rounds[:, 1]), np.median(rounds[:, 1])
    verdict = "reached" if outside <= MOST_MS else "missed"
    write(
        args.results / "protocol" / "messages.md",
        "Messages between machines",
        ["Written by `python -m benchmarks.protocol.messages`."],
        [
            f"## A report of {args.parameters / 1e6:g} M parameters, beside a copy of its bytes",
            "",
            *table(("what", "speed over that of a copy", "90 % interval", "target", ""), rows),
        ],
        [
            f"## A round of {args.clients} clients over TCP on loopback, one after the other",
            "",
            *table(
                ("ms a client, median of rounds", "", "target", ""),
                [
                    ("outside of training", f"{outside:.2f}", f"<= {MOST_MS:g}", verdict),
                    ("training", f"{trained:.2f}", "", ""),
                    ("rounds", str(len(rounds)), "", ""),
                ],
            ),
        ],
    )


if __name__ == "__main__":
    main()
