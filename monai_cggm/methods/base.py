# SPDX-License-Identifier: Apache-2.0
"""What every balancing method shares: it watches one light classifier a modality while a stock trainer trains."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import ignite.distributed as idist
import torch
from monai.engines import SupervisedTrainer
from monai.engines.utils import IterationEvents
from monai.utils import CommonKeys
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn.modules.dropout import _DropoutNd

from monai_cggm.batches import FUSED, PRESENT, samples_in
from monai_cggm.handlers.checkpoint import unwrapped
from monai_cggm.handlers.clip import unscale_once
from monai_cggm.methods.capture import Capture, detached, let_in
from monai_cggm.methods.direction import cosines, head_gradient
from monai_cggm.methods.samples import mask_in, mean_loss, rows_with
from monai_cggm.methods.watch import Watch, check_trainer, refuse_compiled
from monai_cggm.metrics.epsilon import Epsilon

logger = logging.getLogger(__name__)

#: layers whose weight gradient has the closed form of :func:`monai_cggm.methods.direction.head_gradient`
Head = nn.Linear | nn.Conv1d | nn.Conv2d | nn.Conv3d

#: the name under which the network's head is captured
FUSION_HEAD = "fusion"


@dataclass
class Step:
    """What is known of one training step once the task's loss is there; losses are this rank's, the rest all ranks'.

    Attributes:
        task_loss: the trainer's loss, a scalar with its graph.
        losses: each classifier's loss, ``(M,)``; their graph ends at the detached features.
        epsilon: ε of each modality, ``(M,)``, no graph.
        delta: Δε, ``(M,)``, no graph (equation 6).
        fusion_gradient: g_F, the gradient of the head's weight, ``(n,)``; differentiable if the method asked for it.
        unimodal_gradients: g_i, the gradient of each classifier's last weight, ``(M, n)``, no graph.
        logits: the network's prediction, with its graph.
        predictions: each classifier's, with their graphs.
        target: what both are compared with.
        inputs: what each encoder was given, by modality.
        features: what each encoder gave back, by modality, with its graph.
        present: which modalities each sample has, boolean ``(B, M)`` on the CPU; None where all are there.
        fused: which of them the prediction was made from, boolean ``(B, M)`` on the CPU; None where from all.
    """

    task_loss: Tensor
    losses: Tensor
    epsilon: Tensor
    delta: Tensor
    fusion_gradient: Tensor
    unimodal_gradients: Tensor
    logits: Tensor
    predictions: list[Tensor]
    target: Tensor
    inputs: Mapping[str, Any]
    features: Mapping[str, Any]
    present: Tensor | None
    fused: Tensor | None


#: a term that a part adds to the loss
LossTerm = Callable[[Step], Tensor]


class UnimodalObserver(Watch):
    r"""Train a light classifier on each modality's detached features, measure, and change nothing else.

    This is the state ``observe``: the paper's "without CGGM" curves (figures 2 and 6, Table 5) come from it, and the
    network's weights equal those of joint training bit for bit. Balancing methods extend it by ``extra_loss`` and
    ``modulate``; parts that combine with any of them (:class:`AuxiliaryLosses`, :class:`Distillation`) are handlers of
    their own that set ``unimodal_weights``, ``task_weight`` and ``loss_terms``.

    It attaches to MONAI's own ``SupervisedTrainer`` by three of its events: after ``LOSS_COMPLETED`` it runs the
    classifiers :math:`\hat y_{m_i} = f_i(h_i)` (equation 5) and adds their losses, which reach only the classifiers,
    to the loss that is about to be differentiated; after ``BACKWARD_COMPLETED`` it sees the gradients; after
    ``MODEL_COMPLETED`` it leaves ``trainer.state.scalars`` for whoever logs. The parts are found by forward hooks, so
    the network stays a plain module that returns logits.

    Args:
        network: the network that is trained, possibly in ``DistributedDataParallel``.
        classifiers: a module whose ``forward(features, size)`` takes each modality's encoder output (and, if the
            target has spatial axes, their size) and returns each modality's prediction in a dict.
        metric: ε, for example :class:`monai_cggm.metrics.RegionDice`.
        loss_function: loss of a classifier; default: the trainer's.
        encoders: the encoder of each modality; default: ``network.encoders``.
        head: the network's last linear layer or 1×1 convolution; default: ``network.head``.
        classifier_heads: the like of each classifier; default: ``classifiers.heads``.

    A case that lacks a modality (``present`` in the batch) counts for the classifiers of those it has: in their losses
    and in ε. Under several processes a classifier's loss is then the mean of the processes' means.

    Attributes:
        unimodal_weights: share of each classifier's gradient that goes on into its encoder, ``(M,)``; None: nothing
            does, the features are detached.
        task_weight: factor of the task's loss and of what the method adds to it.
        loss_terms: further terms of the loss, by name; where ``task_weight`` is 0, as in a warm-up of the classifiers,
            they are logged and do not act.
        balance: the factors that a steering method gave the encoders last, ``(M,)``; None without such a method.
        step: what is known of the current step, between ``LOSS_COMPLETED`` and ``BACKWARD_COMPLETED``; else None.

    Raises:
        ValueError: for parts that are missing, empty, overlapping or without gradient, modalities that differ between
            encoders and classifiers, and heads of another shape than the network's.

    Example:
        >>> from monai_cggm.metrics import RegionDice
        >>> from monai_cggm.networks import MultimodalSegmenter, UnimodalClassifiers
        >>> encoder = {"backbone": "resnet18", "width": 8}
        >>> network = MultimodalSegmenter(["flair", "t1ce"], num_classes=2, encoder=encoder)
        >>> classifiers = UnimodalClassifiers.for_network(network)
        >>> observer = UnimodalObserver(network, classifiers, RegionDice({"lesion": [1]}, num_classes=2))
        >>> observer.modalities
        ('flair', 't1ce')
    """

    #: whether g_F must be differentiable again
    differentiable_fusion_gradient = False

    #: whether the method itself says how much the classifiers' losses count, so that no other part may
    weighs_losses = False

    def __init__(
        self,
        network: nn.Module,
        classifiers: nn.Module,
        metric: Epsilon,
        *,
        loss_function: Callable[[Tensor, Tensor], Tensor] | None = None,
        encoders: Mapping[str, nn.Module] | None = None,
        head: nn.Module | None = None,
        classifier_heads: Mapping[str, nn.Module] | None = None,
    ) -> None:
        refuse_compiled(network)
        plain, plain_classifiers = unwrapped(network), unwrapped(classifiers)
        self.network = network
        self.classifiers = classifiers
        self.encoders = _named_parts(encoders, plain, "encoders")
        self.head = _as_head(getattr(plain, "head", None) if head is None else head, "the network's head")
        self.classifier_heads = {
            modality: _as_head(part, f"the classifier head of {modality!r}")
            for modality, part in _named_parts(classifier_heads, plain_classifiers, "heads").items()
        }
        _check_parts(plain, self.encoders, self.head, self.classifier_heads)
        if {id(p) for p in plain.parameters()} & {id(p) for p in plain_classifiers.parameters()}:
            raise ValueError("network and classifiers share a parameter: classifier losses would train the network")
        super().__init__(tuple(self.encoders), metric, loss_function)
        self.unimodal_weights: Tensor | None = None
        self.task_weight = 1.0
        self.loss_terms: dict[str, LossTerm] = {}
        self.balance: Tensor | None = None
        self.step: Step | None = None
        self._encoder_parameters = {m: list(e.parameters()) for m, e in self.encoders.items()}
        self._features = Capture(self.encoders)
        self._heads = Capture({FUSION_HEAD: self.head, **self.classifier_heads}, full_precision=True)
        self._random_state = _own_random_state(classifiers)
        self._heads_are_last = False

    # ------------------------------------------------------------------ what a method adds

    def extra_loss(self, step: Step) -> Tensor | None:
        """Return a term for the loss, or None. Called once the step's measures are known, before the backward pass."""
        return None

    def modulate(self, step: Step) -> None:
        """Change the encoders' gradients in place. Called after the backward pass, gradients unscaled."""

    # ------------------------------------------------------------------ events

    def attach(self, engine: SupervisedTrainer) -> None:
        """Attach to a trainer. Clipping must be attached after it, so that it sees modulated gradients."""
        super().attach(engine)
        engine.add_event_handler(IterationEvents.BACKWARD_COMPLETED, self._after_backward)

    def _start(self, engine: SupervisedTrainer) -> None:
        why = "BACKWARD_COMPLETED fires on every mini-batch, and scaling accumulated gradients each time would compound"
        check_trainer(engine, {**self.encoders, "classifiers": self.classifiers}, why)
        self._features.install()
        self._heads.install()
        engine.logger.info(f"attached: {self!r}")

    def _listen(self, engine: SupervisedTrainer) -> None:
        self._features.active = self._heads.active = True

    def _after_loss(self, engine: SupervisedTrainer) -> None:
        output = engine.state.output
        task_loss = output[CommonKeys.LOSS]
        self._scalars = {"loss/task": task_loss.detach()}
        # where the fusion ran several times over one encoding, the first rows are those of the samples as they are
        samples = samples_in(output[CommonKeys.IMAGE])
        step = self._observe(
            task_loss,
            output[CommonKeys.PRED][:samples],
            output[CommonKeys.LABEL][:samples],
            self.loss_function or engine.loss_function,
            mask_in(engine.state.batch, PRESENT, samples),
            mask_in(engine.state.batch, FUSED, samples),
        )
        self._features.active = self._heads.active = False
        self._add_scalars("loss", step.losses.detach())
        self._add_scalars("epsilon", step.epsilon)
        self._add_scalars("cosine", cosines(step.fusion_gradient.detach(), step.unimodal_gradients))
        extra = self.extra_loss(step)
        loss = task_loss if extra is None else task_loss + extra
        loss = (loss if self.task_weight == 1.0 else self.task_weight * loss) + step.losses.sum()
        for name, term in self.loss_terms.items():
            value = term(step)
            self._scalars[f"loss/{name}"] = value.detach()
            loss = loss + value if self.task_weight else loss
        output[CommonKeys.LOSS] = loss
        self.epsilon = step.epsilon
        self.step = step

    def _after_backward(self, engine: SupervisedTrainer) -> None:
        if self.step is None:
            raise RuntimeError("BACKWARD_COMPLETED came without LOSS_COMPLETED: is this MONAI's SupervisedTrainer?")
        unscale_once(engine)
        self._add_scalars("gradient_norm", self._encoder_gradient_norms())
        self.modulate(self.step)
        # the step's graph is not needed any more
        self.step = None
        self._features.clear()
        self._heads.clear()

    def _release(self) -> None:
        self._features.remove()
        self._heads.remove()
        self.step = None

    # ------------------------------------------------------------------ one step

    def _observe(
        self,
        task_loss: Tensor,
        logits: Tensor,
        target: Tensor,
        loss_function: Callable[..., Tensor],
        present: Tensor | None,
        fused: Tensor | None,
    ) -> Step:
        missing = [m for m in self.modalities if m not in self._features.outputs]
        if missing or FUSION_HEAD not in self._heads.outputs:
            parts = [
                *(f"encoder {m!r}" for m in missing),
                *(["head"] if FUSION_HEAD not in self._heads.outputs else []),
            ]
            raise RuntimeError(f"these parts did not run in the training step's forward pass: {', '.join(parts)}")
        predictions = self._classify(target)
        seen = [rows_with(p, target, present, i) for i, p in enumerate(predictions)]
        losses = torch.stack([mean_loss(loss_function, *pair) for pair in seen])
        epsilon, before = self._measure(predictions if present is None else None, seen, target)
        deltas = self._output_gradients(losses)
        from_heads = _from_heads(losses, [self._heads.outputs[m] for m in self.modalities], deltas)
        if not self._heads_are_last:
            _refuse_parameters_after_heads(self.classifiers, losses, from_heads)
            self._heads_are_last = True
        return Step(
            task_loss=task_loss,
            losses=from_heads,
            epsilon=epsilon,
            delta=epsilon - before,
            fusion_gradient=self._fusion_gradient(task_loss),
            unimodal_gradients=self._unimodal_gradients(deltas),
            logits=logits,
            predictions=predictions,
            target=target,
            inputs=self._features.inputs,
            features=self._features.outputs,
            present=present,
            fused=present if fused is None else fused,
        )

    def _classify(self, target: Tensor) -> list[Tensor]:
        if self.unimodal_weights is None:
            features = {m: detached(self._features.outputs[m]) for m in self.modalities}
        else:
            weights = dict(zip(self.modalities, self.unimodal_weights, strict=True))
            features = {m: let_in(self._features.outputs[m], weights[m]) for m in self.modalities}
        self.classifiers.train()
        with self._own_random_numbers():
            predictions = self.classifiers(features, *((target.shape[2:],) if target.ndim > 2 else ()))
        return [predictions[m] for m in self.modalities]

    def _fusion_gradient(self, task_loss: Tensor) -> Tensor:
        output = self._heads.outputs[FUSION_HEAD]
        (delta,) = torch.autograd.grad(
            task_loss, output, create_graph=self.differentiable_fusion_gradient, retain_graph=True
        )
        gradient = self._head_gradient(delta, FUSION_HEAD, self.head)
        return gradient if self.differentiable_fusion_gradient else gradient.detach()

    def _output_gradients(self, losses: Tensor) -> list[Tensor]:
        """Return the gradient of each classifier's loss at the output of its head."""
        outputs = [self._heads.outputs[m] for m in self.modalities]
        return list(torch.autograd.grad(losses.sum(), outputs, retain_graph=True))

    def _unimodal_gradients(self, deltas: Sequence[Tensor]) -> Tensor:
        gradients = [
            self._head_gradient(d, m, self.classifier_heads[m]) for d, m in zip(deltas, self.modalities, strict=True)
        ]
        return torch.stack(gradients).detach()

    def _head_gradient(self, delta: Tensor, name: str, head: Head) -> Tensor:
        local = head_gradient(delta, self._heads.inputs[name], channels_last=isinstance(head, nn.Linear))
        return _mean_over_ranks(local)

    def _encoder_gradient_norms(self) -> Tensor:
        norms = []
        for parameters in self._encoder_parameters.values():
            gradients = [p.grad for p in parameters if p.grad is not None]
            norms.append(torch.nn.utils.get_total_norm(gradients))
        return torch.stack(norms)

    @contextlib.contextmanager
    def _own_random_numbers(self) -> Iterator[None]:
        """Let dropout in a classifier draw from numbers of its own, so that watching does not change the network."""
        if self._random_state is None:
            yield
            return
        device = next(self.classifiers.parameters()).device
        with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
            _set_random_state(device, self._random_state)
            yield
            self._random_state = _get_random_state(device)

    # ------------------------------------------------------------------ checkpoints

    def state_dict(self) -> dict[str, Any]:
        """Return what a resumed run needs to go on exactly: the last ε, and the classifiers' random state if any."""
        state = super().state_dict()
        if self._random_state is not None:
            state["random_state"] = self._random_state
        return state

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore :meth:`state_dict`.

        Raises:
            ValueError: if it comes from a run with other modalities or another order of them.
        """
        super().load_state_dict(state)
        self._random_state = state.get("random_state", self._random_state)


def needs_observer(observer: object, part: object) -> None:
    """Refuse a part that is given no observer, as a configuration does whose method is ``null``."""
    if not isinstance(observer, UnimodalObserver):
        raise ValueError(
            f"{type(part).__name__} needs a method or a UnimodalObserver, which run the classifiers, got {observer!r}; "
            "with joint training choose methods/observe.yaml in place of methods/joint.yaml"
        )


class _FromHead(torch.autograd.Function):
    """A classifier's loss, whose gradient at the output of its head is known: the loss is differentiated once."""

    @staticmethod
    def forward(ctx: Any, loss: Tensor, output: Tensor, delta: Tensor) -> Tensor:
        ctx.save_for_backward(delta)
        return loss.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[None, Tensor, None]:
        (delta,) = ctx.saved_tensors
        return None, gradient * delta, None


