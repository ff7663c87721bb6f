"""The command line: `jaxdiff train | sample | evaluate | ablate`."""

import argparse
import json
import os
import signal
import sys
import traceback
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from jaxdiff import arguments as flags
from jaxdiff.names import unknown

# Imports of jax and of the rest are in the functions: `--help` and typing errors answer at once.

_EXPECTED = (
    ValueError, TypeError, KeyError, OSError, ImportError, ArithmeticError, MemoryError,
)  # fmt: skip


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command. Returns 0, 1 if the run failed, 2 if the command was wrong."""
    argv = list(sys.argv[1:] if argv is None else argv)
    arguments = _parse(argv)
    with warnings.catch_warnings():
        warnings.showwarning = _warn
        try:
            code = _run(arguments)
        except KeyboardInterrupt as interruption:
            print("\njaxdiff: interrupted", file=sys.stderr)
            if not isinstance(interruption, _Stopped):
                _abandon(130)
            return 130
        except Exception:
            _abandon(1, traceback.format_exc())
            raise
        if code:
            _abandon(code)
        return code


class _Stopped(KeyboardInterrupt):
    """After a Ctrl-C that all processes have answered: nobody waits for this one."""


def _run(arguments: argparse.Namespace) -> int:
    try:
        _check_workdir(arguments.workdir)
        _use_compilation_cache()
        _join_processes(arguments)
        work = _COMMANDS[arguments.command].prepare(arguments)
    except _EXPECTED as error:
        return _report(error, 2, arguments.debug)
    try:
        work()
    except _EXPECTED as error:
        return _report(error, 1, arguments.debug)
    return 0


def _warn(message: Warning | str, *_: Any, **__: Any) -> None:
    print(f"jaxdiff: warning: {message}", file=sys.stderr)


def _report(error: Exception, code: int, debug: bool) -> int:
    if debug:
        traceback.print_exception(error)
    message = error.args[0] if isinstance(error, KeyError) and error.args else error
    print(f"jaxdiff: error: {message}", file=sys.stderr)
    return code


def _check_workdir(workdir: str) -> None:
    if "://" in workdir:
        raise ValueError(
            f"--workdir must be a path, got {workdir!r}: mount the bucket, and name the folder "
            "there (docs/pods.md)"
        )


def _use_compilation_cache() -> None:
    """Keep compiled programs between runs, in JAX_COMPILATION_CACHE_DIR or the user's cache."""
    import jax

    if not os.environ.get("JAX_COMPILATION_CACHE_DIR"):
        base = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser()
        jax.config.update("jax_compilation_cache_dir", str(base / "jaxdiff"))


def _join_processes(arguments: argparse.Namespace) -> None:
    """Before anything asks JAX for its devices."""
    if hasattr(arguments, "distributed"):
        import jax

        from jaxdiff.parallel import initialize

        # It would take SIGTERM from when the processes join, also where nobody asks for it.
        jax.config.update("jax_enable_preemption_service", False)
        initialize(
            arguments.distributed, arguments.coordinator, arguments.processes,
            arguments.process_id, arguments.heartbeat,
        )  # fmt: skip


def _abandon(code: int, words: str = "") -> None:
    """After a failure, end at once if there are other processes."""
    if "jaxdiff.parallel" in sys.modules:  # else there are none, and its import takes a second
        from jaxdiff.parallel import abandon

        abandon(code, words)


def _print(*text: Any, **options: Any) -> None:
    """Print, in the first process alone."""
    from jaxdiff.parallel import is_main

    if is_main():
        print(*text, **options)


# --- train ----------------------------------------------------------------------------------------


def _prepare_train(arguments: argparse.Namespace) -> Callable[[], None]:
    from jaxdiff import config as configuration
    from jaxdiff.settings import SECTIONS
    from jaxdiff.training.profile import Profile
    from jaxdiff.training.run import PROFILE, prepare

    workdir, profile = Path(arguments.workdir), None
    if arguments.profile is not None:
        profile = Profile(workdir / PROFILE, arguments.profile)
    config = configuration.load(arguments.config, SECTIONS)
    plan = prepare(configuration.override(config, arguments.overrides))
    return lambda: _train(plan, workdir, not arguments.quiet, profile)


def _train(plan: Any, workdir: Path, progress: bool, profile: Any) -> None:
    from jaxdiff.training.loop import train
    from jaxdiff.training.preemption import Signals
    from jaxdiff.training.report import averaged, draw_picture, final_report
    from jaxdiff.training.run import FIGURES, SAMPLES, is_finished

    if is_finished(plan.experiment, workdir):
        _print(f"{workdir} is finished: {plan.experiment.config.train.steps} steps")
        _print((workdir / FIGURES).read_text(), end="")
        return

    def hook(experiment, state):
        try:
            draw_picture(experiment, averaged(experiment, state), workdir / SAMPLES)
        except FloatingPointError as error:  # bad samples are no reason to stop training
            warnings.warn(f"step {int(state.step)}: no picture: {error}", stacklevel=2)

    with Signals(plan.experiment.config.train.log_every) as signals:
        state = train(plan, workdir, hook, progress, signals.stop, profile)
        step, steps = int(state.step), plan.experiment.config.train.steps
        stopped = step < steps or signals.stop(0)  # also one that came in the last step
    if stopped:
        _print(f"stopped and saved at step {step} of {steps}; the same command again goes on there")
        if signals.received == signal.SIGINT:
            raise _Stopped
        return
    figures = final_report(plan.experiment, state, plan.source, workdir, progress)
    _print(json.dumps(figures, indent=2))


