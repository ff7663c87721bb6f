"""Eight simulated devices against one: the same numbers, forward and backward."""

import functools

import diffrax
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from compilations import counted
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import jaxdiff as jd
from jaxdiff import parallel

VP = jd.processes.vp_linear()
GRID = jd.grids.half_log_snr(VP, 5)
MEANS = np.array([[1.0, 0.2], [-0.9, 0.6], [0.1, -1.1]])
BATCH = 16

TABLEAUX = {
    "deterministic": jd.solvers.dpm_solver_pp_multistep(GRID, order=2),
    "stochastic": jd.solvers.ddpm(GRID),
}


def mixture():
    return jd.gaussian_mixture(MEANS, [0.6] * 3, [0.3, 0.45, 0.25], VP, prediction="eps")


def with_params(params):
    return jd.Denoiser(mixture().fn, "eps", params, mixture().time)


def starts(dtype=jnp.float32):
    return VP.prior(jax.random.key(0), (BATCH, 2), dtype)


def keys(count=BATCH):
    return jd.sample_keys(jax.random.key(1), np.arange(count))


def one_by_one(denoiser, tableau, x, keys, cond=None):
    """The single-device loop: every sample alone, with its own key."""
    run = jax.jit(lambda x, key, cond: jd.sample(denoiser, tableau, x, key, cond=cond))
    part = lambda tree, i: jax.tree.map(lambda a: a[i : i + 1], tree)  # noqa: E731
    rows = [run(x[i : i + 1], keys[i : i + 1], part(cond, i)) for i in range(len(x))]
    return np.concatenate(rows)


def loss_of(run):
    weight = np.random.default_rng(0).normal(size=(BATCH, 2))
    return lambda params, x: jnp.sum(weight * run(with_params(params), x))


def named(tableau, key):
    sharding = NamedSharding(parallel.mesh(), P("data"))
    return jax.jit(
        lambda denoiser, x: jd.sample(denoiser, tableau, x, jax.device_put(key, sharding)),
        in_shardings=(None, sharding), out_shardings=sharding,
    )  # fmt: skip


def sharded(tableau, key):
    run = parallel.sharded(jd.sample, parallel.mesh())
    return lambda denoiser, x: run(denoiser, tableau, x, key)


def pmapped(tableau, key):
    """What users write: `jax.pmap` over (x, per-sample keys), each [devices, per device, ...]."""

    def local(params, x, keys):
        return jd.sample(
            with_params(params), tableau, x, keys, adjoint=diffrax.DirectAdjoint()
        )  # fmt: skip

    split = lambda a: a.reshape(8, -1, *a.shape[1:])  # noqa: E731
    run = jax.pmap(local, in_axes=(None, 0, 0))
    return lambda denoiser, x: run(denoiser.params, split(x), split(key)).reshape(x.shape)


WAYS = {"named": named, "sharded": sharded, "pmapped": pmapped}


# --- equal to one device --------------------------------------------------------------------------


@pytest.mark.parametrize("way", WAYS)
def test_eight_devices_equal_one_in_float32(way):
    x, tableau = starts(), TABLEAUX["stochastic"]
    out = WAYS[way](tableau, keys())(mixture(), x)
    exact = one_by_one(mixture(), tableau, x, keys())
    np.testing.assert_allclose(out, exact, rtol=0, atol=1e-5)
    assert len(out.sharding.device_set) == 8


@functools.cache
def _on_one_device(kind):
    loss = loss_of(lambda denoiser, x: jd.sample(denoiser, TABLEAUX[kind], x, keys()))
    return jax.jit(jax.value_and_grad(loss, (0, 1)))(mixture().params, starts(jnp.float64))


@pytest.mark.parametrize("kind", TABLEAUX)
@pytest.mark.parametrize("way", WAYS)
def test_gradients_on_eight_devices_equal_one_in_float64(way, kind, x64):
    x, tableau = starts(jnp.float64), TABLEAUX[kind]
    value, (params, start) = jax.value_and_grad(loss_of(WAYS[way](tableau, keys())), (0, 1))(
        mixture().params, x
    )
    exact_value, (exact_params, exact_start) = _on_one_device(kind)
    np.testing.assert_allclose(value, exact_value, rtol=1e-12)
    np.testing.assert_allclose(start, exact_start, rtol=0, atol=1e-12)
    for name in ("means", "variances", "log_weights"):
        np.testing.assert_allclose(
            getattr(params, name), getattr(exact_params, name), rtol=0, atol=1e-12, err_msg=name
        )
    assert np.abs(exact_params.means).max() > 0.1