def _from_heads(losses: Tensor, outputs: Sequence[Tensor], deltas: Sequence[Tensor]) -> Tensor:
    each = [_FromHead.apply(*triple) for triple in zip(losses.detach(), outputs, deltas, strict=True)]
    return torch.stack(each)


def _refuse_parameters_after_heads(classifiers: nn.Module, losses: Tensor, from_heads: Tensor) -> None:
    """Refuse classifiers in which a loss reaches parameters past the head: these would not be trained."""
    named = {n: p for n, p in classifiers.named_parameters() if p.requires_grad}
    whole, known = (
        torch.autograd.grad(each.sum(), list(named.values()), retain_graph=True, allow_unused=True)
        for each in (losses, from_heads)
    )
    past = [name for name, w, k in zip(named, whole, known, strict=True) if w is not None and k is None]
    if past:
        raise ValueError(
            f"the classifiers' losses reach {', '.join(past)} by a way that does not go through the heads, which must "
            "be the classifiers' last layers"
        )


def _mean_over_ranks(local: Tensor) -> Tensor:
    """Give every rank the mean of a gradient, and keep the local graph.

    The value is the mean; the derivative is the local one. DDP averages parameter gradients over ranks afterwards,
    which completes the derivative of the mean: no differentiable all-reduce is needed.
    """
    world = idist.get_world_size()
    if world == 1:
        return local
    mean = idist.all_reduce(local.detach().clone()) / world
    return local + (mean - local).detach()