# --- sample and evaluate --------------------------------------------------------------------------


def _prepare_sample(arguments: argparse.Namespace) -> Callable[[], None]:
    import numpy as np

    from jaxdiff.generation import balanced_labels

    output = Path(arguments.output)
    if output.suffix.lower() != ".png":
        raise ValueError(f"--output must end in .png (an .npz goes beside it), got {output.name!r}")
    if not output.absolute().parent.is_dir():
        raise FileNotFoundError(f"no such folder: {str(output.parent)!r}")
    experiment, tableau, options = _sampler(arguments)
    if arguments.count < 1:
        raise ValueError(f"--count must be at least 1, got {arguments.count}")
    if arguments.label is None:
        labels = balanced_labels(experiment, arguments.count)
    else:
        labels = experiment.check_labels(np.resize(arguments.label, arguments.count))
    return lambda: _sample(arguments, experiment, tableau, options, labels, output)


def _sample(arguments, experiment, tableau, options, labels, output: Path) -> None:
    import numpy as np

    from jaxdiff.files import replacing
    from jaxdiff.generation import generate
    from jaxdiff.parallel import is_main
    from jaxdiff.pictures import sample_grid

    variables, _ = _weights(arguments, experiment)
    samples = generate(
        experiment, variables, tableau, labels, arguments.count, options["seed"],
        options["guidance"], options["batch_size"], not arguments.quiet,
    )  # fmt: skip
    if not is_main():
        return
    arrays = {"x": samples} | ({} if labels is None else {"label": labels})
    archive = output.with_suffix(".npz")
    with replacing(archive) as temporary:
        np.savez(temporary, **arrays)
    sample_grid(output, samples, labels)
    print(f"{output} and {archive.name}: {arguments.count} samples, {int(tableau.nfe)} evaluations")


def _prepare_evaluate(arguments: argparse.Namespace) -> Callable[[], None]:
    from jaxdiff.experiment import make_source

    experiment, tableau, options = _sampler(arguments)
    config = experiment.config
    count = config.evaluate.count if arguments.count is None else arguments.count
    if count < 2:
        raise ValueError(f"--count must be at least 2, got {count}")
    scales = config.evaluate.guidance if arguments.guidance is None else (arguments.guidance,)
    source = make_source(config)
    return lambda: _evaluate(arguments, experiment, tableau, options, source, scales, count)


def _evaluate(arguments, experiment, tableau, options, source, scales, count) -> None:
    from jaxdiff.evaluation import evaluate
    from jaxdiff.files import write_text
    from jaxdiff.parallel import is_main

    workdir = Path(arguments.workdir)
    variables, weights = _weights(arguments, experiment)
    figures = [
        evaluate(
            experiment, variables, source, tableau, scale, count, options["seed"],
            options["batch_size"], not arguments.quiet,
        )
        for scale in scales
    ]  # fmt: skip
    chosen = {key: options[key] for key in ("solver", "options", "steps", "grid", "grid_options")}
    found = {**weights, **chosen, "figures": figures}
    text = json.dumps(found, indent=2)
    if is_main():
        write_text(workdir / "evaluate.json", text + "\n")
    _print(text)


def _weights(arguments: argparse.Namespace, experiment: Any) -> tuple[Any, dict[str, Any]]:
    """(the network's variables, which they are)."""
    from jaxdiff.training.reconstruction import reconstruct
    from jaxdiff.training.report import averaged
    from jaxdiff.training.run import restore

    state = restore(experiment, arguments.workdir, arguments.best)
    step = int(state.step)
    if arguments.ema is None:
        return averaged(experiment, state), {"step": step}
    variables, error = reconstruct(experiment, arguments.workdir, state, arguments.ema)
    _print(f"average of length {arguments.ema:g} at step {step}, made to {100 * error:.2g}%",
           file=sys.stderr)  # fmt: skip
    return variables, {"step": step, "ema": arguments.ema, "ema_error": error}


