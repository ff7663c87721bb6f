"""Training: a state that is one pytree, a pure step, a loop, and the folder a run lives in.

`prepare` checks a configuration, `train` runs or continues it, `read_experiment` and `restore` read
it back.
"""

from jaxdiff.training.checkpoints import Checkpoints
from jaxdiff.training.loop import train
from jaxdiff.training.placement import Placement, place
from jaxdiff.training.preemption import Signals
from jaxdiff.training.profile import Profile
from jaxdiff.training.reconstruction import reconstruct
from jaxdiff.training.run import Plan, prepare, read_experiment, restore
from jaxdiff.training.state import State, init_state, make_optimizer, make_schedule
from jaxdiff.training.step import make_step

__all__ = [
    "Checkpoints",
    "Placement",
    "Plan",
    "Profile",
    "Signals",
    "State",
    "init_state",
    "make_optimizer",
    "make_schedule",
    "make_step",
    "place",
    "prepare",
    "read_experiment",
    "reconstruct",
    "restore",
    "train",
]
