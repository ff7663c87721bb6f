"""EDM's time discretisations of VP, VE and iDDPM networks are grids of ours."""

import numpy as np
from official_cases import cases

import jaxdiff as jd


def nodes(discretization):
    """Their sigma, 6 levels, without the 0 at the end; here alpha = 1."""
    found = [c for c in cases() if c["discretization"] == discretization and not c["schedule"]]
    return found[0].nodes[:-1, 2]


def test_vps_are_uniform_in_the_time_of_the_linear_process():
    grid = jd.grids.uniform(jd.processes.vp_linear(0.1, 20.0), 5)
    np.testing.assert_allclose(grid.sigma / grid.alpha, nodes("vp"), rtol=1e-12)


def test_ves_are_uniform_in_half_log_snr():
    grid = jd.grids.half_log_snr(jd.processes.edm(0.02, 100.0), 5)
    np.testing.assert_allclose(grid.sigma, nodes("ve"), rtol=1e-12)


def test_iddpms_are_evenly_chosen_among_the_cosine_tables_levels_in_their_span():
    process = jd.processes.ddpm("squaredcos")
    levels = process.sigma(np.arange(1000.0)) / process.alpha(np.arange(1000.0))
    inside = np.flatnonzero((levels >= 0.002) & (levels <= 81.0))[::-1]
    # Their table has sigma = 0 too, which lies below the span.
    chosen = inside[np.round(np.linspace(0, len(inside) - 1, 6)).astype(int)]
    grid = jd.grids.from_times(process, chosen)
    np.testing.assert_allclose(grid.sigma / grid.alpha, nodes("iddpm"), rtol=1e-9)
