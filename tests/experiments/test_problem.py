"""Problems of one's own: what a factory is given, what it may return, and what is said where it is wrong."""

import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import functional_optimodules as fo
from functional_optimodules.cli import main
from functional_optimodules.experiments.config import Experiment
from functional_optimodules.experiments.grouping import simulation_of
from functional_optimodules.experiments.problem import make_problem
from functional_optimodules.experiments.run import read_experiment, run_experiment
from functional_optimodules.experiments.sweep import trials
from functional_optimodules.federated.aggregation import Aggregator

Write = Callable[..., Path]


def run(path: Path) -> list[dict[str, Any]]:
    return run_experiment(path, path.parent / "out", say=lambda line: None, progress=False)


def test_a_factory_gets_its_arguments_and_the_seed_and_the_folder_if_it_asks(tmp_path: Path) -> None:
    (tmp_path / "asking.py").write_text(
        "from functional_optimodules.experiments import Problem\n"
        "def make(seed, folder, size=1, **more): return Problem((seed, folder, size, more), len, [])\n"
        "def plain(): return Problem(0.0, len, [])\n"
    )
    problem = make_problem({"factory": "asking:make", "size": 2, "other": "x"}, 5, tmp_path)
    assert problem.params == (5, tmp_path, 2, {"other": "x"})
    assert make_problem({"factory": "asking:plain"}, 5, tmp_path).params == 0.0


