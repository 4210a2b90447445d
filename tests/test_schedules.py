# SPDX-License-Identifier: Apache-2.0
import io
import math
import warnings

import pytest
import torch
from torch import nn
from torch.optim.lr_scheduler import CosineAnnealingLR, LinearLR, SequentialLR

from monai_cggm.schedules import warmup_cosine


def optimizer(*rates):
    return torch.optim.SGD([{"params": nn.Linear(1, 1).parameters(), "lr": rate} for rate in rates])


def rates_of(opt, schedule, epochs):
    """The rate of every group in every epoch."""
    rates = []
    for _ in range(epochs):
        rates.append([group["lr"] for group in opt.param_groups])
        opt.step()
        schedule.step()
    return rates


def table_7(epoch):
    """The paper's schedule by hand, epoch from 0."""
    if epoch < 10:
        return 4e-4 + (1e-2 - 4e-4) * epoch / 10
    return 1e-3 + (1e-2 - 1e-3) * (1 + math.cos(math.pi * (epoch - 10) / 140)) / 2


def test_the_papers_schedule():
    opt = optimizer(1e-2, 6e-3)
    rates = rates_of(opt, warmup_cosine(opt, epochs=150), 150)
    for epoch, (network, classifiers) in enumerate(rates):
        assert network == pytest.approx(table_7(epoch), rel=1e-12)
        assert classifiers == pytest.approx(0.6 * table_7(epoch), rel=1e-12)
    assert [group["lr"] for group in opt.param_groups] == pytest.approx([1e-3, 6e-4], rel=1e-12)


@pytest.mark.parametrize(("epochs", "warmup"), [(150, 10), (20, 3), (7, 1)])
def test_equals_pytorchs_schedules_in_sequence(epochs, warmup):
    ours, theirs = optimizer(1e-2), optimizer(1e-2)
    schedule = warmup_cosine(ours, epochs=epochs, warmup_epochs=warmup, start_lr=1e-3, final_lr=2e-3)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # SequentialLR calls step with a deprecated argument
        reference = SequentialLR(
            theirs,
            [
                LinearLR(theirs, start_factor=0.1, total_iters=warmup),
                CosineAnnealingLR(theirs, T_max=epochs - warmup, eta_min=2e-3),
            ],
            milestones=[warmup],
        )
        expected = rates_of(theirs, reference, epochs)
    assert torch.allclose(torch.tensor(rates_of(ours, schedule, epochs)), torch.tensor(expected), rtol=1e-5)


def test_without_warm_up_it_starts_at_the_base_rate():
    opt = optimizer(1e-2)
    rates = rates_of(opt, warmup_cosine(opt, epochs=4, warmup_epochs=0), 4)
    assert rates[0] == [1e-2]
    assert rates[2][0] == pytest.approx(1e-3 + 9e-3 / 2)


def test_extended_past_its_end_it_holds_the_final_rate():
    opt = optimizer(1e-2, 6e-3)
    schedule = warmup_cosine(opt, epochs=6, warmup_epochs=2)
    rates_of(opt, schedule, 6)
    file = io.BytesIO()
    torch.save({"optimizer": opt.state_dict(), "schedule": schedule.state_dict()}, file)
    file.seek(0)
    state = torch.load(file, weights_only=True)

    opt = optimizer(1e-2, 6e-3)
    schedule = warmup_cosine(opt, epochs=12, warmup_epochs=2)  # the longer run's plan gives way to the saved one
    opt.load_state_dict(state["optimizer"])
    schedule.load_state_dict(state["schedule"])
    assert torch.allclose(torch.tensor(rates_of(opt, schedule, 6)), torch.tensor([[1e-3, 6e-4]] * 6))


def test_resumed_it_goes_on_as_it_would_have():
    whole = optimizer(1e-2, 6e-3)
    expected = rates_of(whole, warmup_cosine(whole, epochs=9, warmup_epochs=3), 9)
    first = optimizer(1e-2, 6e-3)
    schedule = warmup_cosine(first, epochs=9, warmup_epochs=3)
    rates = rates_of(first, schedule, 4)
    second = optimizer(1e-2, 6e-3)
    resumed = warmup_cosine(second, epochs=9, warmup_epochs=3)
    second.load_state_dict(first.state_dict())
    resumed.load_state_dict(schedule.state_dict())
    assert rates + rates_of(second, resumed, 5) == expected


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"epochs": 0}, "epochs must be at least 1"),
        ({"epochs": 20, "warmup_epochs": -1}, "warmup_epochs at least 0"),
        ({"epochs": 20, "start_lr": 2e-2}, "start_lr must be between 0 and .* 0.01, got 0.02"),
        ({"epochs": 20, "final_lr": -1.0}, "final_lr must be between"),
    ],
)
def test_refuses_what_makes_no_sense(arguments, message):
    with pytest.raises(ValueError, match=message):
        warmup_cosine(optimizer(1e-2), **arguments)


def test_warns_of_a_run_that_ends_within_its_warm_up():
    opt = optimizer(1e-2)
    with pytest.warns(UserWarning, match="2 epochs ends within its warm-up of 10"):
        schedule = warmup_cosine(opt, epochs=2)
    assert rates_of(opt, schedule, 2)[1] == [pytest.approx(table_7(1))]
