# SPDX-License-Identifier: Apache-2.0
"""Uni-modal teachers (Du, Teng, Li, Liu, Yuan, Wang, Yuan and Zhao, ICML 2023)."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from monai.engines import SupervisedTrainer
from torch import Tensor, nn

from monai_cggm.methods.base import Step, UnimodalObserver
from monai_cggm.metrics.epsilon import Epsilon

Teachers = Mapping[str, nn.Module]


def feature_distance(student: Any, teacher: Any, rows: Tensor | None = None) -> Tensor:
    r"""Return the mean squared difference of what two encoders returned.

    .. math:: d = \frac1T \sum_{t=1}^{T} \frac1{n_t} \lVert h_t - h^{teacher}_t \rVert^2

    over the T floating-point tensors of an output, each of n_t numbers. Masks and counts in it are passed over.

    Args:
        student: a tensor, or a tuple, list or dict of them.
        teacher: the like; no gradient goes into it.
        rows: indices of the samples that count; None: all.

    Returns:
        A scalar, float32 or more; 0 where no sample counts.

    Raises:
        ValueError: for outputs that are not alike.

    Example:
        >>> feature_distance((torch.zeros(1, 2), torch.ones(1, 3)), (torch.zeros(1, 2), torch.zeros(1, 3)))
        tensor(0.5000)
    """
    ours, theirs = _float_tensors(student), _float_tensors(teacher)
    if not ours or [t.shape for t in ours] != [t.shape for t in theirs]:
        raise ValueError(
            f"the encoder's output has tensors of shape {[tuple(t.shape) for t in ours]}, the teacher's "
            f"{[tuple(t.shape) for t in theirs]}: they must be alike"
        )
    if rows is not None:
        ours, theirs = [t[rows] for t in ours], [t[rows] for t in theirs]
    if not len(ours[0]):
        return torch.stack([t.sum() for t in ours]).sum()  # the mean over no sample is not a number
    return torch.stack([F.mse_loss(_full(h), _full(t.detach())) for h, t in zip(ours, theirs, strict=True)]).mean()


class UMT(UnimodalObserver):
    r"""Keep each encoder's features close to those of a frozen encoder that was trained on its modality alone.

    Du, Teng, Li, Liu, Yuan, Wang, Yuan and Zhao, *On Uni-Modal Feature Learning in Supervised Multi-Modal Learning*,
    ICML 2023. With d of :func:`feature_distance`:

    .. math:: L = L_{task} + \lambda \sum_i d\big(\phi_i(x_i), \phi^{alone}_i(x_i)\big)

    The teachers run in evaluation mode on exactly what the encoders are given, once a step each; they are no part of
    the network and of no checkpoint. A sample that lacks a modality has no features of it to be compared. It says
    nothing about the task, so it serves any, and any number of modalities.

    The authors have released no code. The paper distils the features before the classifier of late fusion; here all
    tensors that an encoder returns are compared (low- and high-level features of a DeepLab encoder count alike), and
    the fusion may be of any kind.

    Args:
        network: see :class:`UnimodalObserver`, as for the next two and ``parts``.
        classifiers: see there; UMT does not use them, they are watched.
        metric: see there.
        teachers: modality → encoder; or what returns them, which is called when the run starts, so that a run can
            train them first (:func:`monai_cggm.methods.teachers.load_teachers` with its arguments bound).
        weight: λ, at least 0. 10 is the default of a public toolkit for balanced learning; the paper tunes it.
        parts: the arguments of :class:`UnimodalObserver`.

    Raises:
        ValueError: for a weight below 0, teachers that are not one a modality, and a teacher that is part of the
            network; for teachers that have to be loaded, when the run starts.

    Example:
        >>> import copy
        >>> from monai_cggm.metrics import RegionDice
        >>> from monai_cggm.networks import MultimodalSegmenter, UnimodalClassifiers
        >>> network = MultimodalSegmenter(["flair", "t1ce"], 2, encoder={"backbone": "resnet18", "width": 8})
        >>> classifiers = UnimodalClassifiers.for_network(network)
        >>> alone = {name: copy.deepcopy(encoder) for name, encoder in network.encoders.items()}
        >>> UMT(network, classifiers, RegionDice({"lesion": [1]}, num_classes=2), teachers=alone)
        UMT(modalities=['flair', 't1ce'], weight=10.0)
    """

    def __init__(
        self,
        network: nn.Module,
        classifiers: nn.Module,
        metric: Epsilon,
        *,
        teachers: Teachers | Callable[[], Teachers],
        weight: float = 10.0,
        **parts: Any,
    ) -> None:
        super().__init__(network, classifiers, metric, **parts)
        if not weight >= 0:
            raise ValueError(f"weight must be at least 0, got {weight}")
        if not isinstance(teachers, (Mapping, nn.ModuleDict)) and not callable(teachers):
            raise ValueError(f"teachers must be one encoder a modality, or what returns them, got {teachers!r}")
        self.weight = weight
        self._load = teachers if not isinstance(teachers, (Mapping, nn.ModuleDict)) else None
        self.teachers: dict[str, nn.Module] = {}
        if isinstance(teachers, (Mapping, nn.ModuleDict)):
            self._take(dict(teachers.items()))

    def __repr__(self) -> str:
        """Say what is attached and how, for the line that the log starts with."""
        return f"UMT(modalities={list(self.modalities)}, weight={self.weight})"

    def _take(self, teachers: dict[str, nn.Module]) -> None:
        if set(teachers) != set(self.modalities):
            raise ValueError(f"teachers are of {sorted(teachers)}, the network has {list(self.modalities)}")
        own = {id(p) for p in self.network.parameters()}
        for modality, teacher in teachers.items():
            if any(id(p) in own for p in teacher.parameters()):
                raise ValueError(f"the teacher of {modality!r} shares a parameter with the network: freeze a copy")
            teacher.requires_grad_(False).eval()
        self.teachers = teachers

    def _start(self, engine: SupervisedTrainer) -> None:
        super()._start(engine)
        if self._load is not None and not self.teachers:
            self._take(dict(self._load().items()))
        device = next(self.network.parameters()).device
        for teacher in self.teachers.values():
            teacher.to(device)

    def extra_loss(self, step: Step) -> Tensor | None:
        """Return λ times the sum of the distances to the teachers."""
        distances = torch.stack([self._distance(step, i, m) for i, m in enumerate(self.modalities)])
        loss = self.weight * distances.sum()
        self._scalars["loss/teachers"] = loss.detach()
        self._add_scalars("teacher_distance", distances.detach())
        return loss

    def _distance(self, step: Step, index: int, modality: str) -> Tensor:
        with torch.no_grad():
            taught = self.teachers[modality](step.inputs[modality])
        features = step.features[modality]
        rows = None if step.present is None else step.present[:, index].nonzero().squeeze(1).to(step.target.device)
        try:
            return feature_distance(features, taught, rows)
        except ValueError as error:
            raise ValueError(f"the teacher of {modality!r} is another network than the encoder: {error}") from None


def _float_tensors(features: Any) -> list[Tensor]:
    if isinstance(features, Tensor):
        return [features] if features.is_floating_point() else []
    values = features.values() if isinstance(features, Mapping) else features
    return [tensor for value in values for tensor in _float_tensors(value)]


def _full(tensor: Tensor) -> Tensor:
    return tensor.float() if tensor.dtype in (torch.float16, torch.bfloat16) else tensor
