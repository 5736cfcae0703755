"""Federated experiments from one TOML file: `functional-optimodules run experiment.toml`."""

from functional_optimodules.experiments.problem import Problem

__all__ = ["Problem"]
