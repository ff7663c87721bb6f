"""The command line's arguments, command by command."""

import argparse
import ast
from typing import Any

# What differs between the processes of a run.
OF_A_PROCESS = ("distributed", "coordinator", "processes", "process_id", "heartbeat")


def _process_arguments(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group(
        "several processes", "the same command in each; see docs/training.md",
    )
    group.add_argument(
        "--distributed", choices=("auto", "on", "off"), default="auto",
        help="auto: as a TPU, Slurm or Open MPI says; on: fail where nothing says; off: one process",
    )  # fmt: skip
    add = group.add_argument
    add("--coordinator", metavar="HOST:PORT", help="of process 0 (or JAXDIFF_COORDINATOR)")
    add("--processes", type=int, metavar="N", help="how many (or JAXDIFF_PROCESSES)")
    add("--process-id", type=int, metavar="K", help="which one, from 0 (or JAXDIFF_PROCESS_ID)")
    add(
        "--heartbeat", type=int, metavar="SECONDS",
        help="silence after which a process counts as dead, and all end (100; or JAXDIFF_HEARTBEAT)",
    )  # fmt: skip


def train(parser: argparse.ArgumentParser) -> None:
    """Of `jaxdiff train`."""
    _process_arguments(parser)
    parser.add_argument(
        "--config", required=True, metavar="FILE",
        help="a file with get_config(); FILE:laptop calls get_config('laptop'), a small size",
    )  # fmt: skip
    parser.add_argument(
        "--workdir", required=True, metavar="DIR",
        help="the folder of the run; an unfinished run of the same configuration is continued",
    )  # fmt: skip
    parser.add_argument(
        "--profile", type=int, nargs="?", const=5, metavar="N",
        help="trace N steps (5), after the first ones, into the folder profile of the run",
    )  # fmt: skip


def ablate(parser: argparse.ArgumentParser) -> None:
    """Of `jaxdiff ablate`."""
    parser.add_argument("--config", required=True, metavar="FILE", help="a file with get_config()")
    parser.add_argument(
        "--workdir", required=True, metavar="DIR",
        help="the folder of the sweep; a sweep that was stopped goes on there",
    )  # fmt: skip


def _sampler_arguments(parser: argparse.ArgumentParser) -> None:
    _process_arguments(parser)
    add = parser.add_argument
    add("--workdir", required=True, metavar="DIR", help="the folder of a run")
    add(
        "--solver",
        help="a name of jaxdiff.solvers.CATALOGUE, or a file of jaxdiff.solvers.save (default: the "
        "run's)",
    )
    add("--steps", type=int, help="steps of the grid (default: the run's)")
    add("--grid", help="a name of jaxdiff.grids (default: the run's)")
    add(
        "--option", type=_pair, action="append", default=[], metavar="KEY=VALUE",
        help="an option of the solver, e.g. order=3; repeat for several",
    )  # fmt: skip
    add(
        "--grid-option", type=_pair, action="append", default=[], metavar="KEY=VALUE",
        help="an option of the grid, e.g. rho=7",
    )  # fmt: skip
    add("--ema", type=float, metavar="SIGMA", help="average the weights over another length (EDM2's "
        "sigma_rel, 0.08 say), made of those that config.train.ema_lengths tracked")  # fmt: skip
    add("--best", action="store_true", help="the checkpoint of the best config.train.best_metric")
    add("--guidance", type=float, metavar="S", help="uncond + S (cond - uncond); 1: conditional")
    add("--seed", type=int, help="decides every sample (default: the run's)")
    add("--batch-size", type=int, help="samples drawn at once; does not change them")


def sample(parser: argparse.ArgumentParser) -> None:
    """Of `jaxdiff sample`."""
    _sampler_arguments(parser)
    parser.add_argument(
        "--label", type=int, nargs="+", metavar="K", help="classes, in turn (default: all)"
    )
    parser.add_argument("--count", type=int, default=16, help="samples (default: 16)")
    parser.add_argument(
        "--output", default="samples.png", metavar="FILE.png",
        help="the picture; the samples themselves go beside it as .npz (default: samples.png)",
    )  # fmt: skip


def evaluate(parser: argparse.ArgumentParser) -> None:
    """Of `jaxdiff evaluate`."""
    _sampler_arguments(parser)
    parser.add_argument("--count", type=int, help="samples (default: the run's)")


def _pair(text: str) -> tuple[str, Any]:
    key, equals, value = text.partition("=")
    if not (key.isidentifier() and equals and value):
        raise argparse.ArgumentTypeError(f"must be KEY=VALUE, got {text!r}")
    if value.lower() in ("true", "false"):
        value = value.capitalize()
    try:
        return key, ast.literal_eval(value)
    except (ValueError, SyntaxError):
        return key, value
