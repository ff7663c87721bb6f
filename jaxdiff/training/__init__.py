"""Training: a state that is one pytree, a pure step, a loop, and the folder a run lives in.

`prepare` checks a configuration, `train` runs or continues it, `read_experiment` and `restore` read
it back.
"""

from jaxdiff.training.checkpoints import Checkpoints
from jaxdiff.training.loop import train
from jaxdiff.training.run import Plan, prepare, read_experiment, restore
from jaxdiff.training.state import State, init_state, make_optimizer, make_schedule
from jaxdiff.training.step import make_step, shardings

__all__ = [
    "Checkpoints",
    "Plan",
    "State",
    "init_state",
    "make_optimizer",
    "make_schedule",
    "make_step",
    "prepare",
    "read_experiment",
    "restore",
    "shardings",
    "train",
]
