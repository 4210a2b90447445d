# SPDX-License-Identifier: Apache-2.0
"""Distillation: what the fused network has learnt, handed to the unimodal classifiers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
import torch.nn.functional as F
from ignite.engine import Events
from monai.engines import SupervisedTrainer
from torch import Tensor

from monai_cggm.methods.base import Step, UnimodalObserver, needs_observer

Teacher = Literal["fusion", "classifiers"]


def distillation_loss(student: Tensor, teacher: Tensor, temperature: float = 4.0) -> Tensor:
    r"""Return :math:`T^2\,\mathrm{KL}\big(\sigma(z_t/T)\,\|\,\sigma(z_s/T)\big)`, the mean over samples and positions.

    The factor T² keeps the gradient's size independent of T (Hinton, Vinyals and Dean, 2015). Nothing flows into the
    teacher.

    Args:
        student: logits ``(B, K, *S)``.
        teacher: logits of the same shape.
        temperature: T; 4 in PASSION (ECCV 2024).

    Returns:
        A scalar; 0 for an empty batch.

    Example:
        >>> logits = torch.tensor([[2.0, 0.0]])
        >>> distillation_loss(logits, logits).item(), distillation_loss(-logits, logits, 1.0).item() > 0
        (0.0, True)
    """
    soft_student = F.log_softmax(student / temperature, dim=1)
    soft_teacher = F.log_softmax(teacher.detach() / temperature, dim=1)
    divergence = F.kl_div(soft_student, soft_teacher, reduction="sum", log_target=True)
    positions = max(student.numel() // student.shape[1], 1)
    return temperature**2 * divergence / positions


class Distillation:
    """Add the classifiers' divergence from the fused prediction to the loss, the sum over modalities.

    It teaches the encoders too where :class:`AuxiliaryLosses` lets the classifiers' gradients into them, and otherwise
    the classifiers alone. A sample that lacks a modality, or whose fusion did not see it under
    :class:`ModalityDropout`, teaches nothing to that modality's classifier.

    Args:
        observer: the method, or the plain observer, that runs the classifiers. Attach this after it.
        weight: factor of the sum; 0.5 in PASSION.
        temperature: see :func:`distillation_loss`.
        teacher: ``"fusion"``: the network's prediction. ``"classifiers"``: the mean of the classifiers' logits, the
            control: the same loss without what only the fusion knows.

    Raises:
        ValueError: without an observer, for a weight below 0, a temperature that is not positive, or another teacher.

    Example:
        >>> from monai_cggm.metrics import RegionDice
        >>> from monai_cggm.networks import MultimodalSegmenter, UnimodalClassifiers
        >>> network = MultimodalSegmenter(["flair", "t1ce"], 2, encoder={"backbone": "resnet18", "width": 8})
        >>> classifiers = UnimodalClassifiers.for_network(network)
        >>> observer = UnimodalObserver(network, classifiers, RegionDice({"lesion": [1]}, num_classes=2))
        >>> Distillation(observer)
        Distillation(weight=0.5, temperature=4.0, teacher='fusion')
    """

    def __init__(
        self,
        observer: UnimodalObserver,
        weight: float = 0.5,
        *,
        temperature: float = 4.0,
        teacher: Teacher = "fusion",
    ) -> None:
        needs_observer(observer, self)
        if not weight >= 0 or not temperature > 0:
            raise ValueError(
                f"weight must be at least 0 and temperature positive, got weight={weight}, temperature={temperature}"
            )
        if teacher not in ("fusion", "classifiers"):
            raise ValueError(f"teacher must be 'fusion' or 'classifiers', got {teacher!r}")
        self.observer = observer
        self.weight = weight
        self.temperature = temperature
        self.teacher: Teacher = teacher

    def __repr__(self) -> str:
        """Say what is attached and how."""
        return f"Distillation(weight={self.weight}, temperature={self.temperature}, teacher={self.teacher!r})"

    def attach(self, engine: SupervisedTrainer) -> None:
        """Attach to a trainer, after the observer."""
        engine.add_event_handler(Events.STARTED, self._start)

    def _start(self, engine: SupervisedTrainer) -> None:
        if self.observer.head.weight.shape[0] < 2:
            raise ValueError("distillation compares class probabilities, and the network's head has one output")
        self.observer.loss_terms["distillation"] = self.loss

    def loss(self, step: Step) -> Tensor:
        """Return the term of one step, a scalar."""
        if self.teacher == "fusion":
            # under modality dropout a fusion that did not see a modality has nothing to teach its classifier
            teacher, taught = step.logits, step.fused
        else:
            teacher, taught = _mean_prediction(step.predictions, step.present), step.present
        losses = [
            distillation_loss(_rows(p, taught, i), _rows(teacher, taught, i), self.temperature)
            for i, p in enumerate(step.predictions)
        ]
        return self.weight * _total(losses)


def _mean_prediction(predictions: Sequence[Tensor], present: Tensor | None) -> Tensor:
    """The mean over the modalities that each sample has."""
    stacked = torch.stack(list(predictions))
    if present is None:
        return stacked.mean(dim=0)
    there = present.T.to(stacked).reshape(len(stacked), -1, *[1] * (stacked.dim() - 2))
    return (stacked * there).sum(dim=0) / there.sum(dim=0)


def _rows(values: Tensor, present: Tensor | None, modality: int) -> Tensor:
    return values if present is None else values[present[:, modality].nonzero().squeeze(1).to(values.device)]


def _total(losses: Sequence[Tensor]) -> Tensor:
    return torch.stack(list(losses)).sum()
