"""A model that is no language model: a small U-Net that removes noise, as diffusion models have it.

It is trained for a moment on pictures of blobs, quantized (convolutions too), compared to the dense one, sampled from,
saved and loaded.

python docs/examples/denoiser.py [STEPS]
"""

import copy
import itertools
import math
import sys
import tempfile

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from hqqtensor import HqqConfig, check_quantization_status, load_model, quantize_, save_model

SIDE = 16


class Block(nn.Module):
    """Two convolutions, told the noise level in between."""

    def __init__(self, inputs: int, outputs: int, time: int) -> None:
        super().__init__()
        self.norm1, self.conv1 = nn.GroupNorm(8, inputs), nn.Conv2d(inputs, outputs, 3, padding=1)
        self.time = nn.Linear(time, outputs)
        self.norm2, self.conv2 = nn.GroupNorm(8, outputs), nn.Conv2d(outputs, outputs, 3, padding=1)
        self.conv_skip = nn.Conv2d(inputs, outputs, 1)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        h = self.conv1(F.silu(self.norm1(x))) + self.time(t)[..., None, None]
        return self.conv2(F.silu(self.norm2(h))) + self.conv_skip(x)


class Attention(nn.Module):
    """Every place looks at every other."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm = nn.GroupNorm(8, channels)
        self.qkv, self.out = nn.Linear(channels, 3 * channels), nn.Linear(channels, channels)

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(x).flatten(2).transpose(1, 2)
        q, k, v = self.qkv(h).unsqueeze(1).chunk(3, -1)
        h = self.out(F.scaled_dot_product_attention(q, k, v).squeeze(1))
        return x + h.transpose(1, 2).unflatten(2, x.shape[2:])


class Denoiser(nn.Module):
    """Pictures ``[B, 1, 16, 16]`` with noise, and noise levels ``[B]`` from 0 to 1, to the noise."""

    def __init__(self, width: int = 32) -> None:
        super().__init__()
        self.width = width
        self.time = nn.Sequential(nn.Linear(width, width), nn.SiLU(), nn.Linear(width, width))
        self.stem = nn.Conv2d(1, width, 3, padding=1)
        self.down = Block(width, width, width)
        self.conv_down = nn.Conv2d(width, 2 * width, 3, stride=2, padding=1)
        self.middle, self.attention = Block(2 * width, 2 * width, width), Attention(2 * width)
        self.conv_up = nn.ConvTranspose2d(2 * width, width, 2, stride=2)
        self.up = Block(2 * width, width, width)
        self.head = nn.Conv2d(width, 1, 3, padding=1)

    def forward(self, x: Tensor, level: Tensor) -> Tensor:
        half = torch.arange(self.width // 2, device=x.device)
        angles = 1000 * level[:, None] * torch.exp(-math.log(10000) / len(half) * half)
        t = self.time(torch.cat([angles.sin(), angles.cos()], -1))
        wide = self.down(self.stem(x), t)
        h = self.attention(self.middle(self.conv_down(wide), t))
        return self.head(self.up(torch.cat([self.conv_up(h), wide], 1), t))


def pictures(count: int) -> Tensor:
    """A bright blob somewhere, ``[count, 1, 16, 16]``."""
    place = torch.arange(SIDE) / SIDE
    middle, size = torch.rand(count, 2, 1) * 0.6 + 0.2, torch.rand(count, 1, 1) * 0.01 + 0.005
    rows, columns = ((place - middle) ** 2).unbind(1)
    return (2 * torch.exp(-(rows[:, :, None] + columns[:, None, :]) / size) - 1).unsqueeze(1)


def mixed(x: Tensor, noise: Tensor, level: Tensor) -> Tensor:
    angle = (level * math.pi / 2)[:, None, None, None]
    return x * angle.cos() + noise * angle.sin()


def train(model: Denoiser, steps: int) -> None:
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    for _ in range(steps):
        x, level = pictures(16), torch.rand(16)
        noise = torch.randn_like(x)
        F.mse_loss(model(mixed(x, noise, level), level), noise).backward()
        optimizer.step()
        optimizer.zero_grad()


@torch.no_grad()
def sample(model: Denoiser, count: int, steps: int = 10) -> Tensor:
    """From noise to pictures, without chance on the way (DDIM)."""
    x = torch.randn(count, 1, SIDE, SIDE, generator=torch.manual_seed(1))
    levels = torch.linspace(0.98, 0, steps + 1)
    for now, then in itertools.pairwise(levels):
        noise = model(x, now.expand(count))
        clean = (x - noise * (now * math.pi / 2).sin()) / (now * math.pi / 2).cos()
        x = mixed(clean.clamp(-1, 1), noise, then.expand(count))
    return x


def main(steps: int = 200) -> None:
    torch.manual_seed(0)
    dense = Denoiser()
    train(dense, steps)
    dense.eval()

    # Linear layers are taken by default, convolutions where a tag names them; stem and head, of one channel, are not.
    model = copy.deepcopy(dense)
    quantize_(model, HqqConfig(4, 32, dynamic_config={"conv*": {}}))
    print(check_quantization_status(model))

    x, level = pictures(64), torch.rand(64)
    noise = torch.randn_like(x)
    with torch.no_grad():
        given = mixed(x, noise, level)
        errors = [F.mse_loss(m(given, level), noise).item() for m in (dense, model)]
    print(f"error of the noise: dense {errors[0]:.4f}, quantized {errors[1]:.4f}")
    images = [sample(m, 16).flatten(1) for m in (dense, model)]
    print(f"cosine of sampled pictures: {F.cosine_similarity(*images).mean():.4f}")

    directory = tempfile.mkdtemp()
    save_model(model, directory)
    with torch.device("meta"):
        again = Denoiser().eval()
    load_model(again, directory)
    assert torch.equal(sample(again, 16).flatten(1), images[1])


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
