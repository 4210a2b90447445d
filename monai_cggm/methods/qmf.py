# SPDX-License-Identifier: Apache-2.0
"""Late fusion weighted by energy, whose energies follow how well samples are learnt."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import ignite.distributed as idist
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from monai_cggm.methods.late import LateFusionMethod, LateStep, classes_of
from monai_cggm.metrics.epsilon import Epsilon
from monai_cggm.networks.late import energy_weight

#: the batch's keys under which samples are named, the first that is there
SAMPLE_KEYS = ("case", "index")


def ranking_loss(confidence: Tensor, history: Tensor, partner: Tensor | None = None) -> Tensor:
    r"""Return how far the order of confidences is from that of the losses so far.

    For each sample n and its partner n':

    .. math:: \max\big(0,\; |\bar l_n - \bar l_{n'}| - s (c_n - c_{n'})\big), \qquad
        s = \mathrm{sign}(\bar l_{n'} - \bar l_n)

    so that the sample that has been learnt better is the surer one, by as much as the losses differ; the mean over n.

    Args:
        confidence: c, ``(B,)``, differentiable.
        history: :math:`\bar l`, ``(B,)``, no graph.
        partner: n' for each n, ``(B,)``, integers; None for the next sample of the batch (the last one's is the first).

    Returns:
        A scalar; 0 for fewer than two samples, and where all histories are equal.

    Example:
        >>> ranking_loss(torch.tensor([0.5, 0.75]), torch.tensor([0.0, 0.5]))
        tensor(0.7500)
    """
    other = torch.arange(len(history), device=history.device).roll(-1) if partner is None else partner
    ahead = history[other] - history
    missing = ahead.abs() - ahead.sign() * (confidence - confidence[other])
    return missing.clamp(min=0.0).sum() / max(len(confidence), 1)


def next_of_another(names: Sequence[str]) -> list[int]:
    """Return for each sample the place of the next one, round the batch, that has another name; else its own.

    Slices of one case come one after another and share the case's history: as a pair they would have nothing to rank.

    Example:
        >>> next_of_another(["a", "a", "b"])
        [2, 2, 0]
    """
    samples = len(names)
    rounds = ([(n + step) % samples for step in range(samples)] for n in range(samples))
    return [next((m for m in places if names[m] != names[places[0]]), places[0]) for places in rounds]


class LossHistory:
    """Mean loss of every training sample so far, one for each modality; the same on all processes.

    Args:
        modalities: M.

    Example:
        >>> history = LossHistory(1)
        >>> losses = torch.tensor([[1.0], [3.0], [5.0]])
        >>> history.update(["a", "b", "b"], losses, torch.ones(3, 1, dtype=torch.bool))
        >>> history.mean().tolist(), history.normalised(["b", "a"]).tolist()
        ([[1.0], [4.0]], [[1.0], [0.0]])
    """

    def __init__(self, modalities: int) -> None:
        self.rows: dict[str, int] = {}
        self.sums = torch.zeros(0, modalities, dtype=torch.float64)
        self.counts = torch.zeros(0, modalities, dtype=torch.float64)

    def update(self, names: Sequence[str], losses: Tensor, there: Tensor) -> None:
        """Add a batch's losses ``(B, M)``, of those modalities that are ``there``; a name may come several times."""
        ranks = idist.get_world_size()
        everyone = names if ranks == 1 else [name for part in idist.all_gather(list(names)) for name in part]  # type: ignore[union-attr]
        for name in everyone:
            self.rows.setdefault(name, len(self.rows))
        own = {name: place for place, name in enumerate(dict.fromkeys(names))}
        place = torch.tensor([own[name] for name in names], device=losses.device)
        # a sample's rows are added by a product, which no order of threads can change
        member = F.one_hot(place, len(own)).T.double()
        rows = torch.tensor([self.rows[name] for name in own], device=losses.device)
        added = losses.new_zeros(2, len(self.rows), losses.shape[1], dtype=torch.float64)
        added[0, rows] = member @ torch.where(there, losses.double(), 0.0)
        added[1, rows] = member @ there.double()
        if ranks > 1:
            added = torch.as_tensor(idist.all_reduce(added))
        new = len(self.rows) - len(self.sums)
        self.sums = F.pad(self.sums.to(added), (0, 0, 0, new)) + added[0]
        self.counts = F.pad(self.counts.to(added), (0, 0, 0, new)) + added[1]

    def mean(self) -> Tensor:
        """Return the mean losses ``(N, M)``; NaN for what was never seen."""
        return self.sums / self.counts

    def normalised(self, names: Sequence[str]) -> Tensor:
        """Return the mean losses of some samples, ``(B, M)``, with the least of all samples at 0, the largest at 1.

        All are 0 where there is no difference between samples yet.
        """
        mean, seen = self.mean(), self.counts > 0
        least = torch.where(seen, mean, torch.inf).amin(dim=0)
        spread = torch.where(seen, mean, -torch.inf).amax(dim=0) - least
        rows = torch.tensor([self.rows[name] for name in names], device=mean.device)
        return torch.where(spread > 0, (mean[rows] - least) / spread, 0.0)

    def state_dict(self) -> dict[str, Any]:
        """Return the names of the samples in their order, and their sums and counts."""
        return {"samples": list(self.rows), "sums": self.sums.cpu(), "counts": self.counts.cpu()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore :meth:`state_dict`."""
        self.rows = {name: row for row, name in enumerate(state["samples"])}
        self.sums, self.counts = state["sums"], state["counts"]


class QMF(LateFusionMethod):
    r"""Quality-aware multimodal fusion: predictions are weighted by their energy, and energies are taught to be ranked.

    .. math::
        z &= \sum_i w_i z_i, \qquad w_i = \tfrac1{10} \log \sum_k e^{z_{ik}} \\
        L &= L(z, y) + \sum_i L(z_i, y) + \mu \sum_i R_i

    Zhang et al., "Provable Dynamic Fusion for Low-Quality Multimodal Data", ICML 2023. :math:`R_i` is
    :func:`ranking_loss` of member i: the confidence of a sample is its :math:`w_i`, its history the mean of member i's
    cross-entropy on it in all steps so far, this one included, scaled to [0, 1] over the samples seen. Samples are told
    apart by the batch's ``case`` (names) or, without it, ``index`` (integers): their place in the training data.

    The weights are differentiated, as in the authors' code for RGB-D scenes; their code for images with text detaches
    them in the fusion. The history is updated before the ranking, as in the latter: the other order divides 0 by 0 in
    the first step. For segmentation each voxel has its weight, and a sample's confidence and loss are means over its
    voxels; slices of one case share the case's history, so that a sample's partner is the next one of another case. A
    sample that lacks a modality is not ranked for it. Under several processes pairs are formed within a process's part
    of the batch, and the histories are everyone's.

    Args:
        network: see :class:`LateFusionMethod`; ``combine`` must be ``"energy"``.
        metric: see there.
        rank_weight: μ; 0.1 in the authors' code for RGB-D scenes, 1 in that for images with text.
        parts: ``loss_function`` of :class:`LateFusionMethod`.

    Raises:
        ValueError: see there, and for a negative weight; in the first step, for a batch that does not name its samples.
            Networks of one output are refused by :class:`LateFusion`: a regression has no energy; those without a
            ``head``, which would tell how many they have, here.

    Example:
        >>> from monai_cggm.metrics import RegionDice
        >>> from monai_cggm.networks import LateFusion, MultimodalSegmenter
        >>> one = {"num_classes": 2, "encoder": {"backbone": "resnet18", "width": 8}}
        >>> network = LateFusion.of_modalities(["flair", "t1ce"], MultimodalSegmenter, combine="energy", **one)
        >>> QMF(network, RegionDice({"lesion": [1]}, num_classes=2))
        QMF(modalities=['flair', 't1ce'], rank_weight=0.1)
    """

    combine = "energy"

    def __init__(self, network: nn.Module, metric: Epsilon, *, rank_weight: float = 0.1, **parts: Any) -> None:
        super().__init__(network, metric, **parts)
        if not rank_weight >= 0:
            raise ValueError(f"rank_weight must not be negative, got {rank_weight}")
        if self.network.num_outputs is None:
            kind = type(next(iter(self.members.values()))).__name__
            raise ValueError(f"QMF weighs class logits, and tells them by a network's head; {kind} has none")
        self.rank_weight = rank_weight
        self.history = LossHistory(len(self.modalities))

    def __repr__(self) -> str:
        """Say what is attached and how."""
        return f"QMF(modalities={list(self.modalities)}, rank_weight={self.rank_weight})"

    def loss(self, step: LateStep) -> Tensor:
        """Return the losses of the fusion, of the members, and of their ranking."""
        names = sample_names(step.batch, len(step.target))
        confidences = [_mean_of_samples(energy_weight(z)) for z in step.predictions]
        self.history.update(names, _losses_of_samples(step), _there(step))
        history = self.history.normalised(names)
        rank = torch.stack(
            [
                ranking_loss(c[r], history[r, i].to(c), _partners(names, r))
                for i, (c, r) in enumerate(zip(confidences, _rows(step), strict=True))
            ]
        ).sum()
        self._scalars["loss/rank"] = rank.detach()
        self._add_scalars("confidence", _means_over(confidences, _rows(step)))
        return step.task_loss + step.losses.sum() + self.rank_weight * rank

    def state_dict(self) -> dict[str, Any]:
        """Return the last ε and the history."""
        return {**super().state_dict(), "history": self.history.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore :meth:`state_dict`."""
        super().load_state_dict(state)
        self.history.load_state_dict(state["history"])


def sample_names(batch: Any, samples: int) -> list[str]:
    """Return the names of a batch's samples.

    Raises:
        ValueError: where it has none, or another number of them.

    Example:
        >>> sample_names({"index": torch.tensor([4, 0])}, 2)
        ['4', '0']
    """
    keys = [key for key in SAMPLE_KEYS if isinstance(batch, Mapping) and key in batch]
    if not keys:
        found = sorted(map(str, batch)) if isinstance(batch, Mapping) else type(batch).__name__
        raise ValueError(
            "QMF keeps the history of each training sample: the batch must name its samples under 'case' (names) or "
            f"'index' (integers), found {found}"
        )
    values = batch[keys[0]]
    names = [str(value) for value in (values.tolist() if isinstance(values, Tensor) else values)]
    if len(names) != samples:
        raise ValueError(f"the batch names {len(names)} samples under {keys[0]!r}, and has {samples}")
    return names


def _mean_of_samples(values: Tensor) -> Tensor:
    return values.reshape(len(values), -1).mean(dim=1)


def _losses_of_samples(step: LateStep) -> Tensor:
    classes = classes_of(step.target)
    each = [F.cross_entropy(z.detach(), classes, reduction="none") for z in step.predictions]
    return torch.stack([_mean_of_samples(values) for values in each], dim=1)


def _there(step: LateStep) -> Tensor:
    device = step.target.device
    if step.present is None:
        return torch.ones(len(step.target), len(step.predictions), dtype=torch.bool, device=device)
    return step.present.to(device)


def _rows(step: LateStep) -> list[Tensor]:
    """The samples that have each modality."""
    present = torch.ones(len(step.target), len(step.predictions)) if step.present is None else step.present
    return [column.nonzero().squeeze(1).to(step.target.device) for column in present.T]


def _partners(names: Sequence[str], rows: Tensor) -> Tensor:
    """The partners of some samples among themselves."""
    return torch.tensor(next_of_another([names[row] for row in rows.tolist()]), dtype=torch.long, device=rows.device)


def _means_over(values: Sequence[Tensor], rows: Sequence[Tensor]) -> Tensor:
    return torch.stack([v.detach()[r].sum() / max(len(r), 1) for v, r in zip(values, rows, strict=True)])
