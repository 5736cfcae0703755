"""Gradient-adaptation bricks for JAX: pure and compiled, configurable and stateful.

Each brick is a frozen dataclass whose `init` and `update` are pure functions
over pytrees, for `optax.chain`, Flax, `jit` and `scan`. The same object offers
`run`, `get_state` and messages between clients and servers.
"""

from functional_optimodules.aux_var import Amount, Flag, FromClients, FromServer, Max, Min, Newcomer, PerClient, Scalar
from functional_optimodules.brick import OptiModule, Regularizer, list_optim_modules, list_optim_regularizers
from functional_optimodules.config.fields import hyperparameter
from functional_optimodules.groups import Group
from functional_optimodules.modules.adaptive import AdaGradModule, AdamModule, RMSPropModule, YogiModule
from functional_optimodules.modules.adaptive_clipping import AdaptiveClippingClientModule, AdaptiveClippingServerModule
from functional_optimodules.modules.clipping import L2Clipping, L2GlobalClipping
from functional_optimodules.modules.compression import QSGDModule, RandomKModule, SignModule, TopKModule
from functional_optimodules.modules.decay import WeightDecayModule
from functional_optimodules.modules.fedacg import FedACGModule
from functional_optimodules.modules.fedcm import FedCMClientModule, FedCMServerModule
from functional_optimodules.modules.feddyn import FedDynClientModule, FedDynServerModule
from functional_optimodules.modules.fedexp import FedExPClientModule, FedExPServerModule
from functional_optimodules.modules.fednova import FedNovaClientModule, FedNovaServerModule
from functional_optimodules.modules.fedopt import FedAdagradModule, FedAdamModule, FedAvgMModule, FedYogiModule
from functional_optimodules.modules.mime import MimeClientModule, MimeLiteClientModule, MimeServerModule
from functional_optimodules.modules.momentum import EWMAModule, MomentumModule, YogiMomentumModule
from functional_optimodules.modules.noise import GaussianNoiseModule
from functional_optimodules.modules.optax import OptaxModule
from functional_optimodules.modules.personal import DittoRegularizer, FedRepModule, ditto_loss
from functional_optimodules.modules.powersgd import PowerSGDModule
from functional_optimodules.modules.scaffnew import ScaffnewModule
from functional_optimodules.modules.scaffold import ScaffoldClientModule, ScaffoldServerModule
from functional_optimodules.modules.tree_noise import TreeAggregationNoiseModule
from functional_optimodules.optimizer import Optimizer
from functional_optimodules.packing.policy import map_parameters, pack, set_small_leaf, small_leaf
from functional_optimodules.packing.portable import from_arrays, to_arrays
from functional_optimodules.packing.tree import Packed, unpack
from functional_optimodules.random.keys import draw_entropy, entropy
from functional_optimodules.regularizers import FedProxRegularizer, LassoRegularizer, RidgeRegularizer
from functional_optimodules.schedulers import (
    SGDR,
    Clock,
    CosineAnnealing,
    CosineAnnealingWarmRestarts,
    CyclicExpRange,
    CyclicTriangular,
    ExponentialDecay,
    InverseScaling,
    LinearDecay,
    OptaxSchedule,
    PiecewiseDecay,
    PolynomialDecay,
    Scheduler,
    Warmup,
    WarmupRounds,
    list_rate_schedulers,
)
from functional_optimodules.types import Params
from functional_optimodules.wire.limits import Limits, limits, set_limits
from functional_optimodules.wrappers.accumulation import AccumulationWrapper
from functional_optimodules.wrappers.averages import EMAWrapper, PolyakWrapper
from functional_optimodules.wrappers.finite import SkipNonFiniteWrapper
from functional_optimodules.wrappers.lookahead import LookaheadWrapper
from functional_optimodules.wrappers.precision import (
    MasterWeightsWrapper,
    StateDtypeWrapper,
    StochasticRoundingWrapper,
)
from functional_optimodules.wrappers.schedule_free import ScheduleFreeWrapper
from functional_optimodules.wrappers.wrapper import Wrapper, list_wrappers

__version__ = "0.1.0"

__all__ = [
    "SGDR",
    "AccumulationWrapper",
    "AdaGradModule",
    "AdamModule",
    "AdaptiveClippingClientModule",
    "AdaptiveClippingServerModule",
    "Amount",
    "Clock",
    "CosineAnnealing",
    "CosineAnnealingWarmRestarts",
    "CyclicExpRange",
    "CyclicTriangular",
    "DittoRegularizer",
    "EMAWrapper",
    "EWMAModule",
    "ExponentialDecay",
    "FedACGModule",
    "FedAdagradModule",
    "FedAdamModule",
    "FedAvgMModule",
    "FedCMClientModule",
    "FedCMServerModule",
    "FedDynClientModule",
    "FedDynServerModule",
    "FedExPClientModule",
    "FedExPServerModule",
    "FedNovaClientModule",
    "FedNovaServerModule",
    "FedProxRegularizer",
    "FedRepModule",
    "FedYogiModule",
    "Flag",
    "FromClients",
    "FromServer",
    "GaussianNoiseModule",
    "Group",
    "InverseScaling",
    "L2Clipping",
    "L2GlobalClipping",
    "LassoRegularizer",
    "Limits",
    "LinearDecay",
    "LookaheadWrapper",
    "MasterWeightsWrapper",
    "Max",
    "MimeClientModule",
    "MimeLiteClientModule",
    "MimeServerModule",
    "Min",
    "MomentumModule",
    "Newcomer",
    "OptaxModule",
    "OptaxSchedule",
    "OptiModule",
    "Optimizer",
    "Packed",
    "Params",
    "PerClient",
    "PiecewiseDecay",
    "PolyakWrapper",
    "PolynomialDecay",
    "PowerSGDModule",
    "QSGDModule",
    "RMSPropModule",
    "RandomKModule",
    "Regularizer",
    "RidgeRegularizer",
    "ScaffnewModule",
    "ScaffoldClientModule",
    "ScaffoldServerModule",
    "Scalar",
    "ScheduleFreeWrapper",
    "Scheduler",
    "SignModule",
    "SkipNonFiniteWrapper",
    "StateDtypeWrapper",
    "StochasticRoundingWrapper",
    "TopKModule",
    "TreeAggregationNoiseModule",
    "Warmup",
    "WarmupRounds",
    "WeightDecayModule",
    "Wrapper",
    "YogiModule",
    "YogiMomentumModule",
    "ditto_loss",
    "draw_entropy",
    "entropy",
    "from_arrays",
    "hyperparameter",
    "limits",
    "list_optim_modules",
    "list_optim_regularizers",
    "list_rate_schedulers",
    "list_wrappers",
    "map_parameters",
    "pack",
    "set_limits",
    "set_small_leaf",
    "small_leaf",
    "to_arrays",
    "unpack",
]
