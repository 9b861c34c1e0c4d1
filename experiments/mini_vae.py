"""Train the bundled miniature autoencoder on scenes, and measure it.

The paper's autoencoder, 8x down with 16 channels, was not published. This one with a million parameters stands in for
it: a diffusers `AutoencoderKL`, like the SD3 and FLUX.1 autoencoders that stand in at paper scale.

    python -m experiments.mini_vae train --config experiments/configs/mini_vae.yaml
    python -m experiments.mini_vae train --config experiments/configs/mini_vae_decoder.yaml
    python -m experiments.mini_vae card --out lidit/assets/vae
"""

from __future__ import annotations

import time
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL
from torch import Tensor
from torch.nn import functional as F

from experiments.cards import versions, write_card
from lidit.pixels import signed, to_uint8
from lidit.scenes.corpus import examples
from lidit.scenes.draw import Scene, grid
from lidit.scenes.judge import read


def images(seed: int, count: int, width: int, height: int, held: bool = False) -> Tensor:
    """Pictures of drawn scenes as uint8 (n 3 h w)."""
    drawn = [torch.from_numpy(e.image) for e in examples(seed, count, width, height, held)]
    return torch.stack(drawn).permute(0, 3, 1, 2).contiguous()


def train(
    out: str,
    widths: tuple[int, ...] = (16, 32, 64, 64),
    layers_per_block: int = 1,
    latent_channels: int = 16,
    steps: int = 3000,
    batch_size: int = 32,
    learning_rate: float = 2e-3,
    kl_weight: float = 3e-4,
    scenes: int = 6000,
    edge_weight: float = 0.0,
    start: str | None = None,
    seed: int = 0,
    threads: int = 2,
) -> None:
    """Train the autoencoder and save it with its latent statistics as scaling and shift factor.

    With `start`, only the decoder of an earlier autoencoder is trained further, so that its latents stay the same.

    Args:
        out: folder to write (config.json and safetensors).
        widths: channels of each resolution level; sides are halved between two levels.
        layers_per_block: residual blocks in each level.
        latent_channels: channels of the latent.
        steps: optimizer steps.
        batch_size: images in a step.
        learning_rate: peak learning rate, between a warm-up and a cosine to zero.
        kl_weight: weight of the KL divergence per latent element, relative to the pixel loss.
        scenes: number of drawn images to train on, for each aspect.
        edge_weight: weight of the absolute error of neighbouring pixels' differences, which small textures need.
        start: folder of an autoencoder whose decoder is trained further.
        seed: decides weights, data and order.
        threads: CPU threads.
    """
    torch.manual_seed(seed)
    torch.set_num_threads(threads)
    vae = (
        AutoencoderKL.from_pretrained(start, torch_dtype=torch.float32)
        if start
        else make_vae(widths, layers_per_block, latent_channels)
    )
    if start:
        vae.encoder.requires_grad_(False)
    print(f"{sum(p.numel() for p in vae.parameters()) / 1e6:.2f}M parameters; drawing {3 * scenes} scenes", flush=True)
    sets = [images(seed + i, scenes, w, h) for i, (w, h) in enumerate(((64, 64), (96, 64), (64, 96)))]
    trained = [p for p in vae.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=learning_rate, weight_decay=1e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, learning_rate, total_steps=steps, pct_start=0.05)
    began = time.time()
    for step in range(steps):
        pool = sets[0 if step % 2 == 0 else 1 + step // 2 % 2]
        pixels = signed(pool[torch.randint(len(pool), (batch_size,))])
        with torch.autocast("cpu", torch.bfloat16):
            loss, error = vae_loss(vae, pixels, kl_weight, edge_weight)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        schedule.step()
        if step % 100 == 0:
            print(f"step {step} loss {loss.item():.4f} psnr {psnr(error):.1f} {time.time() - began:.0f}s", flush=True)
    if not start:
        normalise(vae, signed(sets[0][:512]))
    vae.half().save_pretrained(out)


def make_vae(widths: tuple[int, ...], layers_per_block: int, latent_channels: int) -> AutoencoderKL:
    """An untrained autoencoder without attention, so that it treats images of all sizes alike."""
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * len(widths),
        up_block_types=("UpDecoderBlock2D",) * len(widths),
        block_out_channels=widths,
        layers_per_block=layers_per_block,
        latent_channels=latent_channels,
        norm_num_groups=8,
        mid_block_add_attention=False,
        use_quant_conv=False,
        use_post_quant_conv=False,
        scaling_factor=1.0,
        shift_factor=0.0,
    )


