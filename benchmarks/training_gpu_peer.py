"""diffusers' DiT on the same card, for benchmarks/training_gpu.py, in a Python of its own with torch.

Takes its settings as JSON; prints images per second of DDIM, in bfloat16, with the network as it is
and compiled by torch, and the versions, as JSON.
"""

import json
import statistics
import sys
import time

import diffusers
import torch


def main(device, size, channels, classes, patch_size, width, depth, num_heads, batch, steps, rounds):
    if device == "cuda" and not torch.cuda.is_available():
        raise SystemExit(f"torch {torch.__version__} finds no CUDA device")
    model = diffusers.DiTTransformer2DModel(
        num_attention_heads=num_heads, attention_head_dim=width // num_heads, in_channels=channels,
        out_channels=2 * channels, num_layers=depth, sample_size=size, patch_size=patch_size,
        num_embeds_ada_norm=classes,
    ).to(device, torch.bfloat16).eval()  # fmt: skip
    scheduler = diffusers.DDIMScheduler(beta_schedule="linear", clip_sample=False)
    scheduler.set_timesteps(steps)
    labels = torch.arange(batch, device=device) % classes
    start = torch.randn(batch, channels, size, size, device=device)
    times = scheduler.timesteps.to(device)

    def wait():
        if device == "cuda":
            torch.cuda.synchronize()

    @torch.no_grad()
    def sample(network):
        x = start
        for t in times:
            out = network(x.to(torch.bfloat16), timestep=t.expand(batch), class_labels=labels).sample
            x = scheduler.step(out[:, :channels].float(), t, x).prev_sample
        wait()

    def rate(network):
        sample(network)
        found = []
        for _ in range(rounds):
            begin = time.perf_counter()
            sample(network)
            found.append(time.perf_counter() - begin)
        return round(batch / statistics.median(found), 2)

    rates = {"eager": rate(model)}
    if device == "cuda":
        rates["compiled"] = rate(torch.compile(model))
    versions = {"torch": torch.__version__, "diffusers": diffusers.__version__}
    print(json.dumps({"images_per_second": rates, "versions": versions}))


if __name__ == "__main__":
    main(**json.loads(sys.argv[1]))
