# SPDX-License-Identifier: Apache-2.0
"""A picture of one validation case in TensorBoard, every few epochs."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from ignite.engine import Events
from matplotlib import colormaps
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from monai.engines import Evaluator, Trainer
from monai.utils import CommonKeys, ensure_tuple
from torch import Tensor

from monai_cggm.handlers.run_log import RunLog

logger = logging.getLogger(__name__)

Colour = tuple[float, float, float]

#: Colours of the classes 1, 2, ... as red, green and blue in 0..1: those of Okabe and Ito, which the colour-blind can
#: tell apart, without black, which is the background of an image.
CLASS_COLOURS: tuple[Colour, ...] = (
    (0.835, 0.369, 0.000),  # vermilion
    (0.337, 0.706, 0.914),  # sky blue
    (0.941, 0.894, 0.259),  # yellow
    (0.000, 0.620, 0.451),  # bluish green
    (0.800, 0.475, 0.655),  # reddish purple
    (0.000, 0.447, 0.698),  # blue
    (0.902, 0.624, 0.000),  # orange
)


class ValidationImages:
    """Show the sequences, the truth and the prediction of the first validation case in TensorBoard.

    The slice is the one with most foreground in the truth, so the pictures of a run can be compared. They are drawn on
    the first epoch, on every multiple of ``every``, and on the last, where validation runs then. The validation loader
    must not shuffle.

    Args:
        log: the run's log; its writer takes the pictures.
        validator: the evaluator that validates; its output holds ``image`` (M, H, W, D), ``label`` (1, H, W, D) with
            classes, and ``pred``, a tensor or a dict with one under ``fusion``: scores of K classes or, with one
            channel, classes. Two spatial dimensions will do too.
        modalities: titles, in the order of the image's channels.
        every: epochs from picture to picture.
        class_names: names of the classes 1, 2, ... for the legend, the background left out; None: ``class 1``, ...
            Names that are not as many as the network's classes are those of other data: that is logged, and the legend
            has numbers.

    Raises:
        ValueError: where ``every`` is below 1.

    Example:
        >>> from monai.engines import SupervisedEvaluator
        >>> evaluator = SupervisedEvaluator(torch.device("cpu"), [], network=torch.nn.Identity())
        >>> images = ValidationImages(RunLog("runs/one"), evaluator, modalities=["flair", "t1ce"], every=10)
    """

    def __init__(
        self,
        log: RunLog,
        validator: Evaluator,
        *,
        modalities: Sequence[str],
        every: int = 5,
        class_names: Sequence[str] | None = None,
    ) -> None:
        if every < 1:
            raise ValueError(f"every must be at least 1, got {every}")
        self.log = log
        self.validator = validator
        self.modalities = tuple(modalities)
        self.every = every
        self.class_names = None if class_names is None else ensure_tuple(class_names)

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
        classes = classes_of(pred)
        names = self._names(_fusion(pred).shape[0] - 1, _highest_class(label, classes))
        figure = comparison_figure(image, label, classes, titles=self.modalities, class_names=names)
        self.log.writer.add_figure("validation", figure, trainer.state.iteration)

    def _names(self, scored: int, highest: int) -> tuple[str, ...]:
        """Names for the classes that have scores or, where there are none, for those in sight.

        A wrong name in a picture is worse than none, and no reason to end a run after its first epoch.
        """
        names = self.class_names
        if names is not None and (len(names) == scored if scored else len(names) >= highest):
            return names
        if names is not None:
            logger.warning(
                f"class_names has {len(names)} names ({', '.join(names)}), expected {scored or highest}, one a class "
                "besides the background: pictures show numbers"
            )
        return numbered(max(scored, highest))


def classes_of(pred: Tensor | Mapping[str, Tensor]) -> Tensor:
    """Return the classes (1, ...) that scores (K, ...) choose; a dict's ``fusion`` stands for it."""
    tensor = _fusion(pred)
    return tensor if tensor.shape[0] == 1 else tensor.argmax(dim=0, keepdim=True)


