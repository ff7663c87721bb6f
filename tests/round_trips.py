"""There and back with many invertible samplers in two compiled programs."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

import jaxdiff as jd
from jaxdiff.solvers.inverse import entry


def largest_errors(make_denoiser, tables, x, dtype):
    """max |x_T found again - x_T| for each table, in a float type; x [batch, dim] or one a table."""
    with jax.enable_x64(dtype == np.float64):
        denoiser = make_denoiser()
        x = jnp.asarray(np.broadcast_to(x, (len(tables), *np.shape(x)[-2:])).astype(dtype))
        run = functools.partial(jd.sample, denoiser, save="state")
        states = jax.vmap(run)(jd.solvers.stack(tables), x)
        held = np.stack(states.registers, 1)
        matrices = np.stack([entry(table)[0] for table in tables]).astype(dtype)
        entered = np.einsum("nij,njbd->inbd", matrices, held)
        states = states._replace(registers=tuple(jnp.asarray(s) for s in entered))
        back = jd.solvers.stack([table.inverse() for table in tables])
        found = jax.vmap(lambda t, s: jd.sample(denoiser, t, None, state=s))(back, states)
        return np.abs(np.asarray(found - x, np.float64)).max((1, 2))
