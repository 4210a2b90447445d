# SPDX-License-Identifier: Apache-2.0
"""UME, the simplest late fusion: each network learns for itself."""

from __future__ import annotations

from torch import Tensor

from monai_cggm.methods.late import LateFusionMethod, LateStep


class UME(LateFusionMethod):
    r"""Unimodal ensemble: every network learns from its own loss alone, and their probabilities are averaged.

    .. math:: L = \sum_i L(z_i, y), \qquad p = \frac1M \sum_i \mathrm{softmax}(z_i)

    Du et al., "On Uni-Modal Feature Learning in Supervised Multi-Modal Learning", ICML 2023, who released no code. No
    gradient goes from one network to another, so with an optimizer that treats each parameter for itself (SGD, Adam)
    the weights are those that the networks would have if each were trained alone on the same batches. Clip each network
    for itself: ``ClipGradients(network.networks.values(), ...)``.

    For segmentation the mean is taken voxel by voxel; for regression it is the mean of the predictions.

    Args:
        network: see :class:`LateFusionMethod`; ``combine`` must be ``"probabilities"``.
        metric: see there, as for ``loss_function``.

    Raises:
        ValueError: see there.

    Example:
        >>> from monai_cggm.metrics import RegionDice
        >>> from monai_cggm.networks import LateFusion, MultimodalSegmenter
        >>> one = {"num_classes": 2, "encoder": {"backbone": "resnet18", "width": 8}}
        >>> network = LateFusion.of_modalities(["flair", "t1ce"], MultimodalSegmenter, **one)
        >>> UME(network, RegionDice({"lesion": [1]}, num_classes=2))
        UME(modalities=['flair', 't1ce'])
    """

    combine = "probabilities"

    def loss(self, step: LateStep) -> Tensor:
        """Return the sum of the members' losses."""
        return step.losses.sum()
