"""Federated rounds of many clients as one XLA program."""

from functional_optimodules.federated.data import FederatedData
from functional_optimodules.federated.federation import Federation, FederationState

__all__ = ["FederatedData", "Federation", "FederationState"]
