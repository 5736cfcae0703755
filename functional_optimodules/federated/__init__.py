"""Federated rounds of many clients as one XLA program."""

from functional_optimodules.federated import aggregation, partition, processes
from functional_optimodules.federated.buffered import BufferedFederation
from functional_optimodules.federated.data import FederatedData
from functional_optimodules.federated.federation import Federation
from functional_optimodules.federated.placement import clients_mesh
from functional_optimodules.federated.protocol.client import Client
from functional_optimodules.federated.protocol.delivery import StaleMessageError
from functional_optimodules.federated.protocol.message import Message
from functional_optimodules.federated.protocol.reports import Bounds
from functional_optimodules.federated.protocol.server import Server
from functional_optimodules.federated.staged.data import StagedData
from functional_optimodules.federated.staged.federation import StagedFederation
from functional_optimodules.federated.state import FederationState

__all__ = [
    "Bounds",
    "BufferedFederation",
    "Client",
    "FederatedData",
    "Federation",
    "FederationState",
    "Message",
    "Server",
    "StagedData",
    "StagedFederation",
    "StaleMessageError",
    "aggregation",
    "clients_mesh",
    "partition",
    "processes",
]
