# SPDX-License-Identifier: Apache-2.0
"""Late fusion: one complete network a modality, whose predictions are combined."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn

from monai_cggm.batches import Inputs, samples_in

Combination = Literal["probabilities", "sum", "energy"]
COMBINATIONS: tuple[Combination, ...] = ("probabilities", "sum", "energy")


def energy_weight(logits: Tensor, temperature: float = 10.0) -> Tensor:
    r"""Return QMF's weight of a prediction, its energy over ten.

    .. math:: w = \frac1{10} \log \sum_k e^{z_k}

    A network that is sure of a class has a large logit there and so a large weight. The weight may be negative, and
    those of several members do not add up to 1 (Zhang et al., "Provable Dynamic Fusion for Low-Quality Multimodal
    Data", ICML 2023; the ten is the authors' code's).

    Args:
        logits: z, ``(B, K, *S)``.
        temperature: what the energy is divided by.

    Returns:
        w, ``(B, 1, *S)``: one number a sample, or one a voxel.

    Example:
        >>> energy_weight(torch.tensor([[0.0, 0.0], [0.0, 20.0]]))
        tensor([[0.0693],
                [2.0000]])
    """
    return logits.logsumexp(dim=1, keepdim=True) / temperature


class LateFusion(nn.Module):
    r"""Networks of one modality each, and a fixed rule that combines their predictions.

    It uses every modality and no interaction of any two. With :math:`z_i` the logits of member i:

    * ``probabilities``: :math:`\log \frac1M \sum_i \mathrm{softmax}(z_i)`, the mean probability (UME); for networks of
      one output, that is regression, the mean of the predictions.
    * ``sum``: :math:`\sum_i z_i` (ReconBoost).
    * ``energy``: :math:`\sum_i w_i z_i` with :func:`energy_weight`, for each voxel by itself in segmentation (QMF).

    A modality that a sample lacks does not count: it is left out of the mean or of the sum.

    The input is an image whose channels are the modalities, or a dictionary with a tensor for each; member i is given
    its own channel ``(B, 1, *S)``, or a dictionary of ``<modality>`` and ``<modality>_padding``. ``torch.jit.script``
    takes the first kind.

    Args:
        networks: modality → a network of that modality alone, in channel order.
        combine: see above.

    Attributes:
        networks: ``nn.ModuleDict``, as given.
        modalities: their names, a tuple.
        combine: as given.

    Raises:
        ValueError: for no network, another ``combine``, or ``energy`` with networks of one output.

    Example:
        >>> from monai_cggm.networks import MultimodalSegmenter
        >>> one = {"num_classes": 2, "encoder": {"backbone": "resnet18", "width": 8}}
        >>> network = LateFusion.of_modalities(["flair", "t2"], MultimodalSegmenter, **one).eval()
        >>> network(torch.zeros(1, 2, 32, 32)).exp().sum(dim=1).allclose(torch.ones(1, 32, 32))
        True
    """

    #: TorchScript would compile properties, and knows no dictionary of modules
    __jit_unused_properties__ = ("encoders", "num_outputs")

    def __init__(self, networks: Mapping[str, nn.Module], combine: Combination = "probabilities") -> None:
        super().__init__()
        if not networks:
            raise ValueError("networks must hold at least one network, got none")
        if combine not in COMBINATIONS:
            raise ValueError(f"combine must be one of {', '.join(COMBINATIONS)}, got {combine!r}")
        self.modalities = tuple(networks)
        self.networks = nn.ModuleDict(networks)
        self.combine: str = combine
        if combine == "energy" and self.num_outputs == 1:
            raise ValueError("combine='energy' weighs class logits, and these networks have one output (regression)")

    @classmethod
    def of_modalities(
        cls,
        modalities: Sequence[str],
        network: Callable[..., nn.Module],
        combine: Combination = "probabilities",
        **kwargs: Any,
    ) -> LateFusion:
        """Build one network a modality, all with the same keyword arguments.

        Args:
            modalities: names of the modalities, in channel order.
            network: a class, or another callable, that is called as ``network([modality], **kwargs)``.
            combine: see the class.
            kwargs: further arguments of ``network``.
        """
        return cls({modality: network([modality], **kwargs) for modality in modalities}, combine)

    @property
    def encoders(self) -> dict[str, nn.Module]:
        """The encoder of each modality's network, of those that name it among their ``encoders``."""
        named = {modality: getattr(network, "encoders", {}) for modality, network in self.networks.items()}
        return {modality: encoders[modality] for modality, encoders in named.items() if modality in encoders}

    @property
    def num_outputs(self) -> int | None:
        """How many outputs the networks' heads have, 1 for regression; None where the first one names no ``head``."""
        weight = getattr(getattr(next(iter(self.networks.values())), "head", None), "weight", None)
        return None if weight is None else len(weight)

    def forward(self, x: Tensor, present: Tensor | None = None) -> Tensor:
        """Combine the predictions of the modalities that are present.

        Args:
            x: ``(B, M, *S)``, or a dictionary of tensors by modality.
            present: boolean ``(B, M)``, at least one in each row; None: all are present. With ``(R * B, M)`` the
                networks run once and are combined R times: row ``r * B + b`` is sample b's. What stands in an absent
                modality does not reach the prediction.

        Returns:
            Logits ``(B, K, *S)``, or ``(R * B, K, *S)``; for ``probabilities`` logarithms of the mean probabilities.
        """
        if present is not None and not torch.jit.is_scripting():  # type: ignore[attr-defined]
            x = _finite_where_absent(x, present, self.modalities)
        return self._combined(self.encode(x), present)

    def members(self, x: Inputs) -> dict[str, Tensor]:
        """Return modality → its network's logits, ``(B, K, *S)``."""
        return dict(zip(self.modalities, self._logits(cast(Tensor, x)), strict=True))

    def encode(self, x: Tensor) -> Tensor:
        """Run the networks, and return what each one contributes, ``(M, B, K, *S)``: see :meth:`terms`."""
        return self.terms(self._logits(x))

    def decode(self, features: Tensor, size: Sequence[int], present: Tensor | None = None) -> Tensor:
        """Combine what :meth:`encode` returned; it has the image's ``size`` already. ``present`` as in the class."""
        return self._combined(features, present)

    def terms(self, logits: list[Tensor]) -> Tensor:
        """Return what each network contributes to the combination, ``(M, B, K, *S)``, from their logits."""
        each: list[Tensor] = []
        for z in logits:
            if z.dtype == torch.float16 or z.dtype == torch.bfloat16:
                z = z.float()
            if self.combine == "energy":
                z = energy_weight(z) * z
            elif self.combine == "probabilities" and z.shape[1] > 1:
                z = z.log_softmax(dim=1)
            each.append(z)
        return torch.stack(each)

    def _logits(self, x: Tensor) -> list[Tensor]:
        logits: list[Tensor] = []
        for index, network in enumerate(self.networks.values()):
            logits.append(network(self._input_of(x, index)))
        return logits

    def _input_of(self, x: Tensor, index: int) -> Tensor:
        if torch.jit.is_scripting():  # type: ignore[attr-defined]
            return x[:, index : index + 1]
        else:  # not compiled
            return _of_modality(x, self.modalities[index], index)

    def _combined(self, terms: Tensor, present: Tensor | None) -> Tensor:
        if present is None:
            present = torch.ones(terms.shape[1], terms.shape[0], dtype=torch.bool)
        if present.shape[0] != terms.shape[1]:
            terms = terms.repeat([1, present.shape[0] // terms.shape[1]] + [1] * (terms.dim() - 2))
        there = present.to(terms.device).t().reshape([terms.shape[0], -1] + [1] * (terms.dim() - 2))
        # filled, not multiplied: an absent channel may hold anything, and NaN × 0 is NaN
        if self.combine != "probabilities":
            return terms.masked_fill(there.logical_not(), 0.0).sum(dim=0)
        number = there.sum(dim=0).to(terms.dtype)
        if terms.shape[2] == 1:
            return terms.masked_fill(there.logical_not(), 0.0).sum(dim=0) / number
        return terms.masked_fill(there.logical_not(), float("-inf")).logsumexp(dim=0) - number.log()


@torch.jit.unused
def _finite_where_absent(x: Any, present: Tensor, modalities: Sequence[str]) -> Any:
    """Without NaN and infinity in what is absent: the prediction leaves it out, but its gradient would be NaN."""
    absent = present.view(-1, samples_in(x), len(modalities)).any(dim=0).logical_not()
    if not bool(absent.any()):
        return x
    if isinstance(x, Tensor):
        return _without_infinities(x, absent.to(x.device).view(*absent.shape, *[1] * (x.dim() - 2)))
    filled = dict(x)
    for index, modality in enumerate(modalities):
        value = x[modality]
        rows = absent[:, index].to(value.device).view(-1, *[1] * (value.dim() - 1))
        filled[modality] = _without_infinities(value, rows)
    return filled


def _without_infinities(values: Tensor, where: Tensor) -> Tensor:
    return values.masked_fill(where & values.isfinite().logical_not(), 0.0)


def _of_modality(x: Any, modality: str, index: int) -> Any:
    if isinstance(x, Tensor):
        return x[:, index : index + 1]
    return {name: x[name] for name in (modality, f"{modality}_padding") if name in x}
