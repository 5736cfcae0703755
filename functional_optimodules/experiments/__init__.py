"""Federated experiments from one TOML file: `functional-optimodules run experiment.toml`."""
