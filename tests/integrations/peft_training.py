"""What the tests of adapters do with a model: a few steps of training, and its logits."""

import torch
from torch import Tensor, nn

IDS = torch.arange(3, 15)[None]


def logits(model: nn.Module, ids: Tensor = IDS) -> Tensor:
    model.eval()
    with torch.no_grad():
        return model(ids).logits


def train(model: nn.Module, ids: Tensor = IDS, steps: int = 4) -> list[float]:
    """The losses before each step."""
    model.train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2, weight_decay=0.0)
    losses = []
    for _ in range(steps):
        loss = model(ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses
