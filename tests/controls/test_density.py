"""The Ito density estimator along sampled paths, against the exact density where they end."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from oracles import BROAD, Mixture

import jaxdiff as jd
from jaxdiff.controls import ito_density, ito_increment

VP = jd.processes.vp_linear()
OTHER = Mixture(BROAD.means[::-1] * 0.8, BROAD.std * 1.1, np.array([0.5, 0.2, 0.3]))


def exact(mixture, prediction="eps"):
    return jd.gaussian_mixture(mixture.means, mixture.std, mixture.weights, prediction=prediction)


def run(steps, build=jd.solvers.ddpm, count=1000, process=VP, prediction="eps", **options):
    """(estimates [models, count], states, exact log-densities of BROAD and of OTHER) at the end."""
    grid = jd.grids.half_log_snr(process, steps)
    x_T = BROAD.sample(np.random.default_rng(0), count, grid.alpha[0], grid.sigma[0])
    x_T, table, denoiser = x_T.astype(np.float32), build(grid), exact(BROAD, prediction)
    control = ito_density(grid, table, denoiser, **options)
    state = jd.sample(denoiser, table, x_T, jax.random.key(1), control=control, save="state")
    x = np.asarray(state.registers[0], np.float64)
    end = grid.alpha[-1], grid.sigma[-1]
    truth = np.stack([m.log_density(x, *end) for m in (BROAD, OTHER)])
    return np.asarray(state.aux.log_density, np.float64), x, truth


def rms(error):
    return np.sqrt(np.mean(error**2))


@pytest.fixture(scope="module")
def paths():
    """{steps: run}, with the density of another model along the same path."""
    return {n: run(n, others=(exact(OTHER, "v"),)) for n in (50, 200)}


def test_it_converges_to_the_exact_density_with_strong_order_one_half(paths):
    errors = {n: rms(found[0] - truth[0]) for n, (found, _, truth) in paths.items()}
    assert errors[200] < 0.12
    assert 1.6 < errors[50] / errors[200] < 2.6, errors
    found, _, truth = paths[200]
    assert np.corrcoef(found[0], truth[0])[0, 1] > 0.99
    # No bias beside the scatter of about 0.1.
    assert abs(np.mean(found[0] - truth[0])) < 0.03


def test_another_model_s_density_along_the_same_path(paths):
    found, _, truth = paths[200]
    assert found.shape == (2, 1000)
    assert rms(found[1] - truth[1]) < 0.15
    # It is that model's: the two densities differ by far more.
    assert rms(truth[1] - truth[0]) > 0.4
    assert np.corrcoef(found[1] - found[0], truth[1] - truth[0])[0, 1] > 0.98


def test_the_reference_makes_the_error_a_tenth(paths):
    """Without it the estimator is the published one: it converges too, from further away."""
    found, _, truth = run(200, reference=None)
    plain = rms(found[0] - truth[0])
    assert 0.5 < plain < 1.6
    assert plain > 6 * rms(paths[200][0][0] - paths[200][2][0])


@pytest.mark.parametrize(
    "name, process, prediction",
    [
        ("sa_solver", VP, "x0"),  # its nodes stand in another register
        ("kdpm2_ancestral", jd.processes.edm(), "x0"),  # two rows a step
        ("dpm_solver_sde_multistep", jd.processes.sub_vp(), "v"),
    ],
)
def test_other_samplers_and_processes(name, process, prediction):
    build = lambda grid: jd.solvers.build(name, grid)  # noqa: E731
    found, _, truth = run(150, build, 500, process, prediction)
    assert rms(found[0] - truth[0]) < 0.25


def test_samplers_of_the_catalogue_are_taken_or_refused_for_their_noise():
    grid = jd.grids.half_log_snr(VP, 40)
    taken = set()
    for name in jd.solvers.CATALOGUE:
        try:
            ito_density(grid, jd.solvers.build(name, grid), exact(BROAD))
            taken.add(name)
        except ValueError:
            pass
    assert taken >= {
        "ddpm", "euler_ancestral", "euler_maruyama", "reverse_diffusion", "seeds", "sa_solver",
        "dpm_solver_pp_sde", "dpm_solver_pp_2s_ancestral", "dpm_solver_sde_multistep",
    }  # fmt: skip
    refused = {"ddim", "heun", "er_sde", "tcd", "consistency", "predictor_corrector", "restart"}
    assert not taken & refused


def test_an_increment_of_a_single_gaussian_is_exact_with_its_own_reference(x64):
    """Data of one normal of standard deviation c: q is the reference, so one long step is exact."""
    rng = np.random.default_rng(2)
    x, x_next = {"a": rng.normal(size=(5, 3))}, {"a": rng.normal(size=(5, 3))}
    level, next_level, c = (0.3, 0.9), (0.8, 0.5), 0.7
    density = {
        ends: Mixture(np.zeros((1, 3)), np.array([c]), np.ones(1)).log_density(state["a"], *ends)
        for ends, state in ((level, x), (next_level, x_next))
    }
    eps = {"a": level[1] * x["a"] / (level[0] ** 2 * c**2 + level[1] ** 2)}
    found = ito_increment(*jax.tree.map(jnp.asarray, (x, eps, x_next)), level, next_level, c)
    np.testing.assert_allclose(found, density[next_level] - density[level], rtol=1e-12)


def test_the_start_s_density_is_added():
    grid = jd.grids.half_log_snr(VP, 2)
    table, denoiser = jd.solvers.ddpm(grid), exact(BROAD)
    x = np.zeros((3, 2), np.float32)

    def final(initial):
        control = ito_density(grid, table, denoiser, initial=initial)
        state = jd.sample(denoiser, table, x, jax.random.key(0), control=control, save="state")
        return np.asarray(state.aux.log_density[0])

    default = -np.log(2 * np.pi)  # log N(0; 0, I) in two dimensions
    shifted = final(np.array([1.0, 2.0, 3.0]) + default)
    np.testing.assert_allclose(shifted - final(None), [1, 2, 3], atol=1e-4)


GRID = jd.grids.half_log_snr(VP, 10)


@pytest.mark.parametrize(
    "grid, table, denoiser, error, message",
    [
        (GRID, jd.solvers.ddim(GRID), exact(BROAD), ValueError, "jaxdiff.ode.log_likelihood"),
        (
            GRID,
            jd.solvers.ddim(GRID, eta=0.3),
            exact(BROAD),
            ValueError,
            "of the reverse SDE's noise.*jaxdiff.ode.log_likelihood",
        ),
        (
            jd.grids.half_log_snr(VP, 9),
            jd.solvers.ddpm(GRID),
            exact(BROAD),
            ValueError,
            "11 nodes, the grid 10",
        ),
        (
            jd.grids.uniform(VP, 10),
            jd.solvers.ddpm(GRID),
            exact(BROAD),
            ValueError,
            "at the nodes of this grid",
        ),
        (
            jd.grids.uniform(jd.processes.flow(), 10),
            jd.solvers.ddpm(GRID),
            exact(BROAD),
            ValueError,
            "alpha > 0 and a t_min with sigma > 0",
        ),
        (GRID, GRID, exact(BROAD), TypeError, "expected a grid and a tableau"),
        (GRID, jd.solvers.ddpm(GRID), lambda x, t: x, TypeError, "Denoiser"),
        (
            GRID,
            jd.solvers.ddpm(GRID),
            jd.clip_x0(exact(BROAD), keep_eps=True),
            ValueError,
            "one prediction",
        ),
    ],
)
def test_bad_input_is_named(grid, table, denoiser, error, message):
    with pytest.raises(error, match=message):
        ito_density(grid, table, denoiser)


def test_another_model_with_memory_is_refused():
    denoiser = exact(BROAD)
    other = jd.Denoiser(denoiser.fn, "eps", denoiser.params, memory=np.zeros(1))
    with pytest.raises(ValueError, match="others must be without memory"):
        ito_density(GRID, jd.solvers.ddpm(GRID), denoiser, others=(other,))