def test_gradients_taken_inside_pmap_equal_one_device(x64):
    x, tableau = starts(jnp.float64), TABLEAUX["stochastic"]
    weight = np.random.default_rng(0).normal(size=(BATCH, 2))

    def local(params, x, keys, weight):
        def loss(params, x):
            out = jd.sample(
                with_params(params), tableau, x, keys, adjoint=diffrax.DirectAdjoint()
            )  # fmt: skip
            return jnp.sum(weight * out)

        params, start = jax.grad(loss, (0, 1))(params, x)
        return jax.lax.psum(params, "devices"), start

    split = (a.reshape(8, -1, *a.shape[1:]) for a in (x, keys(), weight))
    params, start = jax.pmap(local, "devices", in_axes=(None, 0, 0, 0))(mixture().params, *split)
    _, (exact_params, exact_start) = _on_one_device("stochastic")
    np.testing.assert_allclose(start.reshape(x.shape), exact_start, rtol=0, atol=1e-12)
    np.testing.assert_allclose(params.means[0], exact_params.means, rtol=0, atol=1e-12)
    np.testing.assert_allclose(params.means[7], exact_params.means, rtol=0, atol=1e-12)


def _only_noise(x, t):
    # A score of zero and a start of zero: what comes out is the sum of the scaled draws.
    return jnp.zeros_like(x)


def test_noise_is_the_same_to_the_bit():
    denoiser, tableau = jd.Denoiser(_only_noise), jd.solvers.ddpm(jd.grids.half_log_snr(VP, 1))
    x = jnp.zeros((BATCH, 4))
    exact = one_by_one(denoiser, tableau, x, keys())
    assert np.abs(exact).min() > 0
    for way in WAYS.values():
        if way is not pmapped:
            np.testing.assert_array_equal(way(tableau, keys())(denoiser, x), exact)
    split = (x.reshape(8, 2, 4), keys().reshape(8, 2))
    mapped = jax.pmap(lambda x, keys: jd.sample(denoiser, tableau, x, keys))(*split)
    np.testing.assert_array_equal(mapped.reshape(BATCH, 4), exact)


def test_a_batch_of_eight_equals_eight_of_one():
    denoiser, tableau, x = mixture(), TABLEAUX["stochastic"], starts()[:8]
    whole = jd.sample(denoiser, tableau, x, keys(8))
    alone = one_by_one(denoiser, tableau, x, keys(8))
    np.testing.assert_allclose(whole, alone, rtol=0, atol=1e-5)


# --- sharded --------------------------------------------------------------------------------------


def test_sharded_output_stays_split_and_a_second_call_compiles_nothing():
    mesh = parallel.mesh(data=4, other=2)
    run = parallel.sharded(jd.sample, mesh)
    tableau = TABLEAUX["stochastic"]
    out = run(mixture(), tableau, starts(), jax.random.key(3))
    assert out.sharding.is_equivalent_to(NamedSharding(mesh, P("data")), out.ndim)
    assert {shard.data.shape for shard in out.addressable_shards} == {(4, 2)}
    # A single key gives the numbers of one device with that key.
    exact = jd.sample(mixture(), tableau, starts(), jax.random.key(3))
    np.testing.assert_allclose(out, exact, rtol=0, atol=1e-5)
    other = jd.gaussian_mixture(MEANS + 1.0, [0.5] * 3, [0.2, 0.4, 0.4], VP, prediction="eps")
    with counted() as compiled:
        # A function made anew, new parameters, another table of the shape.
        moved = parallel.sharded(jd.sample, mesh)(
            other, jd.solvers.ddpm(jd.grids.uniform(VP, 5)), starts(), jax.random.key(4)
        )
    assert not compiled
    assert np.abs(np.asarray(moved) - np.asarray(out)).max() > 0.1


@pytest.mark.parametrize("save", ["trajectory", "nodes", "x0"])
def test_every_save_splits_its_batch_axis(save, x64):
    mesh = parallel.mesh()
    args = mixture(), TABLEAUX["stochastic"], starts(jnp.float64), jax.random.key(3)
    out = parallel.sharded(jd.sample, mesh)(*args, save=save)
    exact = jd.sample(*args, save=save)
    assert out.sharding.is_equivalent_to(NamedSharding(mesh, P(None, "data")), out.ndim)
    np.testing.assert_allclose(out, exact, rtol=0, atol=1e-12)


