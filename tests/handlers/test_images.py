# SPDX-License-Identifier: Apache-2.0
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from ignite.engine import Engine
from monai.data import DataLoader
from monai.engines import SupervisedEvaluator, SupervisedTrainer
from monai.handlers import ValidationHandler
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import nn

from monai_cggm.handlers import RunLog, ValidationImages
from monai_cggm.handlers.images import CLASS_COLOURS, class_colours, classes_of, comparison_figure

TITLES = ("flair", "t1ce", "t1", "t2")


def case(shape=(10, 12, 6), modalities=4):
    """Class 2 fills most of slice 4, class 3 a voxel of slice 1."""
    image = torch.linspace(0, 1, modalities * int(np.prod(shape))).reshape(modalities, *shape)
    label = torch.zeros(1, *shape, dtype=torch.uint8)
    label[0, 2:8, 3:9, 4] = 2
    label[0, 5, 5, 1] = 3
    return image, label


def legend(figure):
    return {
        text.get_text(): patch.get_facecolor()[:3]
        for legend in figure.legends
        for text, patch in zip(legend.get_texts(), legend.get_patches(), strict=True)
    }


def panels(figure):
    return [axes.get_images()[0].get_array() for axes in figure.axes]


def unturned(panel):
    return np.rot90(np.asarray(panel), -1)


@pytest.mark.parametrize("modalities", [1, 2, 4])
def test_panels(modalities):
    image, label = case(modalities=modalities)
    figure = comparison_figure(image, label, label, titles=TITLES[:modalities])
    assert [axes.get_title() for axes in figure.axes] == [*TITLES[:modalities], "truth", "prediction"]
    assert all(panel.shape == (12, 10, 3) for panel in panels(figure))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_shows_the_slice_with_most_tumour(dtype):
    image, label = case()
    pred = torch.zeros_like(label)
    pred[0, :2, :2, 4] = 1
    pred[0, :, :, 0] = 3  # on a slice that is not shown
    grey, *_, truth, found = (
        unturned(p) for p in panels(comparison_figure(image.to(dtype), label, pred, titles=TITLES))
    )
    assert np.all((truth != grey).any(-1) == (label[0, ..., 4].numpy() == 2))
    assert np.all((found != grey).any(-1) == (pred[0, ..., 4].numpy() == 1))
    expected = 0.45 * grey[4, 5] + 0.55 * np.asarray(CLASS_COLOURS[1])
    assert np.allclose(truth[4, 5], expected)


def test_contrast_reaches_from_black_to_white():
    image, label = case()
    grey = panels(comparison_figure(image * 1000 - 300, label, label, titles=TITLES))[1]
    assert (grey.min(), grey.max()) == (0.0, 1.0)


def test_two_dimensions_and_no_tumour():
    image, label = torch.rand(2, 7, 5), torch.zeros(1, 7, 5)
    figure = comparison_figure(image, label, label, titles=TITLES[:2])
    assert panels(figure)[0].shape == (5, 7, 3)
    volume = torch.zeros(2, 7, 5, 3)  # constant, too
    assert len(panels(comparison_figure(volume, volume[:1], volume[:1], titles=TITLES[:2]))) == 4


def test_refuses_titles_that_do_not_fit():
    image, label = case()
    with pytest.raises(ValueError, match="4 channels needs as many titles, got flair"):
        comparison_figure(image, label, label, titles=["flair"])


@pytest.mark.parametrize("highest", [1, 2, 7, 8, 30])
def test_any_number_of_classes(highest):
    image, label = torch.rand(2, 40, 6), torch.zeros(1, 40, 6, dtype=torch.uint8)
    label[0, :highest, 2] = torch.arange(1, highest + 1)
    figure = comparison_figure(image, label, torch.zeros_like(label), titles=TITLES[:2])
    colours = class_colours(highest)
    assert len(set(colours)) == highest
    assert list(legend(figure)) == [f"class {i}" for i in range(1, highest + 1)]
    np.testing.assert_allclose(list(legend(figure).values()), colours)
    grey, _, truth, found = (unturned(panel) for panel in panels(figure))
    np.testing.assert_allclose(truth[:highest, 2], 0.45 * grey[:highest, 2] + 0.55 * np.asarray(colours))
    np.testing.assert_array_equal(found, grey)


def test_without_any_class_there_is_no_legend():
    image, label = torch.rand(2, 7, 5), torch.zeros(1, 7, 5)
    assert comparison_figure(image, label, label, titles=TITLES[:2]).legends == []
    assert list(legend(comparison_figure(image, label, label, titles=TITLES[:2], class_names=["lesion"]))) == ["lesion"]


def test_names_of_classes():
    image, label = case()
    names = ["core", "edema", "enhancing"]
    found = legend(comparison_figure(image, label, torch.zeros_like(label), titles=TITLES, class_names=names))
    assert list(found) == names
    np.testing.assert_allclose(list(found.values()), CLASS_COLOURS[:3])
    for truth, pred in ((label, 0 * label), (0 * label, label)):
        with pytest.raises(ValueError, match="class 3 has no name, got 2: core, edema"):
            comparison_figure(image, truth, pred, titles=TITLES, class_names=names[:2])