def _named_parts(parts: Mapping[str, nn.Module] | None, owner: nn.Module, attribute: str) -> dict[str, nn.Module]:
    found = getattr(owner, attribute, None) if parts is None else parts
    if isinstance(found, (Mapping, nn.ModuleDict)) and len(found):
        return dict(found.items())
    where = f"`{attribute}=`" if parts is not None else f"`{type(owner).__name__}.{attribute}`"
    raise ValueError(f"{where} must name one module a modality, found {found!r}")


def _as_head(found: object, name: str) -> Head:
    if isinstance(found, nn.Linear):
        return found
    if (
        isinstance(found, (nn.Conv1d, nn.Conv2d, nn.Conv3d))
        and found.groups == 1
        and {*found.kernel_size, *found.stride} == {1}
        and set(found.padding) == {0}
    ):
        return found
    raise ValueError(f"{name} must be a linear layer or a 1×1 convolution, found {found!r}")


def _check_parts(
    network: nn.Module, encoders: Mapping[str, nn.Module], head: Head, classifier_heads: Mapping[str, Head]
) -> None:
    if set(encoders) != set(classifier_heads):
        raise ValueError(f"encoders are for {sorted(encoders)}, classifiers for {sorted(classifier_heads)}")
    owner: dict[int, str] = {}
    inside = {id(p) for p in network.parameters()}
    for name, module in {**encoders, "head": head}.items():
        parameters = [p for p in module.parameters() if p.requires_grad]
        if not parameters:
            raise ValueError(f"{name!r} has no parameter that takes a gradient: nothing of it could be modulated")
        for parameter in parameters:
            if id(parameter) not in inside:
                raise ValueError(f"{name!r} has a parameter that is not the network's")
            if owner.setdefault(id(parameter), name) != name:
                raise ValueError(f"{name!r} and {owner[id(parameter)]!r} share a parameter: whose gradient is it?")
    for name, classifier_head in classifier_heads.items():
        if classifier_head.weight.shape != head.weight.shape:
            raise ValueError(
                f"the classifier head of {name!r} has weight {tuple(classifier_head.weight.shape)}, the network's head "
                f"{tuple(head.weight.shape)}: their gradients can only be compared if they are alike"
            )


def _own_random_state(classifiers: nn.Module) -> Tensor | None:
    if not any(isinstance(m, _DropoutNd) and m.p > 0 for m in classifiers.modules()):
        return None
    device = next(classifiers.parameters()).device
    return _get_random_state(device)


def _get_random_state(device: torch.device) -> Tensor:
    return torch.cuda.get_rng_state(device) if device.type == "cuda" else torch.get_rng_state()


def _set_random_state(device: torch.device, state: Tensor) -> None:
    if device.type == "cuda":
        torch.cuda.set_rng_state(state.cpu(), device)
    else:
        torch.set_rng_state(state.cpu())