def _conditional(x, t, cond):
    return jax.tree.map(lambda a: jnp.sin(a) * cond["scale"] + cond["shift"][:, None], x)


def test_tree_state_and_condition_are_split_and_what_is_not_the_batch_is_copied():
    rng = np.random.default_rng(1)
    x = {"a": rng.normal(size=(BATCH, 3)), "b": rng.normal(size=(BATCH, 2))}
    x = jax.tree.map(np.float32, x)
    cond = {"shift": np.float32(rng.normal(size=BATCH)), "scale": np.float32([0.7])}
    args = jd.Denoiser(_conditional, "x0"), TABLEAUX["deterministic"], x
    out = parallel.sharded(jd.sample, parallel.mesh(data=4, fsdp=2), ("data", "fsdp"))(
        *args, cond=cond
    )
    exact = jd.sample(*args, cond=cond)
    for name in x:
        np.testing.assert_allclose(out[name], exact[name], rtol=0, atol=1e-5)
        assert {shard.data.shape[0] for shard in out[name].addressable_shards} == {2}


def test_noise_arrays_and_brownian_paths_are_split():
    tableau = TABLEAUX["stochastic"]
    array = jax.random.normal(jax.random.key(5), (tableau.draws, BATCH, 2))
    for noise in (array, jd.BrownianPath(VP, "x0", jax.random.key(6))):
        out = parallel.sharded(jd.sample, parallel.mesh())(
            mixture(), tableau, starts(), noise=noise
        )  # fmt: skip
        exact = jd.sample(mixture(), tableau, starts(), noise=noise)
        np.testing.assert_allclose(out, exact, rtol=0, atol=1e-5)


def test_forward_mode_through_sharded(x64):
    x, tableau = starts(jnp.float64), TABLEAUX["deterministic"]
    options = {"adjoint": diffrax.ForwardMode()}
    run = parallel.sharded(jd.sample, parallel.mesh())
    tangents = [
        jax.jvp(lambda x, f=f: f(mixture(), tableau, x, **options), (x,), (jnp.cos(x),))[1]
        for f in (run, jd.sample)
    ]
    np.testing.assert_allclose(*tangents, rtol=0, atol=1e-12)


# --- solvers over devices -------------------------------------------------------------------------


def test_stacked_tableaux_split_over_devices(x64):
    grids = [jd.grids.half_log_snr(VP, 3 + i % 4) for i in range(BATCH)]
    tableaux = [
        jd.solvers.ddpm(g) if i % 2 else jd.solvers.dpm_solver_pp_multistep(g, order=1 + i % 3)
        for i, g in enumerate(grids)
    ]
    x = starts(jnp.float64)

    def ablation(tableau, x, keys):
        return jax.vmap(lambda table: jd.sample(mixture(), table, x, keys))(tableau)

    run = jax.jit(
        jax.shard_map(
            ablation, mesh=parallel.mesh(solver=8), in_specs=(P("solver"), P(), P()),
            out_specs=P("solver"), check_vma=False,
        )
    )  # fmt: skip
    stacked = jax.tree.map(jnp.asarray, jd.solvers.stack(tableaux))
    out = run(stacked, x, keys())
    assert {shard.data.shape for shard in out.addressable_shards} == {(2, BATCH, 2)}
    for tableau, row in zip(tableaux[:3], out):
        exact = jd.sample(mixture(), tableau, x, keys())
        np.testing.assert_allclose(row, exact, rtol=0, atol=1e-12)


def test_vmap_over_tableaux_around_sharded():
    tableaux = [jd.solvers.ddim(GRID, eta=eta) for eta in (0.2, 1.0)]
    run = parallel.sharded(jd.sample, parallel.mesh())
    out = jax.vmap(lambda table: run(mixture(), table, starts(), keys()))(
        jax.tree.map(jnp.asarray, jd.solvers.stack(tableaux))
    )
    for tableau, row in zip(tableaux, out):
        exact = jd.sample(mixture(), tableau, starts(), keys())
        np.testing.assert_allclose(row, exact, rtol=0, atol=1e-5)


# --- mistakes -------------------------------------------------------------------------------------


