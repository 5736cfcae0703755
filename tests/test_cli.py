"""The command: what it lists, and what it says when it cannot do what was asked."""

import dataclasses
import inspect
import re
import subprocess
import sys

import jax.numpy as jnp
import pytest

import functional_optimodules as fo
from functional_optimodules import catalogue, cli, demo
from functional_optimodules.demo import Promise
from functional_optimodules.federated.aggregation import list_aggregators
from functional_optimodules.wire.checkpoint import write_checkpoint


def test_list_names_every_plugin_and_every_hyperparameter(capsys):
    assert cli.main(["list"]) == 0
    printed = capsys.readouterr().out
    registries = fo.list_optim_modules(), fo.list_optim_regularizers(), fo.list_rate_schedulers(), fo.list_wrappers()
    for name, plugin in (item for registry in registries for item in registry.items()):
        entry = re.search(rf"^  {re.escape(name)}  \({plugin.__name__}\)\n(      .*\n?)+", printed, re.MULTILINE)
        assert entry, name
        for field in dataclasses.fields(plugin):
            assert re.search(rf"^        {field.name}: ", entry[0], re.MULTILINE), (name, field.name)


def test_list_shows_default_range_type_and_formula(capsys):
    cli.main(["list", "modules"])
    printed = capsys.readouterr().out
    assert "beta: float = 0.9, in [0, 1)\n" in printed
    assert "nesterov: bool = False\n" in printed
    assert "transform: str, required\n" in printed
    assert "velocity ← β·velocity + g (Sutskever et al. 2013, as in PyTorch)\n" in printed


def test_list_of_one_kind_leaves_out_the_others(capsys):
    cli.main(["list", "regularizers"])
    printed = capsys.readouterr().out
    assert "fedprox" in printed
    assert "momentum" not in printed
    assert "warmup" not in printed


def test_list_of_a_name_prints_its_docstring_and_fields_alone(capsys):
    assert cli.main(["list", "adam"]) == 0
    printed = capsys.readouterr().out
    assert printed.startswith("adam  (AdamModule), one of the modules\n\n" + inspect.getdoc(fo.AdamModule))
    assert printed.endswith("  eps: float = 1e-07, in (0, inf)\n  round_reset: bool = False\n")
    assert "YogiModule" not in printed


def test_list_of_a_name_that_two_kinds_share_prints_both(monkeypatch, capsys):
    monkeypatch.setitem(fo.Scheduler._registry, "ridge", fo.LinearDecay)
    cli.main(["list", "ridge"])
    printed = capsys.readouterr().out
    assert "ridge  (RidgeRegularizer), one of the regularizers" in printed
    assert "ridge  (LinearDecay), one of the schedulers" in printed


def test_there_is_no_table_of_one_plugin(capsys):
    assert cli.main(["list", "adam", "--markdown"]) == 2
    assert "tables of modules, regularizers, schedulers" in capsys.readouterr().err


def test_markdown_prints_the_tables_that_the_documentation_embeds(capsys):
    cli.main(["list", "--markdown"])
    assert capsys.readouterr().out == catalogue.plugin_table() + "\n"


def test_the_table_has_a_row_of_four_cells_for_each_plugin_of_the_library():
    rows = [line for line in catalogue.plugin_table().splitlines() if line.startswith("| `")]
    names = {re.match(r"\| `([^`]+)`", row)[1] for row in rows}
    lists = (
        fo.list_optim_modules,
        fo.list_optim_regularizers,
        fo.list_rate_schedulers,
        fo.list_wrappers,
        list_aggregators,
    )
    registries = [each() for each in lists]
    plugins = [plugin for registry in registries for plugin in registry.values()]
    assert len(rows) == sum(plugin.__module__.startswith("functional_optimodules.") for plugin in plugins) > 60
    assert {"adam", "optax", "scaffold-server", "fedprox", "cosine-annealing", "warmup-rounds"} <= names
    for row in rows:
        cells = re.split(r"(?<!\\)\|", row)
        assert len(cells) == 4 + 2, row
        assert all(cell.strip() for cell in cells[1:-1]), row