@pytest.mark.slow
def test_the_history_has_norms_and_bytes_that_are_those_of_the_formulas(regression: Write) -> None:
    path = regression(
        ('modules = [["momentum", { beta = 0.5 }]]', ""),
        ("participants = 2\nbatch_size = 2", 'uplink = [["top-k", { fraction = 0.25 }]]'),
        ("count = 4", "count = 1"),
    )
    (row,) = run(path)
    shares = make_problem({"factory": "regression:make"}, 3, path.parent).data
    # With zeros to begin from and one step on all of a client's examples, the residuals are the labels.
    gradients = [
        np.append(-2 * (each["x"] * each["y"][:, None]).mean(axis=0), -2 * each["y"].mean()) for each in shares
    ]
    sizes = np.array([len(each["y"]) for each in shares])
    drifts = [0.05 * np.linalg.norm(gradient) for gradient in gradients]
    assert row["drift"] == pytest.approx(np.average(drifts, weights=sizes), rel=1e-5)
    assert row["loss"] == pytest.approx(
        np.average([(each["y"] ** 2).mean() for each in shares], weights=sizes), rel=1e-5
    )
    assert 0 < row["update_norm"] < np.mean(drifts)
    assert row["bytes_down"] == 4 * 4 * 4
    bits = row["uplink/top-k/bits"]
    assert row["bytes_up"] == -(-4 * bits // 8) < 4 * 4 * 4


@pytest.mark.slow
def test_bytes_count_what_scaffold_sends_beside_the_parameters(regression: Write) -> None:
    path = regression(
        ('modules = [["momentum", { beta = 0.5 }]]', 'modules = ["scaffold-client"]'),
        more='[server]\nlrate = 1.0\nmodules = [["scaffold-server", { num_clients = 4 }]]\n',
    )
    row = run(path)[0]
    assert row["bytes_down"] == 2 * (16 + 16)
    assert row["bytes_up"] == 2 * (16 + 16 + 4)  # a variate, and a count of clients


FLAX = """
from flax import linen, nnx
import jax, jax.numpy as jnp, numpy as np
from functional_optimodules.experiments import Problem

DATA = [{"x": np.ones((4, 2), np.float32) * k, "y": np.arange(4) % 2} for k in range(3)]

class Net(nnx.Module):
    def __init__(self, rngs):
        self.linear, self.norm = nnx.Linear(2, 2, rngs=rngs), nnx.BatchNorm(2, rngs=rngs)
    def __call__(self, x):
        return self.linear(self.norm(x))

class Linen(linen.Module):
    @linen.compact
    def __call__(self, x):
        return linen.Dense(2)(x)

def loss(model, batch):
    return -jax.nn.log_softmax(model(batch["x"]))[jnp.arange(batch["y"].shape[0]), batch["y"]]

def right(model):
    return {"sum": model(jnp.ones((1, 2))).sum()}

def make_nnx(seed):
    return Problem(Net(nnx.Rngs(seed)), loss, DATA, evaluate=right)

def make_linen(seed):
    net = Linen()
    return Problem(net.init(jax.random.key(seed), jnp.ones((1, 2))), loss, DATA, test=DATA[0], module=net)
"""


@pytest.mark.slow
@pytest.mark.parametrize(("factory", "metric"), [("nnx", "sum"), ("linen", "test_loss")])
def test_flax_models_are_problems_as_they_are_and_seeds_share_a_program(
    regression: Write, factory: str, metric: str
) -> None:
    path = regression(
        ("regression:make", f"models:make_{factory}"),
        ("seed = 3", "seeds = [3, 4]"),
        ("batch_size = 2", 'batch_size = 2\nremainder = "wrap"'),
    )
    (path.parent / "models.py").write_text(FLAX)
    rows = run(path)
    assert len(rows) == 2 * 4
    assert np.isfinite([row[metric] for row in rows]).all()


@pytest.mark.parametrize(
    ("factory", "message"),
    [
        ("broken", r"factory='broken' should be 'module:function', or one of 'digits', 'npz'"),
        ("nowhere:make", r"there is no module 'nowhere', in .* or installed"),
        ("broken:mak", r"broken.py has no function 'mak': did you mean 'make'"),
        ("broken:value", r"broken.py has no function 'value'"),
        ("broken:asks", r"broken:asks needs a value for 'width'"),
        (
            "broken:raises",
            r"(?s)broken:raises\(\) raised ZeroDivisionError: .*broken.py\", line 6, in inner\n.*return 1 / 0",
        ),
        ("unimportable:make", r"(?s)the import of unimportable raised ImportError: no!\n.*unimportable.py\", line 1"),
        ("broken:nothing", r"broken:nothing, at .*broken.py:7, returned NoneType: expected .*Problem"),
        ("broken:loss", r"returned loss=3: expected a function"),
        ("broken:data", r"returned data of type ndarray: expected FederatedData, or a list of clients' examples"),
        ("broken:test", r"returned test examples of shapes \[\[2\], \[3\]\]: expected arrays with as many"),
        ("broken:empty", r"FederatedData: there is no client"),
        ("broken:uneven", r"client 1 has examples of float32\[3\]"),
        ("broken:integers", r"among the parameters, .* is of int"),
        ("broken:measure", r"`evaluate` returned .*: expected numbers by name"),
        ("broken:divides", r"(?s)ZeroDivisionError: division by zero\n +File .*broken.py\", line 23, in <lambda>"),
        ("broken:text", r"data of type str: expected FederatedData"),
        ("broken:words", r"\[problem\]: params\['w'\] is no array: .*'abc'"),
        ("broken:clash", r"`evaluate` returns a metric 'loss', which a round has too"),
        ("broken:wrong", r"(?s)KeyError: 'z'\n.*broken.py\", line 21, in bad_loss\n +return {'x': batch}\['z'\]"),
    ],
)
def test_a_factory_that_is_wrong_is_refused_and_the_error_shows_where(
    regression: Write, capsys: pytest.CaptureFixture[str], factory: str, message: str
) -> None:
    path = regression(("regression:make", factory))
    (path.parent / "unimportable.py").write_text("raise ImportError('no!')\n")
    (path.parent / "broken.py").write_text(
        "import numpy as np\n"
        "from functional_optimodules.experiments import Problem\n"
        "value = 3\n"
        "def make(): ...\n"
        "def raises(): return inner()\n"
        "def inner(): return 1 / 0\n"
        "def nothing(): ...\n"
        "def asks(width): ...\n"
        "X = np.ones((2, 2), np.float32)\n"
        "W = np.ones(2, np.float32)\n"
        "def fine(w, x): return x @ w\n"
        "def loss(): return Problem(W, 3, [X])\n"
        "def data(): return Problem(W, fine, X)\n"
        "def test(): return Problem(W, fine, [X], test=(np.ones(2), np.ones(3)))\n"
        "def empty(): return Problem(W, fine, [])\n"
        "def uneven(): return Problem(W, fine, [X, np.ones((2, 3), np.float32)])\n"
        "def integers(): return Problem(np.ones(2, int), fine, [X] * 2)\n"
        "def measure(): return Problem(W, fine, [X] * 2, evaluate=lambda params: params)\n"
        "def clash(): return Problem(W, fine, [X] * 2, evaluate=lambda params: {'loss': params.sum()})\n"
        "def bad_loss(w, batch):\n"
        "    return {'x': batch}['z']\n"
        "def wrong(): return Problem(W, bad_loss, [X] * 2)\n"
        "def divides(): return Problem(W, fine, [X] * 2, evaluate=lambda params: 1 / 0)\n"
        "def text(): return Problem(W, fine, 'abc')\n"
        "def words(): return Problem({'w': 'abc'}, fine, [X] * 2)\n"
    )
    assert main(["run", str(path), "--output", str(path.parent / "out")]) == 2
    error = capsys.readouterr().err
    assert re.search(message, error), error
    assert not (path.parent / "out").exists()


def test_the_module_of_a_factory_is_found_beside_the_file_and_the_path_stays_as_it_was(regression: Write) -> None:
    before = list(sys.path)
    simulation_of(Experiment.read(path := regression()), path.parent)
    assert sys.path == before


BRICKS = """
import jax
import functional_optimodules as fo
from functional_optimodules.federated.aggregation import MeanAggregator
from regression import make

class Divided(fo.OptiModule):
    "u = g / by."
    name = "divided-here"
    by: float = 2.0
    def init(self, params): return ()
    def update(self, updates, state, params=None, **extra_args):
        return jax.tree.map(lambda leaf: leaf / self.by, updates), state

class Pulled(fo.Regularizer):
    "g + x."
    name = "pulled-here"
    def init(self, params): return ()
    def update(self, updates, state, params=None, **extra_args):
        return jax.tree.map(lambda g, x: g + x, updates, params), state

class Plain(MeanAggregator):
    "The mean."
    name = "plain-here"
"""


@pytest.fixture
def bricks(regression: Write, monkeypatch: pytest.MonkeyPatch) -> Write:
    """Return what writes a file whose factory is in a module that declares plug-ins, which are forgotten afterwards."""
    for kind in (fo.OptiModule, fo.Regularizer, Aggregator):
        monkeypatch.setattr(kind, "_registry", dict(kind._registry))
    monkeypatch.delitem(sys.modules, "bricks", raising=False)

    def write(*changes: tuple[str, str], more: str = "") -> Path:
        path = regression(("regression:make", "bricks:make"), *changes, more=more)
        (path.parent / "bricks.py").write_text(BRICKS)
        return path

    return write


def test_what_the_module_of_the_factory_declares_the_file_names(bricks: Write) -> None:
    path = bricks(
        ('["momentum", { beta = 0.5 }]', '["divided-here", { by = 4.0 }]'),
        ("lrate = 0.05", 'lrate = 0.05\nregularizers = ["pulled-here"]'),
        ("participants = 2", 'participants = 2\naggregation = "plain-here"'),
        more='[sweep]\nclient.modules = [["divided-here"], [["divided-here", { by = 8.0 }]]]\n',
    )
    experiment, _ = read_experiment(path, ["client.regularizers=['pulled-here', 'ridge']"])
    assert experiment.get_config()["client"]["modules"] == [["divided-here", {"by": 4.0}]]
    assert [brick.name for brick in experiment.client.regularizers] == ["pulled-here", "ridge"]
    assert experiment.rounds.aggregation.name == "plain-here"
    first, second = (trial.experiment.client.modules[0] for trial in trials(experiment))
    assert (first.by, second.by) == (2.0, 8.0)


@pytest.mark.slow
def test_a_run_with_such_a_brick_is_that_with_the_library_s(bricks: Write, regression: Write) -> None:
    rows = run(bricks(('["momentum", { beta = 0.5 }]', '"divided-here"')))
    path = regression(("lrate = 0.05", "lrate = 0.025"), ('["momentum", { beta = 0.5 }]', ""))
    for row, expected in zip(rows, run_experiment(path, path.parent / "same", progress=False), strict=True):
        assert row == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize(
    ("changes", "more", "message"),
    [
        (
            [('"momentum"', '"divided-her"')],
            "",
            r"no module is named 'divided-her': did you mean 'divided-here'.* "
            r"\(imported: functional_optimodules and bricks\)",
        ),
        (
            [("participants = 2", 'participants = 2\naggregation = "plain-her"')],
            "",
            r"no aggregator is named 'plain-her': did you mean 'plain-here'\? \(imported: .* and bricks\)",
        ),
        (
            [],
            '[sweep]\n"client.modules.0" = ["adam", "divided-her"]',
            r"\[sweep\]: .* no module is named 'divided-her'.*\(imported: functional_optimodules and bricks\)",
        ),
        (
            [("bricks:make", "regression:make"), ('"momentum"', '"divided-here"')],
            "",
            r"\(imported: functional_optimodules and regression\)$",
        ),
        ([("bricks:make", "digits"), ('"momentum"', '"divided-here"')], "", r"\(imported: functional_optimodules\)$"),
    ],
)
def test_a_plug_in_that_nobody_declares_is_named_with_the_modules_that_were_imported(
    bricks: Write, capsys: pytest.CaptureFixture[str], changes: list[tuple[str, str]], more: str, message: str
) -> None:
    assert main(["run", str(bricks(*changes, more=more)), "--dry-run"]) == 2
    assert re.search(message, capsys.readouterr().err.strip())


@pytest.mark.parametrize(
    ("table", "message"),
    [
        ("[problem]\nwidth = 3", "needs a value for 'factory'"),
        ("[problem]\nfactory = 3", "factory=3 should be of type str"),
        ('[problem]\nfactory = "digits"\n[data]\nsplit = "iid"', r"both \[problem\] and \[data\]"),
        ('[problem]\nfactory = "digits"\nsplitt = "iid"', "no field 'splitt': did you mean 'split'"),
        ('[problem]\nfactory = "npz"', "source='npz' needs a 'path'"),
    ],
)
def test_a_table_that_is_wrong_is_refused(tmp_path: Path, table: str, message: str) -> None:
    path = tmp_path / "experiment.toml"
    path.write_text(f"{table}\n[client]\nlrate = 0.1\n[rounds]\ncount = 1\n")
    with pytest.raises((KeyError, TypeError, ValueError), match=message):
        simulation_of(Experiment.read(path), tmp_path)
