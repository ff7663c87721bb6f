"""Every noisy solver whose rows carry a Brownian clock converges on the path at its strong order.

Protocol: float64, the broad mixture, VP from t = 0.9 to 0.05, 64 starts from the marginal, each
with one Brownian path; 20 to 80 steps uniform in lambda, the root mean square of the distance to
the same solver's 320 steps on the same path. What they converge to is the SDE's solution, by an
Euler-Maruyama written here on the path's own increments.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from oracles import BROAD, fitted_order

import jaxdiff as jd

PROCESS = jd.processes.vp_linear()
T_MAX, T_MIN = 0.9, 0.05
STEPS, FINE = (20, 40, 80), 320
COUNT = 64


def grid(steps):
    return jd.grids.half_log_snr(PROCESS, steps, t_max=T_MAX, t_min=T_MIN)


NOISY = {
    name: (entry, setting)
    for entry in jd.solvers.CATALOGUE.values()
    for name, setting in entry.settings.items()
    if not setting.deterministic
}
CLOCKED = {
    name: (entry, setting)
    for name, (entry, setting) in NOISY.items()
    if entry.build(grid(20), **setting.options).brownian is not None
}


def path(form):
    return jd.BrownianPath(PROCESS, form, jax.random.key(3))


def start():
    whole = grid(1)
    return BROAD.sample(np.random.default_rng(12), COUNT, whole.alpha[0], whole.sigma[0])


def build(name, steps):
    entry, setting = CLOCKED[name]
    return entry.build(grid(steps), **setting.options)


class Walk:
    """The paths of one form, evaluated once wherever one of the tables has a clock's end."""

    def __init__(self, form, tables):
        used = [table.clock for table in tables if table.brownian == form]
        places = np.unique(np.concatenate([clock[clock > 0] for clock in used]))
        # Levels that are one number but for rounding: nothing else lies so close.
        self.places = places[np.append(True, np.diff(places) > 1e-8 * places[1:])]
        intervals = jnp.asarray(np.stack([self.places[:-1], self.places[1:]], 1))
        z = np.asarray(draws(path(form), intervals))
        self.moves = z * np.sqrt(np.diff(self.places))[:, None, None]
        self.values = np.concatenate([np.zeros((1, COUNT, 2)), np.cumsum(self.moves, 0)])

    def at(self, clock):
        index = np.abs(self.places - clock[:, None]).argmin(1)
        np.testing.assert_allclose(self.places[index], clock, rtol=1e-7)
        return self.values[index]

    def noise(self, table):
        """The draws of a table: what it gets from `sample(noise=path)`."""
        noisy = np.any(table.C != 0, 1) & np.all(table.clock > 0, 1)
        low, high = (np.sort(table.clock[noisy], 1)[:, end] for end in (0, 1))
        out = np.zeros((table.draws, COUNT, 2))
        out[table.draw[noisy]] = (self.at(high) - self.at(low)) / np.sqrt(high - low)[:, None, None]
        return out


@jax.jit
def draws(path, intervals):
    like = jnp.zeros((COUNT, 2))
    return jax.lax.map(lambda clock: path.draw(clock, like), intervals)


def mixture():
    return jd.gaussian_mixture(BROAD.means, BROAD.std, BROAD.weights, PROCESS)


@functools.cache
def runs():
    """{name: {steps: end points}}, and the walks; one program for `FINE`, one for the others."""
    with jax.enable_x64(True):
        tables = {(name, n): build(name, n) for name in CLOCKED for n in (*STEPS, FINE)}
        forms = {table.brownian for table in tables.values()}
        walks = {form: Walk(form, tables.values()) for form in forms}
        run = jax.vmap(lambda table, z: jd.sample(mixture(), table, start(), noise=z))
        ends = {name: {} for name in CLOCKED}
        for counts in (STEPS, (FINE,)):
            chosen = {key: table for key, table in tables.items() if key[1] in counts}
            found = [walks[table.brownian].noise(table) for table in chosen.values()]
            longest = max(len(z) for z in found)
            noise = np.stack([np.pad(z, ((0, longest - len(z)), (0, 0), (0, 0))) for z in found])
            out = run(jd.solvers.stack(list(chosen.values())), jnp.asarray(noise))
            for (name, steps), x in zip(chosen, np.asarray(out)):
                ends[name][steps] = x
    return ends, walks


