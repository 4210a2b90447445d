# SPDX-License-Identifier: Apache-2.0
"""Modality dropout: at every step the fusion sees a random subset of each sample's modalities."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import ignite.distributed as idist
import numpy as np
import torch
from ignite.engine import Engine, Events
from monai.utils import CommonKeys
from torch import Tensor

from monai_cggm.batches import FUSED, PRESENT, samples_in
from monai_cggm.methods.base import UnimodalObserver
from monai_cggm.methods.steering import Steering
from monai_cggm.networks.subsets import subset_masks


def mask_probabilities(masks: Tensor, balance: Tensor | None = None, floor: float = 0.5) -> Tensor:
    r"""Return how often each subset of modalities is drawn.

    Uniform without a balance. With one, a subset counts as much as the mean B of its modalities, mixed with a floor:

    .. math:: p(s) = \frac{f}{S} + (1 - f) \frac{\bar B_s}{\sum_{s'} \bar B_{s'}},\qquad
        \bar B_s = \frac{1}{|s|} \sum_{i \in s} \max(B_i, 0)

    so that every one of the S subsets keeps at least a share f of its uniform probability.

    Args:
        masks: boolean ``(S, M)``.
        balance: B, ``(M,)``, or None.
        floor: f, 0 to 1.

    Returns:
        Probabilities ``(S,)``, float64.

    Example:
        >>> masks = torch.tensor([[True, True], [True, False], [False, True]])
        >>> mask_probabilities(masks, torch.tensor([0.5, 1.5]), floor=0.0)
        tensor([0.3333, 0.1667, 0.5000], dtype=torch.float64)
    """
    uniform = torch.full((len(masks),), 1 / len(masks), dtype=torch.float64)
    if balance is None:
        return uniform
    members = masks.double()
    weight = members @ balance.double().cpu().clamp(min=0.0) / members.sum(dim=1)
    if not weight.sum() > 0:
        return uniform
    return floor * uniform + (1 - floor) * weight / weight.sum()


class ModalityDropout:
    r"""Give the network, in training, one of the 2^M − 1 subsets of modalities for each sample.

    As it is, with neither ``both`` nor a guide, it is MRD, the random modality dropout of the CGGM paper's tables:

    .. math:: L = L(f(x, S), y), \qquad S \sim U(\{S \neq \varnothing\})

    There is no canonical code under that name, and no constant; it is as in RFNet (Ding, Yu and Yang, *RFNet:
    Region-aware Fusion Network for Incomplete Multi-modal Brain Tumor Segmentation*, ICCV 2021), for any task.

    The mask goes into the batch under ``fused``, from where :func:`monai_cggm.batches.prepare_batch` hands it to the
    network's ``present``: features are zeroed at the fusion, after the encoders. So every encoder
    sees its modality, and so does its unimodal classifier. Of a case that lacks a modality only subsets of what is
    there are drawn. The draws depend on seed, process and iteration alone: a resumed run draws what an uninterrupted
    one would.

    Args:
        modalities: names of the modalities, or how many.
        seed: of the draws.
        guide: a method whose ``balance`` the probabilities follow (see :func:`mask_probabilities`); None: uniform,
            which is also the control for a guide.
        floor: see :func:`mask_probabilities`; None: 0.5 for a guide.
        full_share: share of the draws that keep all that a sample has.
        both: the fusion sees each sample as it is too, besides what is drawn, over one pass of the encoders.
        subsets: how many subsets are drawn for each sample, independently; the fusion sees each of them.

    Raises:
        ValueError: for fewer than two modalities, a floor or full_share outside 0 to 1, a floor without a guide, a
            guide without balance terms, or no subset.

    Example:
        >>> dropout = ModalityDropout(["flair", "t1ce"], seed=0)
        >>> dropout.draw(4, iteration=1)
        tensor([[ True, False],
                [False,  True],
                [False,  True],
                [ True,  True]])
    """

    def __init__(
        self,
        modalities: Sequence[str] | int,
        *,
        seed: int = 0,
        guide: UnimodalObserver | None = None,
        floor: float | None = None,
        full_share: float = 0.0,
        both: bool = False,
        subsets: int = 1,
    ) -> None:
        number = modalities if isinstance(modalities, int) else len(modalities)
        if number < 2:
            raise ValueError(f"dropout needs two modalities or more, got {modalities!r}")
        if floor is not None and not 0 <= floor <= 1:
            raise ValueError(f"floor must be between 0 and 1, got {floor}")
        if floor is not None and guide is None:
            raise ValueError(f"floor={floor} needs a guide, a method that has balance terms; there is none")
        if guide is not None and not isinstance(guide, Steering):
            raise ValueError(f"{type(guide).__name__} has no balance terms that could guide dropout")
        if not 0 <= full_share <= 1:
            raise ValueError(f"full_share must be between 0 and 1, got {full_share}")
        if subsets < 1:
            raise ValueError(f"subsets must be at least 1, got {subsets}")
        self.full_share = full_share
        self.both = both
        self.subsets = subsets
        self.seed = seed
        self.guide = guide
        self.floor = 0.5 if floor is None else floor
        self.masks = subset_masks([str(i) for i in range(number)])

    def __repr__(self) -> str:
        """Say what is attached and how."""
        guided = "uniform" if self.guide is None else f"guided, floor={self.floor}"
        draws = f"{guided}, full_share={self.full_share}, both={self.both}, drawn={self.subsets}, seed={self.seed}"
        return f"ModalityDropout({len(self.masks)} subsets, {draws})"

    def attach(self, engine: Engine) -> None:
        """Attach to a trainer whose ``prepare_batch`` is :func:`monai_cggm.batches.prepare_batch`."""
        engine.add_event_handler(Events.ITERATION_STARTED, self)

    def __call__(self, engine: Engine) -> None:
        """Put this iteration's masks into the batch."""
        batch: Any = engine.state.batch
        samples, present = samples_in(batch[CommonKeys.IMAGE]), batch.get(PRESENT)
        drawn = self.draw(samples, engine.state.iteration, present)
        if self.both:
            complete = torch.ones_like(drawn[:samples]) if present is None else present.bool().cpu()
            drawn = torch.cat([complete, drawn])
        batch[FUSED] = drawn

    def draw(self, samples: int, iteration: int, present: Tensor | None = None) -> Tensor:
        """Draw masks.

        Args:
            samples: B.
            iteration: the training iteration.
            present: which modalities each sample has, boolean ``(B, M)``; None: all.

        Returns:
            Boolean ``(subsets * B, M)``, at least one True in each row, none where ``present`` is False; row
            ``r * B + b`` is sample b's.
        """
        generator = torch.Generator()
        state = np.random.SeedSequence((self.seed, idist.get_rank(), iteration)).generate_state(1, np.uint64)
        generator.manual_seed(int(state[0] >> np.uint64(1)))
        balance = None if self.guide is None else self.guide.balance
        chances = mask_probabilities(self.masks, balance, self.floor).expand(samples, -1)
        there = torch.ones(samples, self.masks.shape[1], dtype=torch.bool)
        if present is not None:
            there = present.bool().cpu()
            possible = ~(self.masks[None] & ~there[:, None]).any(dim=2)
            allowed = chances * possible
            # a guide without a floor may leave nothing of what is there
            chances = torch.where(allowed.sum(dim=1, keepdim=True) > 0, allowed, possible.double())
        drawn = [self.masks[torch.multinomial(chances, 1, generator=generator).squeeze(1)] for _ in range(self.subsets)]
        keeps_all = torch.rand(samples, 1, generator=generator) < self.full_share
        return torch.cat([torch.where(keeps_all, there, subset) for subset in drawn])
