# SPDX-License-Identifier: Apache-2.0
"""Gradients of the classifiers and of the fusion module given one modality, for figure 4 of the paper."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import ignite.distributed as idist
import numpy as np
import torch
from ignite.engine import Events
from monai.engines import SupervisedTrainer
from monai.engines.utils import IterationEvents
from monai.utils import CommonKeys
from torch import Tensor
from torch.func import functional_call

from monai_cggm.batches import Inputs, rows_of
from monai_cggm.files import atomic_path
from monai_cggm.handlers.checkpoint import unwrapped

if TYPE_CHECKING:
    from monai_cggm.methods.base import Step, UnimodalObserver

logger = logging.getLogger(__name__)


class GradientRecorder:
    r"""Keep the unimodal gradients of the classifiers and of the fusion module, every few iterations.

    The method takes the gradient :math:`g_i` of a classifier's last layer for what the fusion module's gradient would
    be if it saw modality i alone. Section 4.4 of the paper checks that: it feeds :math:`h_i` of one modality into the
    fusion module and compares. This handler records both sides for ``monai-cggm report``, which draws them (figure 4):

    * ``classifier``: :math:`g_i`, as the method measured it in this step.
    * ``fusion``: the gradient of the task's loss with respect to the weight of the network's *head*, when the encoders'
      outputs of all modalities but i are zero. The head is the layer that the cosine of equation 12 is about, and both
      vectors have its length, so they can lie in one picture; a gradient at the fusion's input would have another
      length. It needs nothing of the network but encoders and a head, so it works for a user's own.

    The second one costs a further forward pass of the network for each modality, in float32, and a backward pass that
    ends at the encoders' outputs.
    Nothing of it reaches training: no gradient is added, batch norm's running statistics are put aside, and random
    numbers are drawn from a copy of the generator. Samples that lack a modality do not count for its gradient.

    Long vectors are thinned out: of ``n`` numbers, ``max_dimensions`` are kept, the same ones in every record, drawn
    once with a fixed seed. Cosines of the kept parts estimate the whole vectors' cosines.

    ``run_dir/gradients.npz`` holds ``iteration`` ``(R,)``, ``classifier`` and ``fusion`` ``(R, M, d)`` in float32,
    ``modalities`` ``(M,)``, ``dimensions`` ``(d,)`` (which numbers were kept) and ``size`` (``n``). It is replaced as a
    whole at the end of each epoch, so it fits the checkpoints: a resumed run drops records after the iteration that it
    starts from and goes on. It loads with ``numpy.load`` as it is, without pickles.

    Attach it after the method and after :class:`Checkpoints`. Under several processes gradients are means over them,
    and the first one writes.

    Args:
        method: the observer or balancing method; ``None`` (joint training) attaches nothing.
        run_dir: the run's folder.
        every: iterations from record to record; ``None`` attaches nothing.
        max_dimensions: most numbers of a gradient to keep. 512 make 16 kB a record with four modalities.

    Raises:
        ValueError: for ``every`` or ``max_dimensions`` below 1; when training starts, where the folder's records are of
            other modalities or another size than this run's.
        RuntimeError: in training, where it was attached before the method.

    Example:
        >>> GradientRecorder(None, "runs/joint").attach(None)  # joint training has no classifiers: nothing happens
    """

    def __init__(
        self,
        method: UnimodalObserver | None,
        run_dir: str | Path,
        *,
        every: int | None = 20,
        max_dimensions: int = 512,
    ) -> None:
        if every is not None and every < 1:
            raise ValueError(f"every must be at least 1, or None for no records, got {every}")
        if max_dimensions < 1:
            raise ValueError(f"max_dimensions must be at least 1, got {max_dimensions}")
        self.method = method
        self.path = Path(run_dir) / "gradients.npz"
        self.every = every
        self.max_dimensions = max_dimensions
        self._classifier: Tensor | None = None
        self._present: Tensor | None = None
        self._records: list[tuple[int, np.ndarray, np.ndarray]] = []

    def attach(self, engine: Any) -> None:
        """Attach to a trainer, after the method."""
        if self.method is None or self.every is None:
            return
        engine.add_event_handler(Events.STARTED, self._start, self.method)
        engine.add_event_handler(IterationEvents.LOSS_COMPLETED, self._note, self.method)
        engine.add_event_handler(IterationEvents.BACKWARD_COMPLETED, self._record, self.method)
        engine.add_event_handler(Events.EPOCH_COMPLETED, self._write, self.method)

    # ------------------------------------------------------------------ events

    def _start(self, engine: SupervisedTrainer, method: UnimodalObserver) -> None:
        self._records = []
        if idist.get_rank() != 0 or not self.path.is_file():
            return
        if engine.state.iteration == 0:  # another run's, in the same folder
            self.path.unlink()
            return
        with np.load(self.path, allow_pickle=False) as stored:
            modalities, kept = stored["modalities"].tolist(), stored["dimensions"]
            arrays = stored["iteration"].tolist(), stored["classifier"], stored["fusion"]
        expected = self._dimensions(method.head.weight.numel())
        if modalities != list(method.modalities) or not np.array_equal(kept, expected):
            raise ValueError(
                f"{self.path} has {len(kept)} numbers a gradient of {', '.join(modalities)}; this run would add "
                f"{len(expected)} of {', '.join(method.modalities)}: use the same settings, or remove the file"
            )
        done = engine.state.iteration
        self._records = [record for record in zip(*arrays, strict=True) if record[0] <= done]

    def _note(self, engine: SupervisedTrainer, method: UnimodalObserver) -> None:
        if self.every is None or engine.state.iteration % self.every:
            return
        step: Step | None = method.step
        if step is None:
            raise RuntimeError("GradientRecorder found no step of the method: attach it after the method")
        self._classifier, self._present = step.unimodal_gradients.detach(), step.present

    def _record(self, engine: SupervisedTrainer, method: UnimodalObserver) -> None:
        if self._classifier is None:  # no record is due
            return
        fusion = torch.stack([self._fusion_gradient(engine, method, i) for i in range(len(method.modalities))])
        classifier, self._classifier = self._classifier, None
        if idist.get_rank() != 0:
            return
        kept = torch.from_numpy(self._dimensions(classifier.shape[1])).to(classifier.device)
        pair = torch.stack([classifier.to(fusion), fusion])[..., kept].float().cpu().numpy()
        self._records.append((engine.state.iteration, pair[0], pair[1]))

    def _write(self, engine: SupervisedTrainer, method: UnimodalObserver) -> None:
        if idist.get_rank() != 0 or not self._records:
            return
        iterations, classifier, fusion = zip(*self._records, strict=True)
        size = method.head.weight.numel()
        with atomic_path(self.path) as temporary:
            np.savez_compressed(
                temporary,
                iteration=np.asarray(iterations),
                classifier=np.stack(classifier),
                fusion=np.stack(fusion),
                modalities=np.asarray(method.modalities),
                dimensions=self._dimensions(size),
                size=np.asarray(size),
            )

    # ------------------------------------------------------------------ one gradient

    def _fusion_gradient(self, engine: SupervisedTrainer, method: UnimodalObserver, modality: int) -> Tensor:
        """The head's gradient where the network sees one modality's features, and zeros for the rest."""
        image, label = engine.state.output[CommonKeys.IMAGE], engine.state.output[CommonKeys.LABEL]
        batch = len(label)
        if self._present is not None:
            rows = self._present[:, modality].nonzero().squeeze(1).to(label.device)
            image, label = rows_of(image, rows), label[rows]
        # batch norm may not take a single sample where the whole batch has more
        if len(label) < min(2, batch):
            gradient = torch.zeros(method.head.weight.numel(), device=label.device)
        else:
            gradient = _alone(engine, method, method.modalities[modality], image, label)
        if idist.get_world_size() > 1:
            gradient = torch.as_tensor(idist.all_reduce(gradient)) / idist.get_world_size()
        return gradient

    def _dimensions(self, size: int) -> np.ndarray:
        if size <= self.max_dimensions:
            return np.arange(size)
        return np.sort(np.random.default_rng(0).choice(size, self.max_dimensions, replace=False))


def _alone(engine: SupervisedTrainer, method: UnimodalObserver, modality: str, image: Inputs, label: Tensor) -> Tensor:
    network = unwrapped(method.network)
    device = label.device
    # batch norm writes its running statistics into these
    buffers = {name: buffer.clone() for name, buffer in network.named_buffers()}
    generators = [device] if device.type == "cuda" else []
    with (
        _only(method.encoders, modality),
        torch.random.fork_rng(devices=generators),
        torch.autocast(device.type, enabled=False),
        torch.enable_grad(),
    ):
        prediction = engine.inferer(cast(Any, image), lambda x: functional_call(network, buffers, (x,)))
        loss = engine.loss_function(prediction, label).mean()
        (gradient,) = torch.autograd.grad(loss, method.head.weight)
    return gradient.detach().flatten()


@contextlib.contextmanager
def _only(encoders: Mapping[str, torch.nn.Module], modality: str) -> Iterator[None]:
    """Let the encoders give zeros, but for one of them, and no graph."""

    def change(name: str) -> Any:
        return lambda _module, _inputs, output: _features(output, keep=name == modality)

    handles = [encoder.register_forward_hook(change(name)) for name, encoder in encoders.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _features(output: Any, *, keep: bool) -> Any:
    if isinstance(output, Tensor):  # a mask of padding says the same of zeros
        return output.detach() if keep or not output.is_floating_point() else torch.zeros_like(output)
    if isinstance(output, Mapping):
        return {key: _features(value, keep=keep) for key, value in output.items()}
    return type(output)(_features(value, keep=keep) for value in output)
