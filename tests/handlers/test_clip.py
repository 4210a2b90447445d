# SPDX-License-Identifier: Apache-2.0
import copy

import pytest
import torch
from monai.engines import SupervisedTrainer
from monai.engines.utils import IterationEvents
from torch import nn

from monai_cggm.handlers import ClipGradients, unscale_once
from tests.methods import toy


class Two(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(3, 4), nn.Linear(4, 1)

    def forward(self, x):
        return self.b(torch.tanh(self.a(x)))


def data(batches=4):
    generator = torch.Generator().manual_seed(1)
    return [
        {"image": torch.randn(5, 3, generator=generator), "label": 10 * torch.randn(5, 1, generator=generator)}
        for _ in range(batches)
    ]


def trainer(network, handlers, batches=4, **kwargs):
    return SupervisedTrainer(
        device=torch.device("cpu"),
        max_epochs=1,
        train_data_loader=data(batches),
        network=network,
        optimizer=torch.optim.SGD(network.parameters(), lr=0.1),
        loss_function=nn.MSELoss(),
        train_handlers=handlers,
        decollate=False,
        **kwargs,
    )


def network():
    torch.manual_seed(0)
    return Two()


def by_hand(net, max_norm, batches=4, accumulate=1):
    """Plain PyTorch: backward, clip each part by itself, step."""
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    for i, batch in enumerate(data(batches)):
        if i % accumulate == 0:
            optimizer.zero_grad()
        (nn.functional.mse_loss(net(batch["image"]), batch["label"]) / accumulate).backward()
        if (i + 1) % accumulate == 0 or i + 1 == batches:
            for part in (net.a, net.b):
                torch.nn.utils.clip_grad_norm_(part.parameters(), max_norm)
            optimizer.step()
    return net.state_dict()


def assert_equal(found, expected):
    for key, value in expected.items():
        assert torch.equal(found[key], value), key


@pytest.mark.parametrize("max_norm", [0.5, 3.0, 1e6])
def test_equals_clipping_by_hand(max_norm):
    net = network()
    trainer(net, [ClipGradients([net.a, net.b], max_norm)]).run()
    assert_equal(net.state_dict(), by_hand(network(), max_norm))


def test_parts_are_clipped_apart():
    together, apart = network(), network()
    trainer(together, [ClipGradients([together], 0.5)], batches=1).run()
    trainer(apart, [ClipGradients([apart.a, apart.b], 0.5)], batches=1).run()
    assert not torch.equal(together.a.weight, apart.a.weight)
    norm = torch.nn.utils.get_total_norm([p.grad for p in apart.a.parameters()])
    assert norm.item() == pytest.approx(0.5, rel=1e-4)


@pytest.mark.parametrize(("accumulate", "batches"), [(2, 4), (3, 4), (2, 1)])
def test_accumulated_gradients_are_clipped_once_before_the_step(accumulate, batches):
    net = network()
    trainer(net, [ClipGradients([net.a, net.b], 0.5)], batches, accumulation_steps=accumulate).run()
    assert_equal(net.state_dict(), by_hand(network(), 0.5, batches, accumulate))


@pytest.mark.filterwarnings("ignore:.*CUDA is not available")
@pytest.mark.filterwarnings("ignore:.*GradScaler is enabled, but CUDA is not available")
@pytest.mark.filterwarnings("ignore:.*torch.cuda.amp.GradScaler:FutureWarning")
@pytest.mark.parametrize("accumulate", [1, 2])
def test_under_a_loss_scale_the_true_gradients_are_clipped(accumulate):
    net, plain = network(), copy.deepcopy(network())
    seen = []

    class Look:
        """Another handler that wants true gradients, before the one that clips."""

        def attach(self, engine):
            engine.add_event_handler(IterationEvents.BACKWARD_COMPLETED, self)

        def __call__(self, engine):
            if engine.accumulation_steps == 1:
                unscale_once(engine)
                unscale_once(engine)
                seen.append(net.b.weight.grad.norm().item())

    handlers = [toy.ScaleOnCpu(), Look(), ClipGradients([net.a, net.b], 0.5)]
    engine = trainer(net, handlers, amp=True, accumulation_steps=accumulate)
    engine.run()
    assert engine.scaler.get_scale() == 1024.0
    assert_equal(net.state_dict(), by_hand(plain, 0.5, accumulate=accumulate))
    assert accumulate > 1 or (len(seen) == 4 and max(seen) < 100)


def test_unscale_once_without_mixed_precision_does_nothing():
    net = network()
    engine = trainer(net, [])
    engine.add_event_handler(IterationEvents.BACKWARD_COMPLETED, unscale_once)
    engine.run()
    plain = network()
    trainer(plain, []).run()
    assert_equal(net.state_dict(), plain.state_dict())


def test_none_switches_off():
    net, plain = network(), network()
    clip = ClipGradients([net, None], None)
    engine = trainer(net, [clip])
    assert not engine.has_event_handler(clip)
    engine.run()
    trainer(plain, []).run()
    assert_equal(net.state_dict(), plain.state_dict())


@pytest.mark.parametrize("max_norm", [0.0, -1.0, float("nan")])
def test_refuses_a_norm_that_is_not_positive(max_norm):
    with pytest.raises(ValueError, match="max_norm must be positive"):
        ClipGradients([network()], max_norm)


def test_refuses_no_modules():
    with pytest.raises(ValueError, match="nothing to clip"):
        ClipGradients([None], 1.0)
