# SPDX-License-Identifier: Apache-2.0
"""A picture of one validation case in TensorBoard, every few epochs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from ignite.engine import Events
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from monai.engines import Evaluator, Trainer
from monai.utils import CommonKeys
from torch import Tensor

from monai_cggm.handlers.run_log import RunLog

#: colours of the classes 1, 2, 3 as red, green and blue in 0..1
CLASS_COLOURS = ((0.90, 0.20, 0.20), (0.25, 0.75, 0.35), (0.98, 0.85, 0.20))
CLASS_NAMES = ("necrotic core", "edema", "enhancing tumour")


class ValidationImages:
    """Show the sequences, the truth and the prediction of the first validation case in TensorBoard.

    The slice is the one with most tumour in the truth, so the pictures of a run can be compared. They are drawn on the
    first epoch, on every multiple of ``every``, and on the last, where validation runs then. The validation loader
    must not shuffle.

    Args:
        log: the run's log; its writer takes the pictures.
        validator: the evaluator that validates; its output holds ``image`` (M, H, W, D), ``label`` (1, H, W, D) with
            classes, and ``pred``, a tensor or a dict with one under ``fusion``: scores of K classes or, with one
            channel, classes. Two spatial dimensions will do too.
        modalities: titles, in the order of the image's channels.
        every: epochs from picture to picture.

    Raises:
        ValueError: where ``every`` is below 1.

    Example:
        >>> from monai.engines import SupervisedEvaluator
        >>> evaluator = SupervisedEvaluator(torch.device("cpu"), [], network=torch.nn.Identity())
        >>> images = ValidationImages(RunLog("runs/one"), evaluator, modalities=["flair", "t1ce"], every=10)
    """

    def __init__(self, log: RunLog, validator: Evaluator, *, modalities: Sequence[str], every: int = 5) -> None:
        if every < 1:
            raise ValueError(f"every must be at least 1, got {every}")
        self.log = log
        self.validator = validator
        self.modalities = tuple(modalities)
        self.every = every

    def attach(self, engine: Trainer) -> None:
        """Attach to the trainer whose validation is shown."""
        self.validator.add_event_handler(Events.ITERATION_COMPLETED, self._draw, engine)

    def _draw(self, validator: Evaluator, trainer: Trainer) -> None:
        epoch, last = trainer.state.epoch, trainer.state.max_epochs
        due = epoch == 1 or epoch % self.every == 0 or epoch == last
        if self.log.writer is None or validator.state.iteration != 1 or not due:
            return
        output = _first_item(validator.state.output)
        image, label, pred = (output[key] for key in (CommonKeys.IMAGE, CommonKeys.LABEL, CommonKeys.PRED))
        figure = comparison_figure(image, label, classes_of(pred), titles=self.modalities)
        self.log.writer.add_figure("validation", figure, trainer.state.iteration)


def classes_of(pred: Tensor | Mapping[str, Tensor]) -> Tensor:
    """Return the classes (1, ...) that scores (K, ...) choose; a dict's ``fusion`` stands for it."""
    tensor = pred["fusion"] if isinstance(pred, Mapping) else pred
    return tensor if tensor.shape[0] == 1 else tensor.argmax(dim=0, keepdim=True)


def comparison_figure(image: Tensor, label: Tensor, pred: Tensor, *, titles: Sequence[str]) -> Figure:
    """Draw the sequences of a slice beside its true and its predicted classes, laid over the first sequence.

    Args:
        image: (M, H, W) or (M, H, W, D).
        label: true classes, (1, H, W) or (1, H, W, D).
        pred: predicted classes, shaped as ``label``.
        titles: one for each sequence.

    Returns:
        A figure of M + 2 panels. Of a volume, the slice with most tumour in the truth is shown.

    Raises:
        ValueError: where the number of titles is not that of the sequences.
    """
    if len(titles) != image.shape[0]:
        raise ValueError(f"an image of {image.shape[0]} channels needs as many titles, got {', '.join(titles)}")
    slices, truth, found = (_to_slice(t, label) for t in (image, label, pred))
    greys = [_grey(channel) for channel in slices]
    panels = [*greys, _overlay(greys[0], truth[0]), _overlay(greys[0], found[0])]
    figure = Figure(figsize=(1.8 * len(panels), 2.3), dpi=100, layout="constrained")
    for axes, panel, title in zip(
        figure.subplots(1, len(panels)), panels, [*titles, "truth", "prediction"], strict=True
    ):
        axes.imshow(np.rot90(panel), interpolation="nearest")
        axes.set_title(title, fontsize=9)
        axes.axis("off")
    handles = [Patch(color=colour, label=name) for colour, name in zip(CLASS_COLOURS, CLASS_NAMES, strict=True)]
    figure.legend(handles=handles, loc="outside lower center", ncols=len(handles), fontsize=8, frameon=False)
    return figure


def _first_item(output: Any) -> Mapping[str, Any]:
    if isinstance(output, list):  # decollated
        return output[0]
    return {key: _first(value) for key, value in output.items()}


def _first(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _first(item) for key, item in value.items()}
    return value[0] if isinstance(value, Tensor) and value.ndim > 0 else value


def _to_slice(tensor: Tensor, label: Tensor) -> np.ndarray:
    """Return (C, H, W): of a volume, the slice with most voxels of any class but 0 in ``label``."""
    if tensor.ndim == 4:
        tumour = (label[0] > 0).sum(dim=(0, 1))
        tensor = tensor[..., int(tumour.argmax()) if tumour.any() else tensor.shape[-1] // 2]
    return torch.as_tensor(tensor).detach().float().cpu().numpy()


def _grey(channel: np.ndarray) -> np.ndarray:
    low, high = np.percentile(channel, (1, 99.5))
    grey = np.clip((channel - low) / max(high - low, 1e-6), 0, 1)
    return np.repeat(grey[..., None], 3, axis=-1)


def _overlay(grey: np.ndarray, classes: np.ndarray, opacity: float = 0.55) -> np.ndarray:
    picture = grey.copy()
    for index, colour in enumerate(CLASS_COLOURS, start=1):
        inside = classes == index
        picture[inside] = (1 - opacity) * picture[inside] + opacity * np.asarray(colour)
    return picture
