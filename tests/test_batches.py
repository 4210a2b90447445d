# SPDX-License-Identifier: Apache-2.0
"""What a network is given of a batch."""

import pytest
import torch
from monai.engines import SupervisedEvaluator
from torch import nn

from monai_cggm.batches import prepare_batch, rows_of, samples_in, spatial_size


def batch(**masks):
    return {"image": torch.randn(2, 3, 4, 4), "label": torch.zeros(2, 1, 4, 4), "case": ["a", "b"], **masks}


SOME = torch.tensor([[True, False, True], [True, True, True]])
FEWER = torch.tensor([[True, False, False], [False, True, True]])
ALL = torch.ones(2, 3, dtype=torch.bool)


@pytest.mark.parametrize(
    ("masks", "expected"),
    [
        ({}, None),
        ({"present": ALL}, None),
        ({"present": SOME}, SOME),
        ({"fused": FEWER}, FEWER),
        ({"present": SOME, "fused": FEWER}, FEWER),
        ({"present": ALL, "fused": FEWER}, FEWER),
        ({"fused": ALL}, None),
    ],
)
def test_the_mask_goes_where_something_is_left_out(masks, expected):
    given = batch(**masks)
    image, label, arguments, named = prepare_batch(given)
    assert torch.equal(image, given["image"])
    assert torch.equal(label, given["label"])
    assert arguments == ()
    assert named.keys() == (set() if expected is None else {"present"})
    assert expected is None or torch.equal(named["present"], expected)
    assert named.get("present", ALL).dtype == torch.bool


def test_types_and_devices_are_those_asked_for():
    image, label, _, named = prepare_batch(batch(present=SOME), "meta", dtype=torch.float64)
    assert image.dtype == label.dtype == torch.float64
    assert image.device.type == label.device.type == named["present"].device.type == "meta"
    assert named["present"].dtype == torch.bool


def test_a_batch_may_have_no_label():
    given = batch()
    del given["label"]
    assert prepare_batch(given)[1] is None


def test_an_engine_hands_the_mask_on():
    seen = []

    class Network(nn.Module):
        def forward(self, x, present=None):
            seen.append(present)
            return x

    evaluator = SupervisedEvaluator(
        device=torch.device("cpu"),
        val_data_loader=[batch(present=SOME), batch(present=ALL)],
        network=Network(),
        prepare_batch=prepare_batch,
        decollate=False,
    )
    evaluator.run()
    assert torch.equal(seen[0], SOME)
    assert seen[1] is None


def sequences(**masks):
    image = {
        "audio": torch.randn(2, 5, 4),
        "audio_padding": torch.zeros(2, 5, dtype=torch.bool),
        "text": torch.ones(2, 3),
    }
    return {"image": image, "label": torch.tensor([1, 0]), **masks}


@pytest.mark.parametrize(("masks", "rows"), [({}, 2), ({"present": SOME}, 2), ({"fused": torch.cat([ALL, FEWER])}, 4)])
def test_a_dict_of_modalities_is_given_as_it_is(masks, rows):
    given = sequences(**masks)
    inputs, label, _, named = prepare_batch(given)
    assert inputs.keys() == given["image"].keys()
    assert all(torch.equal(inputs[name], given["image"][name]) for name in inputs)
    assert torch.equal(label, given["label"].repeat(rows // 2))
    assert named.keys() == ({"present"} if masks else set())
    assert "present" not in named or len(named["present"]) == rows


def test_masks_of_padding_stay_boolean():
    inputs, _, _, _ = prepare_batch(sequences(), "meta", dtype=torch.float64)
    assert inputs["audio"].dtype == torch.float64
    assert inputs["audio_padding"].dtype == torch.bool
    assert {value.device.type for value in inputs.values()} == {"meta"}


def test_samples_and_sizes_of_images_and_dicts():
    image, inputs = torch.randn(3, 2, 8, 6), sequences()["image"]
    assert (samples_in(image), samples_in(inputs)) == (3, 2)
    assert (spatial_size(image), spatial_size(inputs), spatial_size(torch.randn(3, 2))) == ((8, 6), (), ())
    assert torch.equal(rows_of(image, torch.tensor([2, 0])), image[[2, 0]])
    picked = rows_of(inputs, torch.tensor([1]))
    assert all(torch.equal(picked[name], inputs[name][1:]) for name in inputs)
