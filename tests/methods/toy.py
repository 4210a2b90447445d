# SPDX-License-Identifier: Apache-2.0
"""A small network with per-modality encoders, as a user might bring one, and a trainer for it."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from monai.engines import SupervisedTrainer
from torch import Tensor, nn

MODALITIES = ("flair", "t1ce", "t1", "t2")


class ToyNetwork(nn.Module):
    """One 3×3 convolution a modality, a fusing 1×1 convolution, a 1×1 head. No batch statistics."""

    def __init__(self, modalities: Sequence[str] = MODALITIES, classes: int = 4, width: int = 5) -> None:
        super().__init__()
        self.encoders = nn.ModuleDict(
            {m: nn.Sequential(nn.Conv2d(1, 3, 3, padding=1), nn.Tanh(), nn.Conv2d(3, 3, 1)) for m in modalities}
        )
        self.trunk = nn.Sequential(nn.Conv2d(3 * len(modalities), width, 1), nn.Tanh())
        self.head = nn.Conv2d(width, classes, 1)

    def forward(self, x: Tensor) -> Tensor:
        features = [encoder(x[:, i : i + 1]) for i, encoder in enumerate(self.encoders.values())]
        return self.head(self.trunk(torch.cat(features, dim=1)))


class ToyClassifiers(nn.Module):
    """The like of each modality alone."""

    def __init__(
        self, modalities: Sequence[str] = MODALITIES, classes: int = 4, width: int = 5, dropout: float = 0.0
    ) -> None:
        super().__init__()
        self.trunks = nn.ModuleDict(
            {m: nn.Sequential(nn.Conv2d(3, width, 1), nn.Tanh(), nn.Dropout(dropout)) for m in modalities}
        )
        self.heads = nn.ModuleDict({m: nn.Conv2d(width, classes, 1) for m in modalities})

    def forward(self, features: dict[str, Tensor], size: Sequence[int]) -> dict[str, Tensor]:
        return {m: self.heads[m](self.trunks[m](h)) for m, h in features.items()}


class RegressionNetwork(nn.Module):
    """Vectors in, one number out."""

    def __init__(self, modalities: Sequence[str], width: int = 6) -> None:
        super().__init__()
        self.encoders = nn.ModuleDict({m: nn.Sequential(nn.Linear(4, width), nn.Tanh()) for m in modalities})
        self.head = nn.Linear(width, 1)

    def forward(self, x: Tensor) -> Tensor:
        features = [encoder(x[:, i]) for i, encoder in enumerate(self.encoders.values())]
        return self.head(torch.stack(features).sum(dim=0))


class RegressionClassifiers(nn.Module):
    """One linear layer a modality."""

    def __init__(self, modalities: Sequence[str], width: int = 6) -> None:
        super().__init__()
        self.heads = nn.ModuleDict({m: nn.Linear(width, 1) for m in modalities})

    def forward(self, features: dict[str, Tensor]) -> dict[str, Tensor]:
        return {m: self.heads[m](h) for m, h in features.items()}


def cross_entropy(logits: Tensor, target: Tensor) -> Tensor:
    return nn.functional.cross_entropy(logits, target[:, 0].long())


def l1(prediction: Tensor, target: Tensor) -> Tensor:
    return (prediction.flatten() - target.flatten()).abs().mean()


def batches(number: int, *, modalities: int = 4, size: int = 6, batch: int = 2, seed: int = 0, dtype=torch.float32):
    """Images and labels that images say something about, the first modality most."""
    generator = torch.Generator().manual_seed(seed)
    result = []
    for _ in range(number):
        label = torch.randint(0, 4, (batch, 1, size, size), generator=generator)
        noise = torch.randn(batch, modalities, size, size, generator=generator, dtype=dtype)
        strength = torch.linspace(1.0, 0.2, modalities, dtype=dtype).view(1, -1, 1, 1)
        result.append({"image": label * strength + noise, "label": label})
    return result


def trainer(network, parameters, data, method=None, *, handlers=(), lr=0.1, loss=cross_entropy, epochs=1, **kwargs):
    """A stock MONAI trainer with plain SGD."""
    methods = [] if method is None else [method]
    return SupervisedTrainer(
        device=torch.device("cpu"),
        max_epochs=epochs,
        train_data_loader=data,
        network=network,
        optimizer=torch.optim.SGD(parameters, lr=lr),
        loss_function=loss,
        train_handlers=[*methods, *handlers],
        decollate=False,
        **kwargs,
    )
