# SPDX-License-Identifier: Apache-2.0
"""Auxiliary losses: the unimodal classifiers' losses let into the encoders."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from ignite.engine import Events
from monai.engines import SupervisedTrainer

from monai_cggm.methods.base import UnimodalObserver, needs_observer
from monai_cggm.methods.steering import Steering


class AuxiliaryLosses:
    r"""Let each encoder learn from its own classifier's loss too.

    .. math:: \nabla_{\theta^{\phi_i}} \leftarrow \nabla_{\theta^{\phi_i}} L + w_i \nabla_{\theta^{\phi_i}} L_i

    The classifiers themselves learn as they do without it. With equal weights this is the multi-loss training of RFNet
    (ICCV 2021, weight 1) and most networks for missing sequences, and the ``uniform`` control of every balancing
    method. In a warm-up only these losses act (RFNet: 7 % of the epochs): the task's loss counts 0.

    Args:
        observer: the method, or the plain observer, that runs the classifiers. Attach this after it.
        weight: w, one number or one a modality.
        follow_balance: multiply the weights by the method's balance terms of the step before, at least 0: a balance
            of losses in place of one of gradients.
        warmup_epochs: how many epochs the task's loss waits.

    Raises:
        ValueError: without an observer, for one that weighs the losses itself (G-Blending), for weights that are
            negative or do not name the modalities, a negative warm-up, or ``follow_balance`` on an observer without
            balance terms.

    Example:
        >>> from monai_cggm.metrics import RegionDice
        >>> from monai_cggm.networks import MultimodalSegmenter, UnimodalClassifiers
        >>> network = MultimodalSegmenter(["flair", "t1ce"], 2, encoder={"backbone": "resnet18", "width": 8})
        >>> classifiers = UnimodalClassifiers.for_network(network)
        >>> observer = UnimodalObserver(network, classifiers, RegionDice({"lesion": [1]}, num_classes=2))
        >>> AuxiliaryLosses(observer, {"flair": 1.0, "t1ce": 0.5}).weights
        tensor([1.0000, 0.5000])
    """

    def __init__(
        self,
        observer: UnimodalObserver,
        weight: float | Mapping[str, float] = 1.0,
        *,
        follow_balance: bool = False,
        warmup_epochs: int = 0,
    ) -> None:
        needs_observer(observer, self)
        if observer.weighs_losses:
            raise ValueError(
                f"{type(observer).__name__} and AuxiliaryLosses both set how much the classifiers' losses count: "
                "choose one"
            )
        modalities = observer.modalities
        weights = dict(weight) if isinstance(weight, Mapping) else dict.fromkeys(modalities, float(weight))
        if set(weights) != set(modalities) or min(weights.values()) < 0:
            raise ValueError(
                f"weight must be a number of at least 0, or one for each of {list(modalities)}, got {weight}"
            )
        if warmup_epochs < 0:
            raise ValueError(f"warmup_epochs must be at least 0, got {warmup_epochs}")
        if follow_balance and not isinstance(observer, Steering):
            raise ValueError(f"{type(observer).__name__} has no balance terms that the weights could follow")
        self.observer = observer
        self.weights = torch.tensor([weights[m] for m in modalities])
        self.follow_balance = follow_balance
        self.warmup_epochs = warmup_epochs

    def __repr__(self) -> str:
        """Say what is attached and how."""
        follows = ", times B" if self.follow_balance else ""
        return f"AuxiliaryLosses(weights={self.weights.tolist()}{follows}, warmup_epochs={self.warmup_epochs})"

    def attach(self, engine: SupervisedTrainer) -> None:
        """Attach to a trainer, after the observer."""
        engine.add_event_handler(Events.ITERATION_STARTED, self)

    def __call__(self, engine: SupervisedTrainer) -> None:
        """Set what counts in this iteration."""
        balance = self.observer.balance if self.follow_balance else None
        if balance is None:
            self.observer.unimodal_weights = self.weights
        else:  # the paper's rule can be negative, and an encoder would climb its classifier's loss
            self.observer.unimodal_weights = self.weights * balance.to(self.weights).clamp(min=0.0)
        self.observer.task_weight = 0.0 if engine.state.epoch <= self.warmup_epochs else 1.0
