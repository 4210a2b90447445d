# SPDX-License-Identifier: Apache-2.0
"""A small network with per-modality encoders, as a user might bring one, and a trainer for it."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from ignite.engine import Events
from monai.engines import SupervisedTrainer
from monai.engines.utils import IterationEvents
from torch import Tensor, nn

from monai_cggm.metrics import RegionDice

MODALITIES = ("flair", "t1ce", "t1", "t2")
REGIONS = {"WT": [1, 2, 3], "TC": [1, 3], "ET": [3]}


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


class MaskedNetwork(ToyNetwork):
    """The like, told which modalities are there: the features of the others are zero."""

    def forward(self, x: Tensor, present: Tensor | None = None) -> Tensor:
        return self.fuse(
            {m: e(x[:, i : i + 1]) for i, (m, e) in enumerate(self.encoders.items())}, x.shape[2:], present
        )

    def fuse(self, outputs: dict[str, Tensor], size: Sequence[int], present: Tensor | None = None) -> Tensor:
        features = torch.stack([outputs[m] for m in self.encoders], dim=1)
        if present is not None:
            features = features.repeat(len(present) // len(features), 1, 1, 1, 1)
            features = features.masked_fill(~present[:, :, None, None, None], 0.0)
        return self.head(self.trunk(features.flatten(1, 2)))


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


def trainer(
    network, parameters, data, method=None, *, handlers=(), lr=0.1, loss=cross_entropy, epochs=1, device="cpu", **kwargs
):
    """A stock MONAI trainer with plain SGD."""
    methods = [] if method is None else [method]
    return SupervisedTrainer(
        device=torch.device(device),
        max_epochs=epochs,
        train_data_loader=data,
        network=network,
        optimizer=torch.optim.SGD(parameters, lr=lr),
        loss_function=loss,
        train_handlers=[*methods, *handlers],
        decollate=False,
        **kwargs,
    )


class ScaleOnCpu:
    """Mixed precision's loss scale without its arithmetic: powers of two change no digit."""

    def attach(self, engine):
        engine.add_event_handler(Events.STARTED, self)

    def __call__(self, engine):
        engine.scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)


def parts(modalities=MODALITIES, *, dtype=torch.float32, dropout=0.0, seed=0, network=ToyNetwork):
    """A network and its classifiers, the same for the same seed."""
    torch.manual_seed(seed)
    made = network(modalities).to(dtype)
    return made, ToyClassifiers(modalities, dropout=dropout).to(dtype)


def metric():
    return RegionDice(REGIONS, 4)


def everything(*modules):
    return [p for m in modules for p in m.parameters()]


def numpy_dice(prediction: Tensor, label: Tensor) -> float:
    """Mean Dice over the regions that the truth has, voxels pooled over the batch."""
    classes, truth = prediction.argmax(1).numpy(), label[:, 0].numpy()
    scores = []
    for region in REGIONS.values():
        p, t = np.isin(classes, region), np.isin(truth, region)
        if t.any():
            scores.append(2 * (p & t).sum() / (p.sum() + t.sum()))
    return float(np.mean(scores))


def features_of(network: nn.Module, image: Tensor) -> dict[str, Tensor]:
    return {m: encoder(image[:, i : i + 1]) for i, (m, encoder) in enumerate(network.encoders.items())}


def gradients_of_one_step(network, classifiers, data, method, *, handlers=(), **kwargs):
    """Run a stock trainer that moves no weight, and return what its optimizer saw in the last iteration."""
    engine = trainer(network, everything(network, classifiers), data, method, handlers=handlers, lr=0.0, **kwargs)
    seen = {}

    @engine.on(IterationEvents.MODEL_COMPLETED)
    def keep(engine):
        seen.update({n: p.grad.clone() for n, p in network.named_parameters()})
        seen.update({f"classifiers.{n}": p.grad.clone() for n, p in classifiers.named_parameters()})
        seen["scalars"] = engine.state.scalars
        seen["loss"] = engine.state.output["loss"].item()

    engine.run()
    return seen


def rows_of(method, network, classifiers, data, **kwargs):
    """Train; what was logged in every step."""
    engine = trainer(network, everything(network, classifiers), data, method, **kwargs)
    rows = []
    engine.add_event_handler(Events.ITERATION_COMPLETED, lambda e: rows.append(e.state.scalars))
    engine.run()
    return rows


def assert_resumes(made, data, stop, tmp_path):
    """Train in one go, and with a break after `stop` steps into fresh objects: weights and rows are equal.

    `made(seed)` gives a network, its classifiers and a method.
    """
    whole, first, second = made(0), made(0), made(9)
    expected = rows_of(whole[2], *whole[:2], data)
    before = rows_of(first[2], *first[:2], data[:stop])
    torch.save([part.state_dict() for part in first], tmp_path / "state.pt")
    for part, state in zip(second, torch.load(tmp_path / "state.pt", weights_only=True), strict=True):
        part.load_state_dict(state)
    after = rows_of(second[2], *second[:2], data[stop:])
    assert before + after == expected
    for name, weight in whole[0].state_dict().items():
        assert torch.equal(second[0].state_dict()[name], weight), name