def class_colours(count: int) -> list[Colour]:
    """Return a colour for each of the classes 1 to ``count``.

    Up to seven are the first of :data:`CLASS_COLOURS`, so a class keeps its colour. More classes share out matplotlib's
    viridis, whose brightness tells them apart; beyond about twelve, neighbours look alike to anybody.

    Example:
        >>> class_colours(2) == list(CLASS_COLOURS[:2]), len(set(class_colours(20)))
        (True, 20)
    """
    if count <= len(CLASS_COLOURS):
        return list(CLASS_COLOURS[:count])
    shades = colormaps["viridis"](np.linspace(0, 1, count))
    return [(float(red), float(green), float(blue)) for red, green, blue, _ in shades]


def numbered(count: int) -> tuple[str, ...]:
    """Return names for classes that have none.

    Example:
        >>> numbered(2)
        ('class 1', 'class 2')
    """
    return tuple(f"class {index}" for index in range(1, count + 1))


def comparison_figure(
    image: Tensor, label: Tensor, pred: Tensor, *, titles: Sequence[str], class_names: Sequence[str] | None = None
) -> Figure:
    """Draw the sequences of a slice beside its true and its predicted classes, laid over the first sequence.

    Args:
        image: (M, H, W) or (M, H, W, D).
        label: true classes, (1, H, W) or (1, H, W, D).
        pred: predicted classes, shaped as ``label``.
        titles: one for each sequence.
        class_names: names of the classes 1, 2, ... for the legend; None: ``class 1`` and so on up to the highest class
            in ``label`` and ``pred``.

    Returns:
        A figure of M + 2 panels. Of a volume, the slice with most foreground in the truth is shown.

    Raises:
        ValueError: where the number of titles is not that of the sequences, or there is a class without a name.
    """
    if len(titles) != image.shape[0]:
        raise ValueError(f"an image of {image.shape[0]} channels needs as many titles, got {', '.join(titles)}")
    highest = _highest_class(label, pred)
    names = numbered(highest) if class_names is None else tuple(class_names)
    if len(names) < highest:
        raise ValueError(f"class {highest} has no name, got {len(names)}: {', '.join(names)}")
    colours = class_colours(len(names))
    slices, truth, found = (_to_slice(t, label) for t in (image, label, pred))
    greys = [_grey(channel) for channel in slices]
    panels = [*greys, _overlay(greys[0], truth[0], colours), _overlay(greys[0], found[0], colours)]
    figure = Figure(figsize=(1.8 * len(panels), 2.3), dpi=100, layout="constrained")
    for axes, panel, title in zip(
        figure.subplots(1, len(panels)), panels, [*titles, "truth", "prediction"], strict=True
    ):
        axes.imshow(np.rot90(panel), interpolation="nearest")
        axes.set_title(title, fontsize=9)
        axes.axis("off")
    handles = [Patch(color=colour, label=name) for colour, name in zip(colours, names, strict=True)]
    if handles:
        columns = min(len(handles), 3 * len(panels) // 2)
        figure.legend(handles=handles, loc="outside lower center", ncols=columns, fontsize=8, frameon=False)
    return figure


def _fusion(pred: Tensor | Mapping[str, Tensor]) -> Tensor:
    return pred["fusion"] if isinstance(pred, Mapping) else pred


def _highest_class(*maps: Tensor) -> int:
    return max(int(classes.max()) for classes in maps)


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
        foreground = (label[0] > 0).sum(dim=(0, 1))
        tensor = tensor[..., int(foreground.argmax()) if foreground.any() else tensor.shape[-1] // 2]
    return torch.as_tensor(tensor).detach().float().cpu().numpy()


def _grey(channel: np.ndarray) -> np.ndarray:
    low, high = np.percentile(channel, (1, 99.5))
    grey = np.clip((channel - low) / max(high - low, 1e-6), 0, 1)
    return np.repeat(grey[..., None], 3, axis=-1)


def _overlay(grey: np.ndarray, classes: np.ndarray, colours: Sequence[Colour], opacity: float = 0.55) -> np.ndarray:
    picture = grey.copy()
    for index, colour in enumerate(colours, start=1):
        inside = classes == index
        picture[inside] = (1 - opacity) * picture[inside] + opacity * np.asarray(colour)
    return picture
