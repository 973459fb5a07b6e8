"""Optimizers, with torch.optim's names, arguments and numerics."""

from typing import TYPE_CHECKING

from . import schedules as schedules
from .averaged import AveragedModel as AveragedModel
from .declaration import Rate as Rate
from .declaration import setting as setting
from .lbfgs import LBFGS as LBFGS
from .lbfgs import LBFGSState as LBFGSState
from .optimizer import Optimizer as Optimizer
from .plateau import ReduceOnPlateau as ReduceOnPlateau
from .rules.adafactor import Adafactor as Adafactor
from .rules.adafactor import AdafactorState as AdafactorState
from .rules.adam import Adam as Adam
from .rules.adam import Adamax as Adamax
from .rules.adam import AdamaxState as AdamaxState
from .rules.adam import AdamState as AdamState
from .rules.adam import AdamW as AdamW
from .rules.adam import NAdam as NAdam
from .rules.adam import NAdamState as NAdamState
from .rules.adam import RAdam as RAdam
from .rules.adan import Adan as Adan
from .rules.adan import AdanState as AdanState
from .rules.adaptive import Adadelta as Adadelta
from .rules.adaptive import AdadeltaState as AdadeltaState
from .rules.adaptive import Adagrad as Adagrad
from .rules.adaptive import AdagradState as AdagradState
from .rules.adaptive import RMSprop as RMSprop
from .rules.adaptive import RMSpropState as RMSpropState
from .rules.asgd import ASGD as ASGD
from .rules.asgd import ASGDState as ASGDState
from .rules.belief import AdaBelief as AdaBelief
from .rules.belief import AdaBeliefState as AdaBeliefState
from .rules.belief import Yogi as Yogi
from .rules.belief import YogiState as YogiState
from .rules.layerwise import LAMB as LAMB
from .rules.layerwise import LARS as LARS
from .rules.layerwise import LAMBState as LAMBState
from .rules.layerwise import LARSState as LARSState
from .rules.muon import Muon as Muon
from .rules.muon import MuonState as MuonState
from .rules.rprop import Rprop as Rprop
from .rules.rprop import RpropState as RpropState
from .rules.schedule_free import ScheduleFreeAdamW as ScheduleFreeAdamW
from .rules.schedule_free import ScheduleFreeAdamWState as ScheduleFreeAdamWState
from .rules.sgd import SGD as SGD
from .rules.sgd import SGDState as SGDState
from .rules.sign import Lion as Lion
from .rules.sign import LionState as LionState

if not TYPE_CHECKING:
    from ..module import torch_names as _torch_names

    __getattr__, __dir__ = _torch_names.hooks(globals(), "optim", ("schedules",), {"optim.schedules": schedules})
