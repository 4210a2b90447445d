# SPDX-License-Identifier: Apache-2.0
"""What a network predicts from every subset of its modalities."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import combinations
from typing import Any

import torch
from torch import Tensor, nn

from monai_cggm.networks.segmenter import MultimodalSegmenter
from monai_cggm.networks.unimodal import FusionAndUnimodal

#: the name of the prediction from all modalities
FUSION = "fusion"


def modality_subsets(modalities: Sequence[str]) -> list[tuple[str, ...]]:
    """Return every subset of the modalities that is not empty, the largest first: 2^M − 1 of them.

    Example:
        >>> modality_subsets(["flair", "t1ce", "t2"])[:4]
        [('flair', 't1ce', 't2'), ('flair', 't1ce'), ('flair', 't2'), ('t1ce', 't2')]
    """
    return [subset for size in range(len(modalities), 0, -1) for subset in combinations(modalities, size)]


def subset_masks(modalities: Sequence[str]) -> Tensor:
    """Return the masks of :func:`modality_subsets`, boolean ``(2^M − 1, M)``, in its order.

    Example:
        >>> subset_masks(["flair", "t1"]).tolist()
        [[True, True], [True, False], [False, True]]
    """
    return torch.tensor([[m in subset for m in modalities] for subset in modality_subsets(modalities)])


def subset_predictor(subset: Sequence[str], modalities: Sequence[str]) -> str:
    """Name the fusion's prediction from a subset: ``fusion`` for all, otherwise ``fusion[flair+t1ce]``."""
    return FUSION if len(subset) == len(modalities) else f"{FUSION}[{'+'.join(subset)}]"


class Subsets(nn.Module):
    """A network's predictions from every subset of the modalities, and those of the classifiers, for evaluation.

    The features of the modalities outside the subset are zero, as they are for a case that lacks them. Encoders run
    once for all subsets of a :class:`MultimodalSegmenter`; any other network that takes ``present`` runs once a subset.

    Args:
        network: takes ``forward(x, present=...)``.
        classifiers: the modalities' classifiers, or None.
        modalities: names of the modalities; default: ``network.modalities``.

    Example:
        >>> network = MultimodalSegmenter(["flair", "t2"], 4, encoder={"backbone": "resnet18", "width": 8}).eval()
        >>> list(Subsets(network)(torch.zeros(1, 2, 32, 32)))
        ['fusion', 'fusion[flair]', 'fusion[t2]']
    """

    network: nn.Module
    classifiers: nn.Module | None

    def __init__(
        self, network: nn.Module, classifiers: nn.Module | None = None, modalities: Sequence[str] | None = None
    ) -> None:
        super().__init__()
        self.network = network
        self.classifiers = classifiers
        names: Sequence[str] = modalities if modalities is not None else network.modalities  # type: ignore[assignment]
        self.masks = {subset_predictor(s, names): [m in s for m in names] for s in modality_subsets(names)}

    def forward(self, x: Tensor, present: Tensor | None = None) -> dict[str, Tensor]:
        """Segment a batch from every subset.

        Args:
            x: ``(B, M, *S)``.
            present: boolean ``(B, M)``; None: all are present. Subsets that need a modality that some sample lacks are
                left out; ``fusion`` gets what is there.

        Returns:
            Predictor (see :func:`subset_predictor`) → logits ``(B, K, *S)``.
        """
        there = torch.ones(x.shape[:2], dtype=torch.bool, device=x.device) if present is None else present.to(x.device)
        masks = {FUSION: there}
        for name, members in self.masks.items():
            mask = torch.tensor([members] * len(x), device=x.device)
            if name != FUSION and bool((mask <= there).all()):
                masks[name] = mask
        if isinstance(self.network, (MultimodalSegmenter, UnimodalEnsemble)):
            features: Any = self.network.encode(x)
            size = list(x.shape[2:])
            predictions = {name: self.network.decode(features, size, mask) for name, mask in masks.items()}
        else:
            predictions = {name: self.network(x, present=mask) for name, mask in masks.items()}
        if self.classifiers is None:
            return predictions
        both = FusionAndUnimodal(self.network, self.classifiers)(x, present)
        return {**predictions, **{name: logits for name, logits in both.items() if name != FUSION}}


class UnimodalEnsemble(nn.Module):
    """Networks that were each trained on one modality alone; together they predict the mean of their probabilities.

    The bar that a fused network has to clear: it uses every modality and no interaction of any two.

    Args:
        networks: modality → a network of that modality alone, in channel order.

    Example:
        >>> one = {"num_classes": 2, "encoder": {"backbone": "resnet18", "width": 8}}
        >>> ensemble = UnimodalEnsemble({m: MultimodalSegmenter([m], **one) for m in ("flair", "t2")}).eval()
        >>> ensemble(torch.zeros(1, 2, 32, 32)).exp().sum(dim=1).allclose(torch.ones(1, 32, 32))
        True
    """

    def __init__(self, networks: dict[str, nn.Module]) -> None:
        super().__init__()
        self.modalities = tuple(networks)
        self.networks = nn.ModuleDict(networks)

    @classmethod
    def of_modalities(cls, modalities: Sequence[str], **kwargs: Any) -> UnimodalEnsemble:
        """Build one :class:`MultimodalSegmenter` a modality, all with the same keyword arguments."""
        return cls({modality: MultimodalSegmenter([modality], **kwargs) for modality in modalities})

    def forward(self, x: Tensor, present: Tensor | None = None) -> Tensor:
        """Average over the modalities that are present.

        Args:
            x: ``(B, M, *S)``.
            present: boolean ``(B, M)``, at least one in each row; None: all are present.

        Returns:
            Logarithms of the mean probabilities, ``(B, K, *S)``.
        """
        return self.decode(self.encode(x), list(x.shape[2:]), present)

    def encode(self, x: Tensor) -> Tensor:
        """Run every network: log-probabilities ``(M, B, K, *S)``."""
        return torch.stack([n(x[:, i : i + 1]).log_softmax(dim=1) for i, n in enumerate(self.networks.values())])

    def decode(self, features: Tensor, size: list[int], present: Tensor | None = None) -> Tensor:
        """Average what :meth:`encode` returned, which has the image's ``size`` already."""
        if present is None:
            present = torch.ones(features.shape[1], len(features), dtype=torch.bool)
        mask = present.to(features.device).T.reshape(len(features), -1, *[1] * (features.dim() - 2))
        return features.masked_fill(~mask, -torch.inf).logsumexp(dim=0) - mask.sum(dim=0).to(features).log()
