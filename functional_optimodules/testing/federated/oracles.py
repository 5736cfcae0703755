"""All oracles by name."""

from .aggregation import (
    CenteredClipping,
    ErrorFeedbackSign,
    ErrorFeedbackTopK,
    GeometricMedian,
    Krum,
    Median,
    MultiKrum,
    TrimmedMean,
)
from .averaging import Ditto, FedAvg, FedExP, FedNova, FedProx
from .oracle import Oracle
from .servers import DiLoCo, FedACG, FedAdagrad, FedAdam, FedAvgM, FedBuff, FedYogi
from .variates import FedCM, FedDyn, Mime, MimeLite, Scaffnew, Scaffold, ScaffoldOptionI

ORACLES: dict[str, type[Oracle]] = {
    oracle.name: oracle
    for oracle in (
        FedAvg, FedProx, FedNova, FedExP, Ditto,
        FedAvgM, FedAdam, FedYogi, FedAdagrad, FedACG, FedBuff, DiLoCo,
        Scaffold, ScaffoldOptionI, FedDyn, Mime, MimeLite, Scaffnew, FedCM,
        Median, TrimmedMean, Krum, MultiKrum, GeometricMedian, CenteredClipping,
        ErrorFeedbackTopK, ErrorFeedbackSign,
    )
}  # fmt: skip
