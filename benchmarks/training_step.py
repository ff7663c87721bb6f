"""A run's compiled step and its state, as the training benchmarks time them."""

import jax

STEPS = 4  # in each timed call


def compiled(plan):
    """The run's step as its loop compiles it."""
    placement = plan.placement
    step = jax.jit(
        plan.step, donate_argnums=0, in_shardings=(placement.state, placement.batch),
        out_shardings=(placement.state, placement.replicated),
    )  # fmt: skip
    return step.lower(placement.abstract, plan.batch).compile()


class Run:
    """A step and its state: each call makes a few steps and waits for them."""

    def __init__(self, step, state, batch):
        self.step, self.state, self.batch = step, state, batch

    def __call__(self):
        for _ in range(STEPS):
            self.state, metrics = self.step(self.state, self.batch)
        return jax.block_until_ready(metrics)
