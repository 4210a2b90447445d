# SPDX-License-Identifier: Apache-2.0
"""Transformers for sequences and feature tables: one encoder a modality, a fusion, and the classifiers beside them."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn

#: a sequence ``(B, T, D)`` and its padding ``(B, T)``, True where a position is filled up and means nothing
Padded = tuple[Tensor, Tensor]


class AttentionStack(nn.Module):
    """Self-attention layers, each normalised before it acts, and a layer normalisation at the end.

    PyTorch's ``TransformerEncoderLayer`` with feed-forward layers four times as wide, as in Vaswani et al. (NeurIPS
    2017). Normalisation comes first, which trains without a warm-up.

    Args:
        width: numbers at each position.
        layers: how many layers; 0 leaves the normalisation alone.
        heads: attention heads, a divisor of ``width``.
        dropout: probability of dropout in each layer.

    Raises:
        ValueError: for a width that the heads do not divide, a number of layers below 0, or dropout outside 0 to 1.

    Example:
        >>> stack = AttentionStack(width=8, layers=2, heads=2).eval()
        >>> x = torch.randn(1, 3, 8)
        >>> padded = torch.tensor([[False, False, True]])
        >>> torch.allclose(stack(x, padded)[:, :2], stack(x[:, :2], padded[:, :2]), atol=1e-6)
        True
    """

    def __init__(self, width: int, layers: int, heads: int, dropout: float = 0.0) -> None:
        super().__init__()
        if heads < 1 or width < 1 or width % heads:
            raise ValueError(f"width must be a multiple of heads, got width={width}, heads={heads}")
        if layers < 0:
            raise ValueError(f"layers must be at least 0, got {layers}")
        if not 0 <= dropout < 1:
            raise ValueError(f"dropout must be at least 0 and below 1, got {dropout}")
        self.layers = nn.ModuleList(
            nn.TransformerEncoderLayer(width, heads, 4 * width, dropout, batch_first=True, norm_first=True)
            for _ in range(layers)
        )
        self.norm = nn.LayerNorm(width)

    def forward(self, x: Tensor, padding: Tensor) -> Tensor:
        """Map ``x`` ``(B, T, width)`` to the same shape; no position attends to a padded one."""
        # a sample of padding alone has no position to attend to, and PyTorch's fast path makes NaN of it
        unseen = padding & padding.all(dim=1, keepdim=True).logical_not()
        for layer in self.layers:
            x = layer(x, src_key_padding_mask=unseen)
        return self.norm(x)


class SequenceEncoder(nn.Module):
    """Encoder of one modality: standardisation, a linear projection, positions, self-attention.

    As in the paper's set-up for CMU-MOSI and IEMOCAP: a projection to a common width and a transformer. The projection
    belongs to the encoder, so a method that scales the encoder scales it too (in the authors' code it stands beside
    the encoders and is never scaled). A vector is a sequence of length 1. The final normalisation has a bias of its
    own, by which the fusion tells modalities apart.

    Args:
        features: D, numbers at each position of the input.
        width: numbers at each position of the output; 40 in the authors' code.
        layers: see :class:`AttentionStack`; 5 in the authors' code.
        heads: see there; 5 in the authors' code.
        dropout: see there; 0.1 in the authors' code.
        statistics: mean and standard deviation of each of the D numbers, by which the input is standardised; None: it
            is taken as it is. They are buffers, so they travel with the weights.

    Attributes:
        features: as given.
        width: as given.
        mean: buffer ``(D,)``.
        std: buffer ``(D,)``.

    Raises:
        ValueError: for statistics of another length, or a standard deviation that is not positive.

    Example:
        >>> encoder = SequenceEncoder(3, width=8, layers=1, heads=2).eval()
        >>> padding = torch.tensor([[False, False, True]])
        >>> sequence, _ = encoder((torch.randn(1, 3, 3), padding))
        >>> tuple(sequence.shape), sequence[0, 2].abs().max().item()
        ((1, 3, 8), 0.0)
    """

    def __init__(
        self,
        features: int,
        *,
        width: int = 40,
        layers: int = 5,
        heads: int = 5,
        dropout: float = 0.1,
        statistics: tuple[Any, Any] | None = None,
    ) -> None:
        super().__init__()
        if features < 1:
            raise ValueError(f"features must be at least 1, got {features}")
        self.features = features
        self.width = width
        mean, std = (torch.zeros(features), torch.ones(features)) if statistics is None else statistics
        self.mean = nn.Buffer(torch.as_tensor(mean, dtype=torch.get_default_dtype()).clone())
        self.std = nn.Buffer(torch.as_tensor(std, dtype=torch.get_default_dtype()).clone())
        if self.mean.shape != (features,) or self.std.shape != (features,):
            raise ValueError(
                f"statistics must be two vectors of {features} numbers, got {tuple(self.mean.shape)} and "
                f"{tuple(self.std.shape)}"
            )
        if not bool((self.std > 0).all()):
            raise ValueError(f"standard deviations must be positive, got {self.std.min().item():g}")
        self.project = nn.Linear(features, width)
        self.attention = AttentionStack(width, layers, heads, dropout)

    def forward(self, sequence: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        """Encode a modality.

        Args:
            sequence: values ``(B, T, D)`` and padding ``(B, T)``, boolean, True where a position is filled up. What
                stands there (NaN, too) changes nothing.

        Returns:
            Values ``(B, T, width)``, exactly 0 at padded positions, and the padding.
        """
        x, padding = sequence
        filled = padding.unsqueeze(2)
        x = ((x - self.mean) / self.std).masked_fill(filled, 0.0)
        x = self.project(x) + sinusoids(x.shape[1], self.width, x)
        return self.attention(x, padding).masked_fill(filled, 0.0), padding

    def feature_of(self, output: Padded) -> Tensor:
        """Return the one vector a sample that stands for an output: the mean over its positions, ``(B, width)``."""
        return masked_mean(output[0], output[1])


class MultimodalTransformer(nn.Module):
    """One transformer a modality, and one over all of them with a token that the prediction is read from.

    For sequences and for feature tables, for classification and for regression. The encoders' outputs stand one after
    the other behind a learnt token, a transformer lets them attend to each other, and the token goes through a residual
    block of two linear layers to the head. Sizes are those of the authors' code for CMU-MOSI and IEMOCAP; their fusion
    pools the sequences where this one has a token. Nothing in it depends on the other samples of a batch.

    Args:
        modalities: names of the modalities, in the order of a mask's columns; one or more.
        num_outputs: K, number of classes; 1 for regression.
        sizes: numbers at each position of each modality, by name; further names are passed over, so that one mapping
            serves networks of one modality each.
        width: numbers at each position behind the projection.
        layers: layers of each encoder.
        heads: attention heads, everywhere.
        fusion_layers: layers of the fusion; 3 in the authors' code.
        dropout: probability of dropout, everywhere.
        statistics: see :class:`SequenceEncoder`, by name.

    Attributes:
        encoders: ``nn.ModuleDict``, modality → :class:`SequenceEncoder`, in the order of ``modalities``.
        head: the last layer, linear.
        modalities: as given, a tuple.
        num_outputs: as given.

    Raises:
        ValueError: for no modality, a repeated one, one without a size, or fewer than one output.

    Example:
        >>> network = MultimodalTransformer(["audio", "text"], 3, {"audio": 4, "text": 6}, width=8, heads=2, layers=1)
        >>> x = {"audio": torch.randn(2, 7, 4), "text": torch.randn(2, 6)}              # a sequence and a vector
        >>> tuple(network(x).shape)
        (2, 3)
        >>> x["audio_padding"] = torch.tensor([[False] * 7, [False] * 4 + [True] * 3])
        >>> tuple(network(x, present=torch.tensor([[True, True], [False, True]])).shape)
        (2, 3)
    """

    def __init__(
        self,
        modalities: Sequence[str],
        num_outputs: int,
        sizes: Mapping[str, int],
        *,
        width: int = 40,
        layers: int = 5,
        heads: int = 5,
        fusion_layers: int = 3,
        dropout: float = 0.1,
        statistics: Mapping[str, tuple[Any, Any]] | None = None,
    ) -> None:
        super().__init__()
        _check_modalities(modalities, sizes)
        if num_outputs < 1:
            raise ValueError(f"num_outputs must be at least 1, got {num_outputs}")
        self.modalities = tuple(modalities)
        self.num_outputs = num_outputs
        self.encoders = nn.ModuleDict(
            {
                name: SequenceEncoder(
                    sizes[name],
                    width=width,
                    layers=layers,
                    heads=heads,
                    dropout=dropout,
                    statistics=None if statistics is None else statistics[name],
                )
                for name in self.modalities
            }
        )
        self.token = nn.Parameter(torch.randn(1, 1, width) / math.sqrt(width))
        self.fusion = AttentionStack(width, fusion_layers, heads, dropout)
        self.residual = nn.Sequential(
            nn.Linear(width, width), nn.ReLU(), nn.Dropout(dropout), nn.Linear(width, width), nn.Dropout(dropout)
        )
        self.head = nn.Linear(width, num_outputs)

    def forward(self, x: dict[str, Tensor], present: Tensor | None = None) -> Tensor:
        """Predict for a batch.

        Args:
            x: modality → ``(B, T, D)``, or ``(B, D)`` for vectors; and, where sequences were filled up to the longest,
                ``<modality>_padding`` → boolean ``(B, T)``. Other keys are passed over.
            present: boolean ``(B, M)``; a modality that is absent is not attended to and its features are exactly zero,
                so that what stands in its place (NaN, too) changes nothing. None: all are present. With
                ``(R * B, M)`` the encoders run once and the fusion R times: row ``r * B + b`` is sample b's.

        Returns:
            Logits ``(B, num_outputs)``, or ``(R * B, num_outputs)``.

        Raises:
            ValueError: for a mask of another shape.
        """
        size: list[int] = []
        return self.fuse(self.encode(x, present), size, present)

    def encode(self, x: dict[str, Tensor], present: Tensor | None = None) -> dict[str, tuple[Tensor, Tensor]]:
        """Run the encoders: modality → what its encoder gives back.

        Args:
            x: as in :meth:`forward`.
            present: as in :meth:`forward`. An absent modality is encoded like any other, because a classifier may
                still look at it; only numbers that are not finite are taken out, or they would come back as the
                gradient of the weights.
        """
        outputs: dict[str, tuple[Tensor, Tensor]] = {}
        for index, (name, encoder) in enumerate(self.encoders.items()):
            values = x[name]
            if values.dim() == 2:
                values = values.unsqueeze(1)
            if present is not None:
                _check_present(present, len(self.encoders), len(values))
                seen = present[:, index].reshape(-1, len(values)).any(dim=0).to(values.device)
                unfit = seen.view(-1, 1, 1).logical_not() & values.isfinite().logical_not()
                values = values.masked_fill(unfit, 0.0)
            padding = torch.zeros(values.shape[:2], dtype=torch.bool, device=values.device)
            if name + "_padding" in x:  # monai_cggm.batches.PADDING, written out for TorchScript
                padding = x[name + "_padding"]
            outputs[name] = encoder((values, padding))
        return outputs

    def fuse(self, outputs: dict[str, tuple[Tensor, Tensor]], size: list[int], present: Tensor | None = None) -> Tensor:
        """Predict from what the encoders gave back; one call of :meth:`encode` may be fused under several masks.

        Args:
            outputs: as :meth:`encode` returns them.
            size: the target's spatial size: empty here, and the same argument for every network.
            present: as in :meth:`forward`.
        """
        samples = len(outputs[self.modalities[0]][0])
        rows = samples if present is None else len(present)
        if present is not None:
            _check_present(present, len(self.encoders), samples)
        tokens: list[Tensor] = [self.token.expand(rows, -1, -1)]
        paddings: list[Tensor] = [torch.zeros(rows, 1, dtype=torch.bool, device=self.token.device)]
        for index, name in enumerate(self.encoders.keys()):
            sequence, padding = outputs[name]
            if present is not None:
                absent = present[:, index].to(sequence.device).logical_not().unsqueeze(1)
                padding = padding.repeat(rows // samples, 1) | absent
                # filled, not multiplied: an absent modality may hold anything, and NaN × 0 is NaN
                sequence = sequence.repeat(rows // samples, 1, 1).masked_fill(absent.unsqueeze(2), 0.0)
            tokens.append(sequence)
            paddings.append(padding)
        fused = self.fusion(torch.cat(tokens, dim=1), torch.cat(paddings, dim=1))[:, 0]
        return self.head(fused + self.residual(fused))


class SequenceClassifiers(nn.Module):
    """One light classifier a modality: self-attention, the mean over positions, a linear layer.

    The classifiers :math:`f_i` of CGGM for sequences: "1-2 multi-head self-attention layers and a fully connected
    layer" (section 3.2 of the paper). A module of its own, never a part of the network.

    Args:
        modalities: names of the modalities.
        num_outputs: as the network's.
        width: numbers at each position of an encoder's output; each head has as many inputs, which must equal those of
            the network's head, or gradients cannot be compared.
        layers: self-attention layers; the paper: 1 or 2.
        heads: attention heads.
        dropout: probability of dropout; none, so that nothing random happens in them.

    Attributes:
        attention: ``nn.ModuleDict``, modality → :class:`AttentionStack`.
        heads: ``nn.ModuleDict``, modality → linear layer.

    Example:
        >>> network = MultimodalTransformer(["audio", "text"], 3, {"audio": 4, "text": 6}, width=8, heads=2, layers=1)
        >>> classifiers = SequenceClassifiers.for_network(network)
        >>> features = network.encode({"audio": torch.randn(2, 7, 4), "text": torch.randn(2, 6)})
        >>> {name: tuple(logits.shape) for name, logits in classifiers(features).items()}
        {'audio': (2, 3), 'text': (2, 3)}
    """

    def __init__(
        self,
        modalities: Sequence[str],
        num_outputs: int,
        width: int = 40,
        *,
        layers: int = 1,
        heads: int = 5,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        self.attention = nn.ModuleDict({name: AttentionStack(width, layers, heads, dropout) for name in modalities})
        self.heads = nn.ModuleDict({name: nn.Linear(width, num_outputs) for name in modalities})

    @classmethod
    def for_network(cls, network: MultimodalTransformer, **kwargs: Any) -> SequenceClassifiers:
        """Build classifiers that fit a network; keyword arguments override what is taken from it."""
        first = cast(nn.TransformerEncoderLayer | None, next(iter(network.fusion.layers), None))
        fitting: dict[str, Any] = {} if first is None else {"heads": first.self_attn.num_heads}
        return cls(network.modalities, network.num_outputs, network.head.in_features, **{**fitting, **kwargs})

    def forward(self, features: Mapping[str, Padded], size: Sequence[int] | None = None) -> dict[str, Tensor]:
        """Predict from each modality alone.

        Args:
            features: modality → values ``(B, T, width)`` and padding ``(B, T)``, as its encoder returns them; detach
                them unless the encoders are meant to learn from it.
            size: not used; networks of images have it.

        Returns:
            Modality → logits ``(B, num_outputs)``.
        """
        predictions = {}
        for name, attention in self.attention.items():
            values, padding = features[name]
            predictions[name] = self.heads[name](masked_mean(attention(values, padding), padding))
        return predictions


def sinusoids(length: int, width: int, like: Tensor) -> Tensor:
    r"""Return the positions of Vaswani et al. (NeurIPS 2017), ``(length, width)``, of the type and device of ``like``.

    .. math:: p_{t,2i} = \sin(t / 10000^{2i/w}),\qquad p_{t,2i+1} = \cos(t / 10000^{2i/w})

    They need no largest length.

    Example:
        >>> sinusoids(2, 4, torch.zeros(1))
        tensor([[0.0000, 1.0000, 0.0000, 1.0000],
                [0.8415, 0.5403, 0.0100, 0.9999]])
    """
    rates = torch.exp(-math.log(10000.0) / width * torch.arange(0, width, 2, dtype=torch.float64))
    angles = torch.arange(length, dtype=torch.float64).unsqueeze(1) * rates
    return torch.stack([angles.sin(), angles.cos()], dim=2).flatten(1)[:, :width].to(like)


def masked_mean(values: Tensor, padding: Tensor) -> Tensor:
    """Return the mean over the positions that are not padded, ``(B, width)``; 0 for a sample that has none.

    Args:
        values: ``(B, T, width)``.
        padding: boolean ``(B, T)``.

    Example:
        >>> masked_mean(torch.tensor([[[1.0], [3.0], [9.0]]]), torch.tensor([[False, False, True]]))
        tensor([[2.]])
    """
    there = padding.logical_not().unsqueeze(2)
    return values.masked_fill(there.logical_not(), 0.0).sum(dim=1) / there.sum(dim=1).clamp(min=1)


def _check_modalities(modalities: Sequence[str], sizes: Mapping[str, int]) -> None:
    if isinstance(modalities, str) or not modalities:
        raise ValueError(f"modalities must be a sequence of at least one name, got {modalities!r}")
    if len(set(modalities)) != len(modalities):
        raise ValueError(f"modalities must differ from each other, got {list(modalities)}")
    without = [name for name in modalities if name not in sizes]
    if without:
        raise ValueError(f"sizes must name every modality: {without} are missing among {sorted(sizes)}")


def _check_present(present: Tensor, modalities: int, samples: int) -> None:
    if present.dim() != 2 or present.shape[1] != modalities or present.shape[0] % samples != 0:
        raise ValueError(
            f"present must have a row, or several, for each of {samples} samples, and {modalities} columns, "
            f"got {present.shape}"
        )