def rms(difference):
    return np.sqrt(np.mean(np.sum(difference**2, -1)))


def strong_order(name):
    ends = runs()[0][name]
    return fitted_order(STEPS, [rms(ends[n] - ends[FINE]) for n in STEPS])


@pytest.mark.parametrize("name", CLOCKED)
def test_strong_order_is_the_stated_one(name):
    stated = CLOCKED[name][1].strong
    assert stated is not None, "rows with a clock, but the catalogue states no strong order"
    assert strong_order(name) >= stated - 0.25


@pytest.mark.parametrize("name", ["ddpm", "dpm_solver_pp_2m_sde", "dpm_solver_pp_3m_sde"])
def test_order_one_is_all_that_a_paths_increments_give(name):
    """The stated orders are not mere lower bounds."""
    assert strong_order(name) < 1.25


@pytest.mark.parametrize("name", NOISY)
def test_what_has_no_clock_states_no_strong_order(name):
    assert name in CLOCKED or NOISY[name][1].strong is None


def euler_maruyama(walk, form, q):
    """dy = -(1 + q) rho eps dlambda + sqrt(2 q) rho dW on the path's increments.

    With S the clock and W_S its path, sqrt(2) rho dW is rho^2 dW_S ("x0") or dW_S ("eps").
    """
    places, moves = walk.places, walk.moves
    if form == "eps":
        places, moves = 1 / places[::-1], moves[::-1]
    rhos, y = 1 / np.sqrt(places), start() / grid(1).alpha[0]
    for rho, rho1, move in zip(rhos[:-1], rhos[1:], moves):
        drift = (1 + q) * rho * np.log(rho1 / rho) * BROAD.eps(y, 1.0, rho)
        y = y + drift + np.sqrt(q) * (rho**2 if form == "x0" else 1.0) * move
    return grid(1).alpha[-1] * y


@functools.cache
def limit(form, q):
    return euler_maruyama(runs()[1][form], form, q)


# q of the SDE that a solver tends to, where it is not the reverse SDE's 1 at every level.
OTHER = {
    "euler_ancestral_eta_half": 0.25,
    "dpm_solver_pp_sde_eta_half": 0.5,
    "dpm_solver_pp_2m_sde_eta_half": 0.5,
    "dpm_solver_3s_ancestral_eta_half": 0.25,
    "sa_solver_tau_half": 0.25,
    "sa_solver_window": None,
}


@pytest.mark.parametrize("name", [name for name in CLOCKED if OTHER.get(name, 1.0) is not None])
def test_the_limit_is_the_sdes_solution(name):
    """Within 0.05 of Euler-Maruyama's with 320 steps or more; another SDE's is 0.3 away."""
    form, q = build(name, 20).brownian, OTHER.get(name, 1.0)
    end = runs()[0][name][FINE]
    assert rms(end - limit(form, q)) < 0.05
    assert rms(end - limit(form, 0.5 if q == 1.0 else 1.0)) > 0.3


@pytest.mark.parametrize("name", ["dpm_solver_pp_sde", "dpm_solver_2m_sde"])
def test_a_walks_noise_is_the_paths(x64, name):
    """What the tests above hand out as draws is what `sample(noise=path)` draws."""
    table = build(name, 20)
    got = jd.sample(mixture(), table, jnp.asarray(start()), noise=path(table.brownian))
    np.testing.assert_allclose(got, runs()[0][name][20], rtol=1e-7, atol=1e-7)


def test_the_protocol_sees_noise_of_another_path(x64):
    """The last quarter of the draws handed to the wrong sample: no convergence."""
    table, ends = build("ddpm", 80), runs()[0]["ddpm"]
    noise = runs()[1]["x0"].noise(table)
    noise[60:] = np.roll(noise[60:], 1, axis=1)
    x = jd.sample(mixture(), table, jnp.asarray(start()), noise=jnp.asarray(noise))
    assert rms(x - ends[FINE]) > 5 * rms(ends[80] - ends[FINE])