def linear(colours):
    """Light of each colour, and what each kind of cones of a dichromat makes of it (Viénot et al. 1999)."""
    light = np.asarray(colours) ** 2.2
    protan = [[0.11238, 0.88762, 0], [0.11238, 0.88762, 0], [0.00401, -0.00401, 1]]
    deutan = [[0.29275, 0.70725, 0], [0.29275, 0.70725, 0], [-0.02234, 0.02234, 1]]
    return [light, light @ np.transpose(protan), light @ np.transpose(deutan)]


def test_colours_differ_for_the_colour_blind_too():
    colours = class_colours(len(CLASS_COLOURS))
    assert max(map(max, colours)) <= 1
    for seen in linear(colours):
        apart = np.linalg.norm(seen[:, None] - seen[None], axis=-1)
        assert apart[~np.eye(len(colours), dtype=bool)].min() > 0.12


def test_classes_of_scores_and_of_classes():
    scores = torch.tensor([[0.1, 0.9], [0.2, 0.0], [0.7, 0.1]]).reshape(3, 1, 2)
    assert classes_of(scores).tolist() == [[[2, 0]]]
    assert classes_of({"flair": scores[:1], "fusion": scores}).tolist() == [[[2, 0]]]
    assert classes_of(torch.tensor([[[3, 1]]])).tolist() == [[[3, 1]]]


class Scores(nn.Module):
    """Four classes' scores from the image's four channels, in a dict as the bundle's validation gives them."""

    def forward(self, x):
        return {"fusion": x, "flair": x}


@pytest.mark.parametrize(
    ("epochs", "every", "expected", "decollate"),
    [(5, 2, [1, 2, 4, 5], False), (3, 3, [1, 3], True), (2, 9, [1, 2], False)],
)
def test_pictures_of_a_run(tmp_path, epochs, every, expected, decollate):
    image, label = case()
    validator = SupervisedEvaluator(
        device=torch.device("cpu"),
        val_data_loader=DataLoader([{"image": image, "label": label}] * 3, batch_size=1),
        network=Scores(),
        decollate=decollate,
    )
    log = RunLog(tmp_path, validator=validator, modalities=TITLES)
    network = nn.Linear(1, 1)
    images = ValidationImages(log, validator, modalities=TITLES, every=every)
    SupervisedTrainer(
        device=torch.device("cpu"),
        max_epochs=epochs,
        train_data_loader=[{"image": torch.ones(1, 1), "label": torch.ones(1, 1)}] * 2,
        network=network,
        optimizer=torch.optim.SGD(network.parameters(), lr=0.1),
        loss_function=nn.MSELoss(),
        decollate=False,
        train_handlers=[log, images, ValidationHandler(1, validator)],
    ).run()
    found = EventAccumulator(str(tmp_path), size_guidance={"images": 0}).Reload().Images("validation")
    assert [picture.step for picture in found] == [2 * epoch for epoch in expected]
    assert found[0].width == 180 * 6
    assert len(found[0].encoded_image_string) < 200_000


@pytest.mark.parametrize(
    ("channels", "class_names", "expected", "warned"),
    [
        (4, None, ["class 1", "class 2", "class 3"], False),
        (4, ["core", "edema", "enhancing"], ["core", "edema", "enhancing"], False),
        (5, ["core", "edema", "enhancing"], ["class 1", "class 2", "class 3", "class 4"], True),
        (4, ["a", "b", "c", "d"], ["class 1", "class 2", "class 3"], True),
        (4, ["lesion"], ["class 1", "class 2", "class 3"], True),
        (1, ["a", "b", "c", "d"], ["a", "b", "c", "d"], False),  # classes, not scores: the fourth is not in sight
        (1, ["a", "b"], ["class 1", "class 2", "class 3"], True),
        (1, None, ["class 1", "class 2", "class 3"], False),
    ],
)
def test_names_are_shown_where_they_fit(tmp_path, caplog, channels, class_names, expected, warned):
    image, label = case()
    pred = torch.zeros(channels, *label.shape[1:])
    validator, trainer = Engine(lambda engine, batch: None), Engine(lambda engine, batch: None)
    trainer.state.epoch = 1
    validator.state.output = [{"image": image, "label": label, "pred": {"fusion": pred, "flair": pred[:1]}}]
    validator.state.iteration = 1
    log = RunLog(tmp_path)
    log.writer = Mock()
    ValidationImages(log, validator, modalities=TITLES, class_names=class_names)._draw(validator, trainer)
    (_, figure, _), _ = log.writer.add_figure.call_args
    assert list(legend(figure)) == expected
    assert ("class_names has" in caplog.text) == warned
    if warned:
        assert f"class_names has {len(class_names)} names ({', '.join(class_names)}), expected {len(expected)}" in (
            caplog.text
        )


def test_refuses_no_interval(tmp_path):
    with pytest.raises(ValueError, match="every must be at least 1, got 0"):
        ValidationImages(RunLog(tmp_path), None, modalities=TITLES, every=0)