def vae_loss(vae: AutoencoderKL, pixels: Tensor, kl_weight: float, edge_weight: float) -> tuple[Tensor, Tensor]:
    """The loss (absolute and squared pixel error, KL divergence, edges), and the mean squared error alone."""
    posterior = vae.encode(pixels).latent_dist
    output = vae.decode(posterior.sample()).sample.float()
    error = F.mse_loss(output, pixels)
    loss = F.l1_loss(output, pixels) + error + kl_weight * posterior.kl().mean() / posterior.mean[0].numel()
    for axis in (2, 3) if edge_weight else ():
        loss = loss + edge_weight * F.l1_loss(output.diff(dim=axis), pixels.diff(dim=axis))
    return loss, error


def psnr(error: Tensor) -> float:
    """Peak signal-to-noise ratio, in dB, of images in [-1, 1], from their mean squared error."""
    return float(10 * torch.log10(4 / error.detach()))


@torch.no_grad()
def normalise(vae: AutoencoderKL, pixels: Tensor) -> None:
    """Set the scaling and shift factors that give latents zero mean and unit variance."""
    latent = vae.encode(pixels).latent_dist.mode()
    vae.register_to_config(scaling_factor=float(1 / latent.std()), shift_factor=float(latent.mean()))


def read_right(scene: Scene, image: np.ndarray) -> int:
    """How many objects of a scene the judge reads in the right cell with all attributes right."""
    rows, cols = grid(image.shape[1], image.shape[0])
    cells = {
        (int(s.y * rows / image.shape[0]), int(s.x * cols / image.shape[1])): (s.shape, s.color, s.texture, s.size)
        for s in read(image)
    }
    return sum(cells.get((o.row, o.col)) == (o.shape, o.color, o.texture, o.size) for o in scene.objects)


@torch.no_grad()
def card(out: str = "lidit/assets/vae", count: int = 1000, seed: int = 10_000) -> None:
    """Measure reconstructions of held-out scenes and write card.json beside the weights.

    Args:
        out: the trained autoencoder's folder.
        count: number of held-out scenes.
        seed: seed of the held-out scenes.
    """
    vae = AutoencoderKL.from_pretrained(out, torch_dtype=torch.float32).eval()
    drawn = list(examples(seed, count, held=True))
    pixels = torch.stack([torch.from_numpy(e.image) for e in drawn]).permute(0, 3, 1, 2)
    output = torch.cat([vae.decode(vae.encode(signed(p)).latent_dist.mode()).sample for p in pixels.split(50)])
    found = [read_right(e.scene, image) for e, image in zip(drawn, to_uint8(output), strict=True)]
    write_card(
        Path(out),
        made_by=[
            f"python -m experiments.mini_vae train --config experiments/configs/{name}.yaml"
            for name in ("mini_vae", "mini_vae_decoder")
        ],
        seed=[0, 1],
        data=f"drawn scenes; measured on {count} held-out 64x64 scenes of seed {seed}",
        measured={
            "psnr_db": round(psnr(F.mse_loss(output.clamp(-1, 1), signed(pixels))), 2),
            "objects_read_by_the_judge": round(sum(found) / sum(len(e.scene.objects) for e in drawn), 4),
            "parameters": sum(p.numel() for p in vae.parameters()),
        },
        versions=versions("torch", "diffusers"),
    )


if __name__ == "__main__":
    from jsonargparse import auto_cli

    auto_cli({"train": train, "card": card}, as_positional=False)
