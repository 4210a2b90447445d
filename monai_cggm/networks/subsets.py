# SPDX-License-Identifier: Apache-2.0
"""What a network predicts from every subset of its modalities."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import combinations
from typing import Any, cast

import torch
from torch import Tensor, nn

from monai_cggm.batches import Inputs, samples_in, spatial_size
from monai_cggm.networks.late import LateFusion
from monai_cggm.networks.segmenter import MultimodalSegmenter
from monai_cggm.networks.unimodal import FusionAndUnimodal, of_present, refuse_classifiers

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
    The networks in a :class:`LateFusion` run once, too, and stand for the classifiers: each one's own prediction is
    there under the name of its modality.

    Args:
        network: takes ``forward(x, present=...)``.
        classifiers: the modalities' classifiers, or None; None for a :class:`LateFusion`.
        modalities: names of the modalities; default: ``network.modalities``.

    Raises:
        ValueError: for classifiers beside a :class:`LateFusion`.

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
        refuse_classifiers(network, classifiers)
        self.network = network
        self.classifiers = classifiers
        names: Sequence[str] = modalities if modalities is not None else network.modalities  # type: ignore[assignment]
        self.modalities = tuple(names)
        self.masks = {subset_predictor(s, names): [m in s for m in names] for s in modality_subsets(names)}

    def forward(self, x: Inputs, present: Tensor | None = None) -> dict[str, Tensor]:
        """Predict from every subset.

        Args:
            x: an image ``(B, M, *S)``, or a dictionary of tensors by modality.
            present: boolean ``(B, M)``; None: all are present. Subsets that need a modality that some sample lacks are
                left out; ``fusion`` gets what is there.

        Returns:
            Predictor (see :func:`subset_predictor`) → logits ``(B, K, *S)``.
        """
        masks = self._masks(x, present)
        size = list(spatial_size(x))
        if isinstance(self.network, LateFusion):
            members = self.network.members(x)
            terms = self.network.terms(list(members.values()))
            predictions = {name: self.network.decode(terms, size, mask) for name, mask in masks.items()}
            return {**predictions, **of_present(members, present)}
        if isinstance(self.network, MultimodalSegmenter):
            features: Any = self.network.encode(cast(Tensor, x))
            predictions = {name: self.network.decode(features, size, mask) for name, mask in masks.items()}
        else:
            predictions = {name: self.network(x, present=mask) for name, mask in masks.items()}
        if self.classifiers is None:
            return predictions
        both = FusionAndUnimodal(self.network, self.classifiers)(x, present)
        return {**predictions, **{name: logits for name, logits in both.items() if name != FUSION}}

    def _masks(self, x: Inputs, present: Tensor | None) -> dict[str, Tensor]:
        """The subsets that every sample has, ``(B, M)`` each, after what each sample has for the fusion."""
        samples = samples_in(x)
        device = (x if isinstance(x, Tensor) else next(iter(x.values()))).device
        there = torch.ones(samples, len(self.modalities), dtype=torch.bool) if present is None else present
        there = there.to(device)
        masks = {FUSION: there}
        for name, members in self.masks.items():
            mask = torch.tensor([members] * samples, device=device)
            if name != FUSION and bool((mask <= there).all()):
                masks[name] = mask
        return masks
