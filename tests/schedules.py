"""Every process beside its published formula, t -> (alpha, sigma), in extended precision."""

import numpy as np

from jaxdiff import processes

L = np.longdouble
PI = 4 * np.arctan(L(1))


def linear_beta(t, low="0.1", high="20"):
    """Song et al. 2021, equation 33: mean coefficient and std of the VP SDE."""
    low, high = L(low), L(high)
    alpha = np.exp(-t * t * (high - low) / 4 - t * low / 2)
    return alpha, np.sqrt(1 - alpha**2)


def cosine(t, s="0.008"):
    """Nichol & Dhariwal 2021, equation 17."""
    s = L(s)
    alpha = np.cos((t + s) / (1 + s) * PI / 2) / np.cos(s / (1 + s) * PI / 2)
    return alpha, np.sqrt(1 - alpha**2)


def simple_diffusion(t, base, resolution):
    """Hoogeboom et al. 2023: logsnr = -2 log tan(pi t / 2) + 2 log(base / resolution)."""
    log_snr = -2 * np.log(np.tan(PI * t / 2)) + 2 * np.log(L(base) / L(resolution))
    return 1 / np.sqrt(1 + np.exp(-log_snr)), 1 / np.sqrt(1 + np.exp(log_snr))


def from_betas(betas):
    """alpha_bar = cumprod(1 - beta) at the integers, half-log-SNR linear between them."""
    bar = np.cumprod(1 - np.asarray(betas, L))
    lam = (np.log(bar) - np.log(1 - bar)) / 2

    def levels(t):
        i = np.minimum(np.floor(t).astype(int), len(bar) - 2)
        between = lam[i] + (t - i) * (lam[i + 1] - lam[i])
        return 1 / np.sqrt(1 + np.exp(-2 * between)), 1 / np.sqrt(1 + np.exp(2 * between))

    return levels


def linear_betas(n, start, end):
    return [L(start) + (L(end) - L(start)) * i / (n - 1) for i in range(n)]


def scaled_linear_betas(n, start, end):
    return [b**2 for b in linear_betas(n, np.sqrt(L(start)), np.sqrt(L(end)))]


def squaredcos_betas(n):
    bar = [np.cos((L(i) / n + L("0.008")) / L("1.008") * PI / 2) ** 2 for i in range(n + 1)]
    return [min(1 - b / a, L("0.999")) for a, b in zip(bar[:-1], bar[1:])]


def rescaled(levels, clean, t_max):
    """Lin et al. 2024, algorithm 1, on a schedule of any t."""

    def out(t):
        (first, _), (last, _), (alpha, _) = levels(np.array(L(clean))), levels(L(t_max)), levels(t)
        alpha = (alpha - last) * (first / (first - last))
        return alpha, np.sqrt(1 - alpha**2)

    return out


def flow(t, shift=1):
    """Esser et al. 2024: the interpolation (1 - u) x + u eps with u of equation 23."""
    u = shift * t / (1 + (shift - 1) * t)
    return 1 - u, u


LINEAR, SCALED, SQUARED = (
    from_betas(b)
    for b in (linear_betas(1000, "1e-4", "0.02"), scaled_linear_betas(1000, "0.00085", "0.012"),
              squaredcos_betas(1000))
)  # fmt: skip

CASES = {
    "vp_linear": (processes.vp_linear(), linear_beta),
    "vp_linear_other": (
        processes.vp_linear(0.5, 12.0, t_min=0.01, t_max=0.9),
        lambda t: linear_beta(t, "0.5", "12"),
    ),
    "vp_cosine": (processes.vp_cosine(), cosine),
    "vp_cosine_s": (processes.vp_cosine(s=0.02), lambda t: cosine(t, "0.02")),
    "shifted_cosine": (processes.shifted_cosine(256), lambda t: simple_diffusion(t, 64, 256)),
    "shifted_down": (
        processes.shifted_cosine(16, base=32, t_max=0.99),
        lambda t: simple_diffusion(t, 32, 16),
    ),
    "sub_vp": (
        processes.sub_vp(),
        lambda t: (linear_beta(t)[0], 1 - linear_beta(t)[0] ** 2),  # Song et al., equation 36
    ),
    "ddpm_linear": (processes.ddpm(), LINEAR),
    "ddpm_scaled_linear": (processes.ddpm("scaled_linear"), SCALED),
    "ddpm_squaredcos": (processes.ddpm("squaredcos"), SQUARED),
    "ddpm_50": (
        processes.ddpm(num_steps=50, beta_start=0.002, beta_end=0.3),
        from_betas(linear_betas(50, "0.002", "0.3")),
    ),
    "ddpm_betas": (processes.ddpm(betas=[0.01, 0.3, 0.2, 0.5]), from_betas([0.01, 0.3, 0.2, 0.5])),
    "ve": (
        processes.ve(),
        lambda t: (np.ones_like(t), L("0.01") * (L(50) / L("0.01")) ** t),  # equation 31
    ),
    "edm": (processes.edm(), lambda t: (np.ones_like(t), t)),
    "flow": (processes.flow(), flow),
    "flow_shift": (processes.flow(3.0), lambda t: flow(t, 3)),
    "zero_ddpm_linear": (
        processes.zero_terminal_snr(processes.ddpm()), rescaled(LINEAR, 0, 999)
    ),
    "zero_ddpm_scaled": (
        processes.zero_terminal_snr(processes.ddpm("scaled_linear")), rescaled(SCALED, 0, 999)
    ),
    "zero_vp_linear": (
        processes.zero_terminal_snr(processes.vp_linear()), rescaled(linear_beta, 0, 1)
    ),
    "zero_vp_cosine": (
        processes.zero_terminal_snr(processes.vp_cosine()), rescaled(cosine, 0, L(0.9946))
    ),
}  # fmt: skip
DISCRETE = [name for name, (process, _) in CASES.items() if "ddpm" in name]


def times(process, count=201):
    """The span, dense near both ends and without them."""
    near = np.geomspace(1e-6, 0.1, 20, endpoint=False)
    u = np.concatenate([near, np.linspace(0.1, 0.9, count), 1 - near[::-1]])
    return process.t_min + u * (process.t_max - process.t_min)


# A span of each kind, without the ends where lambda is infinite.
SPANS = {
    "vp": processes.vp_linear(), "sub_vp": processes.sub_vp(), "cosine": processes.vp_cosine(),
    "ve": processes.ve(), "edm": processes.edm(), "ddpm": processes.ddpm(),
    "flow": processes.flow(t_min=0.01, t_max=0.98),
}  # fmt: skip
