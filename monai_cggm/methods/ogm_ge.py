# SPDX-License-Identifier: Apache-2.0
"""On-the-fly gradient modulation with generalisation enhancement (Peng, Wei, Deng, Wang and Hu, CVPR 2022)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import ignite.distributed as idist
import numpy as np
import torch
from monai.engines import SupervisedTrainer
from torch import Tensor, nn

from monai_cggm.methods.base import Step
from monai_cggm.methods.likelihood import ProbabilityOfTruth
from monai_cggm.methods.samples import rows_with
from monai_cggm.methods.steering import Steering
from monai_cggm.metrics.epsilon import Epsilon


def discrepancy_ratios(scores: Tensor) -> Tensor:
    r"""Return how far each modality is ahead of the others.

    .. math:: \rho_i = \frac{s_i}{\frac{1}{M-1} \sum_{k \ne i} s_k}

    For two modalities this is the paper's ratio of one to the other. For more the paper has none.

    Args:
        scores: s, none negative, ``(M,)``; NaN for a modality of which nothing is known.

    Returns:
        ρ, ``(M,)``. A modality without a score counts for no other one, and its own ratio is 1; so is that of the only
        one that has a score.

    Example:
        >>> discrepancy_ratios(torch.tensor([0.8, 0.4]))
        tensor([2.0000, 0.5000])
        >>> discrepancy_ratios(torch.tensor([0.6, 0.2, 0.4]))
        tensor([2.0000, 0.4000, 1.0000])
    """
    known = ~scores.isnan()
    others = known & ~torch.eye(len(scores), dtype=torch.bool, device=scores.device)
    ratios = scores / (others.to(scores) @ scores.nan_to_num() / others.sum(dim=1))
    return torch.where(ratios.isnan(), torch.ones_like(ratios), ratios)


def ogm_coefficients(ratios: Tensor, alpha: float) -> Tensor:
    r"""Return the factor of each encoder's gradient.

    .. math:: k_i = \begin{cases} 1 - \tanh(\alpha \rho_i) & \rho_i > 1 \\ 1 & \text{otherwise} \end{cases}

    It jumps at ρ = 1, from 1 to 1 − tanh α, as it does in the paper.

    Args:
        ratios: ρ, ``(M,)``.
        alpha: α, above 0.

    Returns:
        k, ``(M,)``, between 0 and 1.

    Example:
        >>> ogm_coefficients(torch.tensor([2.0, 0.5]), alpha=0.5)
        tensor([0.2384, 1.0000])
    """
    return torch.where(ratios > 1, 1 - torch.tanh(alpha * ratios), torch.ones_like(ratios))


class OGMGE(Steering):
    r"""Slow down the encoders whose modality is ahead, and shake all of them with noise of their gradients' size.

    With :math:`s_i` the mean probability that classifier i gives to the truth in this batch
    (:class:`~monai_cggm.methods.likelihood.ProbabilityOfTruth`, counted over all ranks), ρ its ratio to the mean of the
    others (:func:`discrepancy_ratios`) and k the factor that follows (:func:`ogm_coefficients`):

    .. math:: g_i \leftarrow k_i\, g_i + h_i, \qquad h_i \sim \mathcal N(0, \sigma^2(g_i))

    σ is the standard deviation over the elements of one parameter's gradient, before k. It is "OGE" in the tables of
    the CGGM paper, from "Balanced Multimodal Learning via On-the-fly Gradient Modulation" (CVPR 2022).

    Adapted: any number of modalities; segmentation and regression (see the measure); s comes from the unimodal
    classifiers, where the authors split a last layer that adds or concatenates features, which a decoder has not.

    Unlike the released code, every parameter of an encoder is scaled and every one with two dimensions or more gets
    noise: a filter there, "four dimensions", leaves out each linear layer and each 3-D convolution. One-dimensional
    parameters get none, here as there: a norm's scale or a bias moves a whole channel at every position, so noise of
    the same relative size would do far more than in a kernel, of which each output adds up many elements.
    A step costs no further pass: softmax of the classifiers' logits, and as many random numbers as the encoders have
    weights.

    Under Adam a constant factor on a gradient cancels; the noise does not.

    Args:
        network: see :class:`UnimodalObserver`, as for the next two and ``parts``.
        classifiers: see there.
        metric: see there; it is reported, and steers nothing here.
        alpha: α; 0.1 as in the authors' README (0.8 in their script for CREMA-D).
        noise: generalisation enhancement. Controls change k only.
        seed: of the noise, which depends on it, on the modality and on the number of the step alone, and is the same on
            every rank (of devices of one kind: GPUs of different models draw different numbers).
        until_epoch: last epoch of both; None: they never end. The authors modulate for 50 epochs of about 100.
        parts: ``control`` and ``magnitude`` of :class:`Steering`, and the arguments of :class:`UnimodalObserver`.
            Without ``magnitude`` there is no noise either.

    Raises:
        ValueError: for fewer than two modalities, or numbers out of their range.

    Example:
        >>> from monai_cggm.metrics import RegionDice
        >>> from monai_cggm.networks import MultimodalSegmenter, UnimodalClassifiers
        >>> network = MultimodalSegmenter(["flair", "t1ce"], 2, encoder={"backbone": "resnet18", "width": 8})
        >>> classifiers = UnimodalClassifiers.for_network(network)
        >>> method = OGMGE(network, classifiers, RegionDice({"lesion": [1]}, num_classes=2), alpha=0.1)
        >>> # method.attach(trainer)
    """

    def __init__(
        self,
        network: nn.Module,
        classifiers: nn.Module,
        metric: Epsilon,
        *,
        alpha: float = 0.1,
        noise: bool = True,
        seed: int = 0,
        until_epoch: int | None = None,
        **parts: Any,
    ) -> None:
        super().__init__(network, classifiers, metric, **parts)
        if not alpha > 0:
            raise ValueError(f"alpha must be positive, got {alpha}")
        if seed < 0:
            raise ValueError(f"seed must not be negative, got {seed}")
        if until_epoch is not None and until_epoch < 0:
            raise ValueError(f"until_epoch must be at least 0 or None, got {until_epoch}")
        self.alpha = alpha
        self.noise = noise
        self.seed = seed
        self.until_epoch = until_epoch
        self._probability = ProbabilityOfTruth()
        self._epoch = 0
        self._steps = 0

    def __repr__(self) -> str:
        """Say what is attached and how, for the line that the log starts with."""
        return (
            f"OGMGE(modalities={list(self.modalities)}, alpha={self.alpha}, noise={self.noise}, seed={self.seed}, "
            f"until_epoch={self.until_epoch}, control={self.control!r}, magnitude={self.magnitude})"
        )

    def _listen(self, engine: SupervisedTrainer) -> None:
        super()._listen(engine)
        self._epoch = engine.state.epoch

    @property
    def _over(self) -> bool:
        return self.until_epoch is not None and self._epoch > self.until_epoch

    def terms(self, step: Step) -> Tensor:
        """Return k of this batch; ones after the last epoch of modulation."""
        ratios = discrepancy_ratios(self._scores(step))
        self._add_scalars("discrepancy", ratios)
        return torch.ones_like(ratios) if self._over else ogm_coefficients(ratios, self.alpha)

    def _scores(self, step: Step) -> Tensor:
        seen = [rows_with(p, step.target, step.present, i) for i, p in enumerate(step.predictions)]
        sums = torch.cat([self._probability.sums([p], t) for p, t in seen])
        if idist.get_world_size() > 1:
            sums = torch.as_tensor(idist.all_reduce(sums))
        return self._probability.value(sums)

    def modulate(self, step: Step) -> None:
        """Multiply encoder i's gradients by k_i, then add noise of the size that they had before."""
        noisy = self.noise and self.magnitude and not self._over
        kernels = [self._kernel_gradients(m) if noisy else [] for m in self.modalities]
        deviations = [[g.std(correction=0) for g in gradients] for gradients in kernels]
        super().modulate(step)
        for modality, gradients in enumerate(kernels):
            self._add_noise(modality, gradients, deviations[modality])
        if noisy:
            self._add_scalars("modulated_norm", self._encoder_gradient_norms())
        self._steps += 1

    def _kernel_gradients(self, modality: str) -> list[Tensor]:
        return [p.grad for p in self._encoder_parameters[modality] if p.grad is not None and p.dim() > 1]

    def _add_noise(self, modality: int, gradients: list[Tensor], deviations: list[Tensor]) -> None:
        if not gradients:
            return
        # on the gradients' device: drawing for a ResNet a modality on a CPU would take longer than the step
        generator = torch.Generator(device=gradients[0].device)
        state = np.random.SeedSequence((self.seed, self._steps, modality)).generate_state(1, np.uint64)
        generator.manual_seed(int(state[0] >> np.uint64(1)))
        for gradient, deviation in zip(gradients, deviations, strict=True):
            noise = torch.randn(gradient.shape, generator=generator, dtype=gradient.dtype, device=gradient.device)
            gradient.add_(noise * deviation)

    def state_dict(self) -> dict[str, Any]:
        """Return the observer's state and the count of steps, which the noise depends on."""
        return super().state_dict() | {"steps": self._steps}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore :meth:`state_dict`."""
        super().load_state_dict(state)
        self._steps = int(state["steps"])