def test_the_table_leaves_out_third_parties_and_the_list_does_not(monkeypatch):
    class Foreign(fo.OptiModule, register=False):
        """Left | right."""

        name = "foreign"
        choice: int | None = None

        def init(self, params):
            return ()

        def update(self, updates, state, params=None, **extra_args):
            return updates, state

    monkeypatch.setitem(fo.OptiModule._registry, "foreign", Foreign)
    assert "foreign" not in catalogue.plugin_table()
    assert "foreign  (Foreign)\n      Left | right\n        choice: int | None = None" in catalogue.plugin_list()
    monkeypatch.setattr(Foreign, "__module__", "functional_optimodules.foreign")
    assert "| `foreign` | `Foreign` | `choice=None` | Left \\| right |" in catalogue.plugin_table()


@pytest.mark.parametrize("argv", [[], ["dmeo"], ["list", "optimizers"], ["list", "adamm"], ["demo", "--rounds", "3"]])
def test_unknown_words_exit_with_2_and_name_the_choices(argv, capsys):
    with pytest.raises(SystemExit) as exit_:
        cli.main(argv)
    assert exit_.value.code == 2
    message = capsys.readouterr().err
    assert "usage: functional-optimodules" in message
    expected = {"dmeo": "demo", "optimizers": "schedulers", "adamm": "'adam'", "3": "--rounds"}
    assert expected.get(argv[-1] if argv else "", "COMMAND") in message


@pytest.mark.parametrize(
    ("module", "project"), [("sklearn", "scikit-learn"), ("matplotlib", "matplotlib"), ("tqdm", "tqdm")]
)
def test_demo_without_its_packages_says_what_to_install(module, project, monkeypatch, capsys, tmp_path):
    monkeypatch.setitem(sys.modules, module, None)
    assert cli.main(["demo", "--output", str(tmp_path / "output")]) == 2
    message = capsys.readouterr().err
    assert f"needs {project}:" in message
    assert "pip install 'functional_optimodules[demo]'" in message
    assert not (tmp_path / "output").exists()


def test_demo_refuses_an_output_that_is_a_file(tmp_path, capsys):
    (tmp_path / "file").touch()
    assert cli.main(["demo", "--output", str(tmp_path / "file")]) == 2
    assert f"cannot make the output folder {tmp_path / 'file'}" in capsys.readouterr().err


def test_demo_exits_with_1_and_names_the_broken_promise(monkeypatch, capsys, tmp_path):
    promises = [Promise("the kept one", True), Promise("the broken one", False)]
    monkeypatch.setattr(demo, "run_demo", lambda output: promises)
    assert cli.main(["demo", "--output", str(tmp_path)]) == 1
    message = capsys.readouterr().err
    assert "did not keep its promise: the broken one" in message
    assert "the kept one" not in message


def test_demo_exits_with_0_if_all_promises_are_kept_and_makes_its_folder(monkeypatch, tmp_path):
    monkeypatch.setattr(demo, "run_demo", lambda output: [Promise(f"{output} exists", output.is_dir())])
    assert cli.main(["demo", "--output", str(tmp_path / "new" / "folder")]) == 0


def test_python_m_lists_without_the_packages_of_the_demo():
    program = (
        "import sys, runpy; sys.modules.update(dict.fromkeys(['sklearn', 'matplotlib', 'tqdm', 'flax']));"
        "sys.argv = ['functional-optimodules', 'list', 'modules'];"
        "runpy.run_module('functional_optimodules', run_name='__main__')"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, encoding="utf-8")
    assert done.returncode == 0, done.stderr
    assert "AdamModule" in done.stdout


@pytest.mark.slow
def test_a_reader_that_closes_the_pipe_early_sees_no_traceback():
    program = (
        "import os, sys; from functional_optimodules.cli import main;"
        "r, w = os.pipe(); os.close(r); os.dup2(w, 1); sys.exit(main(['list']))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, encoding="utf-8")
    assert (done.returncode, done.stderr) == (1, "")


def test_inspect_shows_what_is_in_a_checkpoint(tmp_path, capsys):
    write_checkpoint(tmp_path, "server", {"names": ["ann"]}, {"params": {"w": jnp.zeros((2, 3))}})
    assert cli.main(["inspect", str(tmp_path)]) == 0
    assert capsys.readouterr().out.splitlines() == [
        "kind: 'server'",
        "names: ['ann']",
        "",
        "array     what          bytes",
        "params/w  float32[2,3]     24",
        "total     1 arrays         24",
    ]


def test_inspect_of_what_is_no_checkpoint_says_so(tmp_path, capsys):
    assert cli.main(["inspect", str(tmp_path)]) == 2
    assert "has no checkpoint: expected a checkpoint.json in it" in capsys.readouterr().err
