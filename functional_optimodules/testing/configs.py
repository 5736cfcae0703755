"""Checks of configurations, which all kinds of plug-ins share."""

import json

from functional_optimodules.config.plugin import Plugin
from functional_optimodules.testing.check import check
from functional_optimodules.types import Json


def through_json(value: Json, what: str) -> Json:
    """Return a value written as strict JSON and read again; it must be the same."""
    read = json.loads(json.dumps(value, allow_nan=False))
    assert read == value, f"{what} changes on its way through JSON: found {read}, expected {value}"
    return read


def assert_equal(found: Plugin, expected: Plugin, what: str) -> None:
    """Raise an `AssertionError` if two plug-ins are unequal or hash differently."""
    assert found == expected, f"{what} is unequal to it: let the fields say all, and equality compare them"
    assert hash(found) == hash(expected), f"{what} is equal, and hashes differently: it would be compiled twice"


@check(Plugin, scope="field")
def check_config_round_trip(plugin: Plugin) -> None:
    """A configuration survives JSON, and builds an equal plug-in that hashes equal."""
    config = through_json(plugin.get_config(), "the configuration")
    twins = [type(plugin).from_config(config)]
    if type(plugin)._registry.get(plugin.name) is type(plugin):
        twins.append(type(plugin).from_specs(plugin.name, config))
    for twin in twins:
        assert_equal(twin, plugin, f"what its configuration builds, {twin!r},")