def test_a_single_key_inside_shard_map_or_pmap_is_an_error():
    def run(x):
        return jd.sample(mixture(), TABLEAUX["stochastic"], x, jax.random.key(0))

    mapped = jax.shard_map(
        run, mesh=parallel.mesh(), in_specs=P("data"), out_specs=P("data"), check_vma=False
    )
    with pytest.raises(ValueError, match=r"single key.*\('data',\).*sample_keys"):
        mapped(starts())
    with pytest.raises(ValueError, match="single key.*sample_keys"):
        jax.pmap(run)(starts().reshape(8, 2, 2))


@pytest.mark.xfail(
    strict=True, raises=ValueError, reason="equinox compares sharding metadata: equinox PR #1261"
)
def test_the_default_adjoint_differentiates_inside_shard_map():
    # When this passes, `sharded` and the documentation no longer need DirectAdjoint.
    def loss(x):
        out = jd.sample(
            mixture(), TABLEAUX["deterministic"], x, adjoint=diffrax.RecursiveCheckpointAdjoint()
        )
        return jnp.sum(out**2, -1)

    mapped = jax.shard_map(
        loss, mesh=parallel.mesh(), in_specs=P("data"), out_specs=P("data"), check_vma=False
    )
    try:
        jax.jit(jax.grad(lambda x: jnp.sum(mapped(x))))(starts())
    except ValueError as error:
        assert "called with different dynamic arguments" in str(error)
        raise


def test_mesh():
    assert parallel.mesh().shape == {"data": 8}
    assert parallel.mesh(devices=jax.devices()[4:6], fsdp=-1).devices.tolist() == jax.devices()[4:6]
    mesh = parallel.mesh(data=-1, fsdp=2)
    assert dict(mesh.shape) == {"data": 4, "fsdp": 2}
    assert mesh.axis_types == (AxisType.Auto, AxisType.Auto)
    for sizes in ({"data": 3}, {"data": 16}, {"data": -1, "fsdp": -1}, {"data": -1, "fsdp": 3}):
        with pytest.raises(ValueError, match="multiply to the 8 devices"):
            parallel.mesh(**sizes)


def test_what_every_process_holds_whole_is_split_and_gathered_again():
    mesh = parallel.mesh(data=2, fsdp=2, tensor=2)
    whole = {"x": starts(), "key": keys()}
    split = parallel.split_batch(mesh, whole)
    for name, spread in split.items():
        assert spread.sharding.shard_shape(spread.shape)[0] == BATCH // parallel.shards(mesh) == 4
        assert parallel.mesh_of(spread) == mesh and parallel.mesh_of(whole[name]) is None
    np.testing.assert_array_equal(parallel.gather(split["x"]), whole["x"])
    np.testing.assert_array_equal(*map(jax.random.key_data, (split["key"], whole["key"])))


@pytest.mark.parametrize(
    "change, error, message",
    [
        (
            {"x_T": np.zeros((12, 2), np.float32)},
            ValueError,
            "batch of 12 .* 8 devices.*multiple of 8",
        ),
        ({"save": "state"}, ValueError, "save='state'.*NamedSharding"),
        ({"control": jd.Control()}, TypeError, "takes no control.*NamedSharding"),
        ({"key": None}, ValueError, "stochastic: pass key= or noise="),
        ({"key": np.zeros((8, 2), np.uint32)}, ValueError, "8 keys for 16 samples"),
        (
            {"denoiser": jd.Denoiser(lambda x, t, memory: (x, memory), memory=np.zeros(3))},
            ValueError,
            "memory.*NamedSharding",
        ),
        (
            {"tableau": jd.solvers.ddim(jd.grids.uniform(jd.processes.flow(), 4))},
            ValueError,
            "'eps' network does not determine",
        ),
    ],
)
def test_errors_say_what_to_do(change, error, message):
    arguments = {
        "denoiser": mixture(), "tableau": TABLEAUX["stochastic"], "x_T": starts(),
        "key": jax.random.key(0), **change,
    }  # fmt: skip
    with pytest.raises(error, match=message):
        parallel.sharded(jd.sample, parallel.mesh())(**arguments)


def test_sharded_checks_its_mesh_and_axis():
    with pytest.raises(ValueError, match="no axis 'batch'; its axes are .*data"):
        parallel.sharded(jd.sample, parallel.mesh(), "batch")
    with pytest.raises(TypeError, match="jax.sharding.Mesh, got int"):
        parallel.sharded(jd.sample, 8)
