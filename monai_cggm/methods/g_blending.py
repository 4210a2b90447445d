# SPDX-License-Identifier: Apache-2.0
"""Gradient blending (Wang, Tran and Feiszli, CVPR 2020), the offline version."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import ignite.distributed as idist
import torch
from monai.engines import SupervisedTrainer
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from monai_cggm.batches import PRESENT, Inputs, rows_of, samples_in
from monai_cggm.methods.base import Step, UnimodalObserver
from monai_cggm.methods.teachers import JOINT, Build, built, load_networks, run_folder
from monai_cggm.metrics.epsilon import Epsilon

logger = logging.getLogger(__name__)

#: what a network is given, what it is compared with, and which modalities each sample has
Batch = tuple[Inputs, Tensor, Tensor | None]
Loaders = Mapping[str, Iterable[Any]]

#: the name of the task's weight among the modalities'
FUSION = "fusion"


def blending_weights(
    train_before: Tensor,
    train_after: Tensor,
    validation_before: Tensor,
    validation_after: Tensor,
    floor: float = 0.05,
) -> Tensor:
    r"""Return how much each loss should count, from how networks generalised and overfitted when trained apart.

    .. math::
        G_k = L^{val}_k(0) - L^{val}_k(N), \qquad
        O_k = \big(L^{val}_k(N) - L^{train}_k(N)\big) - \big(L^{val}_k(0) - L^{train}_k(0)\big), \qquad
        w_k = \frac1Z \frac{G_k}{O_k^2}, \quad \sum_k w_k = 1

    What the paper leaves open: a network that has not got better (:math:`G_k \le 0`) gets 0. O may be close to 0 or
    below, where it has not overfitted at all, and the quotient would be without bound: it counts as at least ``floor``
    times the largest G. (A floor of its own G would give networks that do not overfit weights that *fall* with G.)

    Args:
        train_before: loss on training cases of each network before its training, ``(K,)``.
        train_after: the same after it.
        validation_before: loss on validation cases before it, measured alike.
        validation_after: the same after it.
        floor: smallest O, as a share of the largest G; above 0. 0.05 is ours.

    Returns:
        w, ``(K,)``, float64, not negative, sum 1; all equal, with a warning, where no network has got better.

    Raises:
        ValueError: for losses of different shapes or that are no numbers, or a floor that is not positive.

    Example:
        >>> before = torch.tensor([1.0, 1.0])
        >>> blending_weights(before, torch.tensor([0.2, 0.4]), before, torch.tensor([0.6, 0.6]))
        tensor([0.2000, 0.8000], dtype=torch.float64)
    """
    losses = [
        torch.as_tensor(v, dtype=torch.float64)
        for v in (train_before, train_after, validation_before, validation_after)
    ]
    if len({v.shape for v in losses}) > 1 or losses[0].ndim != 1 or not len(losses[0]):
        raise ValueError(f"the four losses must be (K,) alike, got shapes {[tuple(v.shape) for v in losses]}")
    if not all(bool(v.isfinite().all()) for v in losses):
        raise ValueError(f"the four losses must be numbers, got {[v.tolist() for v in losses]}")
    if not floor > 0:
        raise ValueError(f"floor must be positive, got {floor}")
    tb, ta, vb, va = losses
    gained = (vb - va).clamp(min=0.0)
    if not bool((gained > 0).any()):
        logger.warning("gradient blending: no network got better on validation cases; all losses count alike")
        return torch.full_like(gained, 1 / len(gained))
    overfitted = ((va - ta) - (vb - tb)).clamp(min=floor * gained.max())
    weights = gained / overfitted.square()
    return weights / weights.sum()


@torch.no_grad()
def measure_losses(network: nn.Module, batches: Iterable[Batch], loss: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
    """Return a network's mean loss over the samples of all batches, in evaluation mode.

    A batch counts as many times as it has samples: sums of batches' losses from loaders of different length could not
    be compared.

    Args:
        network: called with the inputs, and with ``present=mask`` where a batch has a mask.
        batches: inputs, target, and mask or None.
        loss: of a prediction and a target.

    Returns:
        A scalar, float64.

    Raises:
        ValueError: where there is no sample.

    Example:
        >>> batches = [(torch.zeros(3, 1), torch.zeros(3, 1), None), (torch.zeros(1, 1), torch.ones(1, 1), None)]
        >>> measure_losses(nn.Identity(), batches, nn.functional.mse_loss)
        tensor(0.2500, dtype=torch.float64)
    """
    was_training = network.training
    network.eval()
    total, samples = torch.zeros((), dtype=torch.float64), 0
    for inputs, target, present in batches:
        prediction = network(inputs) if present is None else network(inputs, present=present)
        total = total + loss(prediction, target).mean().double().cpu() * len(target)
        samples += len(target)
    network.train(was_training)
    if not samples:
        raise ValueError("there is no sample to measure a loss on")
    return total / samples


class GBlending(UnimodalObserver):
    r"""Weight the losses of the task and of each modality by how well such networks generalise when trained apart.

    Wang, Tran and Feiszli, *What Makes Training Multi-Modal Classification Networks Hard?*, CVPR 2020, offline version:
    one network a modality and one of all modalities are trained first. When the run starts, the losses of each before
    and after its training, on training and on validation cases, give :func:`blending_weights`, which hold throughout:

    .. math:: L = w_F L_{task} + \sum_i w_i L_i

    The unimodal classifiers are the modalities' heads: :math:`w_i` of a classifier's gradient goes on into its encoder.
    A classifier itself learns with weight 1, as it does when it is watched. The weights sum to 1 as in the paper, so
    the learning rate of the fusion is in effect :math:`w_F` times as large, and plain joint training (:math:`w_F = 1`)
    takes larger steps: compare it at its own best learning rate.

    "After" is the epoch whose weights a run kept, the best on validation. "Before" is a network of the same seed that
    has not been trained; its batch norm's running statistics are first taken from the training cases, because without
    them an untrained deep network's loss in evaluation mode is arbitrary. Training and validation cases go through the
    same transforms and the same mean (:func:`measure_losses`). The authors have released the weighted sum of losses
    with weights by hand, and no estimate; it says nothing about the task, so it serves any, and any number of
    modalities.

    Args:
        network: see :class:`UnimodalObserver`, as for the next two and ``parts``.
        classifiers: see there.
        metric: see there.
        runs: a path with ``{modality}`` in it: the run folders of the modalities, and of ``joint``.
        build: makes the network of some modalities; :func:`monai_cggm.methods.teachers.network_builder` in a bundle.
        loaders: ``train`` and ``validation`` → batches of the same kind of samples, as the trainer gets them; or what
            returns that, called when the run starts.
        seed: of the networks before training.
        floor: see :func:`blending_weights`.
        parts: the arguments of :class:`UnimodalObserver`.

    Attributes:
        weights: w of each modality and, last, of the task, ``(M + 1,)``; None until the run starts. A run that is
            resumed keeps those that it began with.

    Raises:
        ValueError: for fewer than two modalities, a path without ``{modality}``, a floor that is not positive; when the
            run starts, for loaders without these names. (:class:`AuxiliaryLosses`, which set the same weights, refuse
            this method.)
        DataError: when the run starts, for run folders that are missing or of other networks.

    Example:
        >>> from monai_cggm.metrics import RegionDice
        >>> from monai_cggm.networks import MultimodalSegmenter, UnimodalClassifiers
        >>> network = MultimodalSegmenter(["flair", "t1ce"], 2, encoder={"backbone": "resnet18", "width": 8})
        >>> classifiers = UnimodalClassifiers.for_network(network)
        >>> GBlending(
        ...     network, classifiers, RegionDice({"lesion": [1]}, num_classes=2), runs="runs/{modality}",
        ...     build=lambda modalities: MultimodalSegmenter(modalities, 2), loaders={"train": [], "validation": []},
        ... )
        GBlending(modalities=['flair', 't1ce'], runs='runs/{modality}', floor=0.05)
    """

    weighs_losses = True

    def __init__(
        self,
        network: nn.Module,
        classifiers: nn.Module,
        metric: Epsilon,
        *,
        runs: str,
        build: Build,
        loaders: Loaders | Callable[[], Loaders],
        seed: int = 0,
        floor: float = 0.05,
        **parts: Any,
    ) -> None:
        super().__init__(network, classifiers, metric, **parts)
        if len(self.modalities) < 2:
            raise ValueError(f"GBlending weighs two modalities or more, the network has {list(self.modalities)}")
        run_folder(runs, JOINT)  # refuses a path without a place for the modality now rather than when the run starts
        if not floor > 0:
            raise ValueError(f"floor must be positive, got {floor}")
        self.runs = runs
        self.build = build
        self.loaders = loaders
        self.seed = seed
        self.floor = floor
        self.weights: Tensor | None = None

    def __repr__(self) -> str:
        """Say what is attached and how, for the line that the log starts with."""
        return f"GBlending(modalities={list(self.modalities)}, runs={self.runs!r}, floor={self.floor})"

    # ------------------------------------------------------------------ the estimate

    def _start(self, engine: SupervisedTrainer) -> None:
        super()._start(engine)
        if self.weights is None:
            self.weights = self._estimate(engine)
        values = dict(zip((*self.modalities, FUSION), self.weights.tolist(), strict=True))
        engine.logger.info(f"gradient blending: {', '.join(f'{k} {v:.4f}' for k, v in values.items())}")
        self.unimodal_weights = self.weights[:-1].float()
        self.task_weight = values[FUSION]

    def _estimate(self, engine: SupervisedTrainer) -> Tensor:
        loaders = self.loaders() if callable(self.loaders) else self.loaders
        if not {"train", "validation"} <= set(loaders):
            raise ValueError(f"loaders must have 'train' and 'validation', got {sorted(loaders)}")
        parts = {m: [m] for m in self.modalities} | {JOINT: list(self.modalities)}
        trained = load_networks(self.runs, parts, self.build)
        rows = []
        device = torch.device(engine.state.device)
        # what a loader draws for its workers, and dropout where batch norm is settled, must not change the run
        with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
            for name, modalities in parts.items():
                rows.append(self._losses(engine, loaders, name, built(self.build, modalities, self.seed), fresh=True))
                rows[-1] += self._losses(engine, loaders, name, trained.pop(name))
                before, after = rows[-1][:2], rows[-1][2:]
                engine.logger.info(
                    f"gradient blending: {name}: loss on training cases {before[0]:.4f} -> {after[0]:.4f}, on "
                    f"validation cases {before[1]:.4f} -> {after[1]:.4f}"
                )
        train_before, validation_before, train_after, validation_after = torch.tensor(rows, dtype=torch.float64).T
        weights = blending_weights(train_before, train_after, validation_before, validation_after, self.floor)
        if idist.get_world_size() > 1:  # every rank has measured all cases; to the last digit they must agree
            weights = torch.as_tensor(idist.broadcast(weights.to(idist.device()), src=0)).cpu()
        return weights

    def _losses(
        self, engine: SupervisedTrainer, loaders: Loaders, name: str, network: nn.Module, *, fresh: bool = False
    ) -> list[float]:
        device = torch.device(engine.state.device)
        network = network.to(device)
        index = None if name == JOINT else self.modalities.index(name)
        if fresh:
            _settle_batch_norm(network, _batches(engine, loaders["train"], index))
        loss = self.loss_function or engine.loss_function
        return [
            float(measure_losses(network, _batches(engine, loaders[part], index), loss))
            for part in ("train", "validation")
        ]

    # ------------------------------------------------------------------ one step

    def extra_loss(self, step: Step) -> Tensor | None:
        """Report the weights."""
        assert self.weights is not None
        values = self.weights.to(step.losses.device)
        self._add_scalars("blending", values[:-1])
        self._scalars[f"blending/{FUSION}"] = values[-1]
        return None

    # ------------------------------------------------------------------ checkpoints

    def state_dict(self) -> dict[str, Any]:
        """Return the observer's state and the weights."""
        return super().state_dict() | ({} if self.weights is None else {"weights": self.weights})

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore :meth:`state_dict`."""
        super().load_state_dict(state)
        self.weights = state.get("weights")


def _batches(engine: SupervisedTrainer, loader: Iterable[Any], modality: int | None) -> Iterator[Batch]:
    """What the network of one modality, or of all (None), is given, the samples that lack it left out."""
    for batch in loader:
        inputs, target, *more = engine.prepare_batch(
            batch, engine.state.device, engine.non_blocking, **engine.to_kwargs
        )
        present = more[1].get(PRESENT) if len(more) == 2 else None
        if modality is None:
            yield inputs, target, present
            continue
        if present is not None:
            rows = present[:, modality].nonzero().squeeze(1).to(target.device)
            inputs, target = rows_of(inputs, rows), target[rows]
        if len(target):  # a dict names its modalities, of which a network takes its own
            yield inputs[:, modality : modality + 1] if isinstance(inputs, Tensor) else inputs, target, None


@torch.no_grad()
def _settle_batch_norm(network: nn.Module, batches: Iterable[Batch]) -> None:
    """Take the running statistics of batch norm from a pass over the batches."""
    norms = [module for module in network.modules() if isinstance(module, _BatchNorm) and module.track_running_stats]
    if not norms:
        return
    momenta = [norm.momentum for norm in norms]
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None  # the plain mean over the batches
    network.train()
    for inputs, _, present in batches:
        if samples_in(inputs) > 1:  # of a single vector there is no variance
            network(inputs) if present is None else network(inputs, present=present)
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.momentum = momentum
