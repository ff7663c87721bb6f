"""Which settings of a run may be others when it is continued."""

from ml_collections import ConfigDict

from jaxdiff import config as configuration

# None of these has a part in the state: with others it is the same, bit for bit.
SAME_BITS = (
    "config.train.log_every", "config.train.checkpoint_every", "config.train.keep",
    "config.train.keep_every", "config.train.sample_every", "config.train.evaluate_every",
    "config.train.tensorboard", "config.train.prefetch", "config.train.ema_snapshots_every",
)  # fmt: skip
# These only change the order of sums. A network's own dropout is drawn for each micro-batch, so
# with it `accumulate` has to stay.
SAME_TO_ROUNDING = (
    "config.mesh", "config.model.remat", "config.train.accumulate", "config.denoiser.attention",
)  # fmt: skip


def changes(old: ConfigDict, new: ConfigDict) -> tuple[list[str], list[str]]:
    """(allowed, refused) differences of a continuation from the run, as `config.difference` words them.

    Allowed are the keys of `SAME_BITS` and `SAME_TO_ROUNDING`: everything else makes another run,
    and is refused; also train.steps, on which the learning rate's schedule depends.
    """
    free = [*SAME_BITS, *SAME_TO_ROUNDING]
    if new.model.get("dropout"):
        free.remove("config.train.accumulate")
    allowed, refused = [], []
    for line in configuration.difference(old, new):
        key = line.partition(":")[0]
        ours = any(key == name or key.startswith(f"{name}.") for name in free)
        (allowed if ours else refused).append(line)
    return allowed, refused