def _sampler(arguments: argparse.Namespace) -> tuple[Any, Any, dict[str, Any]]:
    """(experiment, tableau, sampler options): the run's own, with the command line's on top."""
    from jaxdiff.experiment import check_seed, is_stored, make_tableau, sampler
    from jaxdiff.solvers import own_grid
    from jaxdiff.training.reconstruction import check_reconstruction
    from jaxdiff.training.run import compare_sections, read_experiment

    _compare_arguments(arguments)
    experiment = read_experiment(arguments.workdir)
    compare_sections(experiment.config)
    if arguments.ema is not None:
        check_reconstruction(experiment, arguments.ema)
    settings = experiment.config.sample
    options = sampler(experiment.config) | {
        "seed": settings.seed, "guidance": settings.guidance, "batch_size": settings.batch_size,
    }  # fmt: skip
    # Another solver or grid does not take the options of the run's own.
    for name, own in (("solver", "options"), ("grid", "grid_options")):
        if getattr(arguments, name) not in (None, options[name]):
            options[own] = {}
    implied = own_grid(arguments.solver or "")
    if implied is not None and arguments.grid is None:
        options["grid"], options["grid_options"] = implied
    for name in ("solver", "steps", "grid", "seed", "guidance", "batch_size"):
        if getattr(arguments, name) is not None:
            options[name] = getattr(arguments, name)
    if is_stored(options["solver"]):
        for name in ("steps", "grid", "option", "grid_option"):
            if getattr(arguments, name):
                flag = f"--{name.replace('_', '-')}"
                raise ValueError(f"the file {options['solver']!r} has its own: {flag} cannot change it")
    options["options"] = options["options"] | dict(arguments.option)
    options["grid_options"] = dict(options["grid_options"]) | dict(arguments.grid_option)
    check_seed("--seed", options["seed"])
    experiment.check_guidance(options["guidance"])
    if options["batch_size"] < 1:
        raise ValueError(f"--batch-size must be at least 1, got {options['batch_size']}")
    names = ("solver", "steps", "grid", "options", "grid_options")
    tableau = make_tableau(experiment.process, **{name: options[name] for name in names})
    experiment.check_sampler(tableau, options["guidance"])
    if is_stored(options["solver"]):  # those of the run were not used, and are not reported
        options |= {"options": {}, "steps": None, "grid": None, "grid_options": {}}
    return experiment, tableau, options


def _compare_arguments(arguments: argparse.Namespace) -> None:
    """Raise ValueError, in every process, if they were told to do different things."""
    from jaxdiff import parallel

    own = (*flags.OF_A_PROCESS, "workdir", "output", "quiet", "debug")  # a disk has several names
    for name, value in sorted(vars(arguments).items()):
        if name not in own:
            parallel.same(f"--{name.replace('_', '-')}", repr(value))


# --- ablate ---------------------------------------------------------------------------------------


def _prepare_ablate(arguments: argparse.Namespace) -> Callable[[], None]:
    from jaxdiff import config as configuration
    from jaxdiff.ablation.command import SECTIONS, prepare

    config = configuration.override(
        configuration.load(arguments.config, SECTIONS), arguments.overrides
    )
    work = prepare(configuration.complete(config, SECTIONS).ablation, arguments.workdir,
                   not arguments.quiet)  # fmt: skip
    return lambda: _ablate(work, Path(arguments.workdir), config.ablation.plot)


def _ablate(work: Callable, workdir: Path, column: str) -> None:
    table = work()
    print(table.best(column, "nfe").to_markdown())
    print(f"{workdir / 'report.md'}: {len(table)} cells, {table.programs} programs compiled")


# --- commands -------------------------------------------------------------------------------------


class _Command(NamedTuple):
    help: str
    arguments: Callable[[argparse.ArgumentParser], None]
    # Checks everything, writes nothing, and returns the work that is left to do.
    prepare: Callable[[argparse.Namespace], Callable[[], None]]
    overrides: bool = False


_COMMANDS = {
    "train": _Command(
        "train, or continue, a run; --config.KEY=VALUE overrides the configuration",
        flags.train, _prepare_train, overrides=True,
    ),
    "sample": _Command(
        "draw samples from a run, to a picture and an .npz", flags.sample, _prepare_sample
    ),
    "evaluate": _Command(
        "compare samples of a run with its data; also writes evaluate.json into its folder",
        flags.evaluate, _prepare_evaluate,
    ),
    "ablate": _Command(
        "compare samplers on a run's network, many in one program; --config.ablation.KEY=VALUE "
        "overrides the configuration",
        flags.ablate, _prepare_ablate, overrides=True,
    ),
}  # fmt: skip


def _parse(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser("jaxdiff", description="Diffusion models in JAX.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, command in _COMMANDS.items():
        sub = commands.add_parser(
            name, help=command.help, description=command.help, allow_abbrev=False
        )
        command.arguments(sub)
        sub.add_argument("--quiet", action="store_true", help="no progress bar")
        sub.add_argument("--debug", action="store_true", help="show the traceback of an error")
    if argv and not argv[0].startswith("-") and argv[0] not in _COMMANDS:
        parser.error(unknown("unknown command", argv[0], _COMMANDS))
    arguments, rest = parser.parse_known_args(argv)
    if rest and not _COMMANDS[arguments.command].overrides:
        known = commands.choices[arguments.command]._option_string_actions
        parser.error(unknown("unknown argument", rest[0].partition("=")[0], known))
    arguments.overrides = rest
    return arguments


if __name__ == "__main__":
    sys.exit(main())
