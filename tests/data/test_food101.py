# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import hashlib
import io
import json
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image
from rich.console import Console
from typer.testing import CliRunner

from monai_cggm.cli import app
from monai_cggm.data import food101
from monai_cggm.data.features import load_features, split_features
from monai_cggm.data.food101 import FoodSample, prepare_food101, read_food101
from monai_cggm.errors import DataError
from tests.bundles import test_sequence_bundles as bundles

WORDS = [
    "[PAD]",
    "[UNK]",
    "[CLS]",
    "[SEP]",
    "[MASK]",
    "apple",
    "pie",
    "hot",
    "dog",
    "##s",
    "recipe",
    ",",
    "the",
    "best",
]
IDS = {word: place for place, word in enumerate(WORDS)}
TITLES = {
    "train": [
        ("apple_pie_0", "Apple pie recipe"),
        ("apple_pie_1", "The best apple pie, apple pies, the best"),
        ("hot_dog_0", "Hot dogs"),
        ("hot_dog_4", ""),
        ("apple_pie_2", "Pie"),
    ],
    "test": [("hot_dog_1", "The best hot dog recipe"), ("apple_pie_9", "Apple"), ("hot_dog_7", "zebra")],
}
CASES = [case for part in ("train", "test") for case, _ in TITLES[part]]
ARRAYS = {"cls": ("vision", "text"), "all": ("vision", "text", "text_lengths")}


def _class(case: str) -> str:
    return case.rpartition("_")[0]


def _picture(path: Path, seed: int, mode: str = "RGB") -> None:
    size = (20 + seed, 17 + 3 * seed)
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).convert(mode).save(path, quality=95)


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """Eight photographs, one of them without colours, of two classes."""
    folder = tmp_path / "food"
    (folder / "texts").mkdir(parents=True)
    for part, titles in TITLES.items():
        rows = [f'{case}.jpg,"{title}",{_class(case)}\n' for case, title in titles]
        (folder / "texts" / f"{part}_titles.csv").write_text("".join(rows))
        for case, _ in titles:
            mode = "L" if case == "hot_dog_1" else "RGB"
            _picture(folder / "images" / part / _class(case) / f"{case}.jpg", CASES.index(case), mode)
    return folder


@pytest.fixture(scope="module")
def networks() -> Any:
    """The tiny networks with the heads that published weights have."""
    hf = pytest.importorskip("transformers", reason="encoding needs the extra food101")
    torch.manual_seed(0)
    common = {"hidden_size": 8, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 16}
    bert = hf.BertForPreTraining(hf.BertConfig(vocab_size=len(WORDS), max_position_embeddings=64, **common))
    vit = hf.ViTForImageClassification(hf.ViTConfig(image_size=16, patch_size=8, num_labels=3, **common))
    for parameter in (*bert.parameters(), *vit.parameters()):
        torch.nn.init.normal_(parameter, std=0.5)
    return SimpleNamespace(bert=bert.eval(), vit=vit.eval(), hf=hf)


@pytest.fixture(scope="module")
def saved(networks: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    networks.bert.save_pretrained(folder / "bert")
    networks.vit.save_pretrained(folder / "vit")
    networks.hf.ViTImageProcessorPil(size={"height": 16, "width": 16}).save_pretrained(folder / "vit")
    (folder / "bert" / "vocab.txt").write_text("\n".join(WORDS) + "\n")
    return folder


@pytest.fixture
def models(saved: Path, tmp_path: Path) -> dict[str, Path]:
    """Folders of a test's own, so that it may spoil them."""
    for name in ("bert", "vit"):
        shutil.copytree(saved / name, tmp_path / name)
    return {name: tmp_path / name for name in ("bert", "vit")}


def _bytes(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def _spoil(folder: Path, change: Any) -> None:
    """Change a model's weights in their file."""
    from safetensors.torch import load_file, save_file

    weights = load_file(folder / "model.safetensors")
    change(weights)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


# reading


def test_samples_have_title_class_and_part_in_the_order_of_the_files(source: Path) -> None:
    samples, bad = read_food101(source)
    assert bad == {}
    assert [(s.case, s.title) for s in samples] == [*TITLES["train"], *TITLES["test"]]
    path = source / "images/test/apple_pie/apple_pie_9.jpg"
    assert samples[6] == FoodSample("apple_pie_9", "Apple", "apple_pie", "test", path, "test_titles.csv, line 2")
    assert [s.part for s in samples] == ["train"] * 5 + ["test"] * 3
    assert {s.label for s in samples} == {"apple_pie", "hot_dog"}


@pytest.mark.parametrize(
    ("line", "title"),
    [
        (b'"Pies, tarts, and more",', "Pies, tarts, and more"),
        (b"Pies, tarts, and more,", "Pies, tarts, and more"),
        (b'"The ""best"" pie",', 'The "best" pie'),
        (b'The "best" pie,', 'The "best" pie'),
        (b'"Pie\nof apples",', "Pie\nof apples"),
        (b"  Pie \t ,", "Pie"),
        (b"caf\xe9 pie,", "caf\ufffd pie"),
        ("crème brûlée 蛋,".encode(), "crème brûlée 蛋"),
        (b",", ""),
        (b"pie\x00,", "pie\x00"),
    ],
    ids=["quoted", "commas", "doubled", "quotes", "lines", "spaces", "latin", "utf8", "empty", "nul"],
)
@pytest.mark.parametrize("mark", [b"", b"\xef\xbb\xbf"], ids=["plain", "bom"])
def test_odd_titles_are_read(source: Path, line: bytes, title: str, mark: bytes) -> None:
    rows = mark + b"apple_pie_0.jpg," + line + b"apple_pie\r\n\r\nhot_dog_0.jpg,next,hot_dog"
    (source / "texts/train_titles.csv").write_bytes(rows)
    samples, _ = read_food101(source)
    assert [(s.case, s.title, s.label) for s in samples[:2]] == [
        ("apple_pie_0", title, "apple_pie"),
        ("hot_dog_0", "next", "hot_dog"),
    ]
    assert len(samples) == 5


def _append(source: Path, part: str, row: str) -> None:
    with (source / "texts" / f"{part}_titles.csv").open("a") as file:
        file.write(row + "\n")


LISTED = "hot_dog_0: is listed already (train_titles.csv, line 3)"
#: part, row, what is wrong with it; odd_1.jpg is in images/train/apple_pie
BAD = {
    "missing": ("train", "cake_5.jpg,x,hot_dog", "cake_5: there is no image images/train/hot_dog/cake_5.jpg"),
    "class": (
        "train",
        "odd_1.jpg,x,hot_dog",
        "odd_1: its image is in images/train/apple_pie, expected in images/train/hot_dog",
    ),
    "part": (
        "test",
        "odd_1.jpg,x,apple_pie",
        "odd_1: its image is in images/train/apple_pie, expected in images/test/apple_pie",
    ),
    "twice": ("train", "hot_dog_0.jpg,x,hot_dog", LISTED),
    "in both parts": ("test", "hot_dog_0.jpg,x,hot_dog", LISTED),
    "two cells": ("train", "odd_1.jpg,apple_pie", "odd_1: 2 cells, expected image name, title and class"),
    "no name": ("test", ",x,apple_pie", ": 3 cells, expected image name, title and class"),
    "no class": ("test", "odd_1.jpg,x,", "odd_1: 3 cells, expected image name, title and class"),
}


@pytest.mark.parametrize("kind", BAD)
def test_a_sample_that_cannot_be_used_is_named_or_left_out(source: Path, kind: str) -> None:
    part, row, problem = BAD[kind]
    _picture(source / "images/train/apple_pie/odd_1.jpg", 1)
    _append(source, part, row)
    where = f"{part}_titles.csv, line {len(TITLES[part]) + 1}"
    with pytest.raises(DataError) as raised:
        read_food101(source)
    assert str(raised.value) == f"1 of 9 samples cannot be used; --skip-bad leaves them out:\n  {problem} ({where})"
    samples, bad = read_food101(source, skip_bad=True)
    assert bad == {where: problem}
    assert [s.case for s in samples] == CASES


def test_of_many_bad_samples_the_first_ten_are_named(source: Path) -> None:
    for number in range(20, 33):
        _append(source, "train", f"apple_pie_{number}.jpg,x,apple_pie")
    with pytest.raises(DataError) as raised:
        read_food101(source)
    lines = str(raised.value).splitlines()
    assert lines[0] == "13 of 21 samples cannot be used; --skip-bad leaves them out:"
    assert [line.split(":")[0].strip() for line in lines[1:11]] == [f"apple_pie_{number}" for number in range(20, 30)]
    assert lines[11:] == ["  and 3 more"]


def test_a_folder_of_another_layout_is_refused(source: Path) -> None:
    (source / "texts/test_titles.csv").unlink()
    shutil.rmtree(source / "images/train")
    with pytest.raises(DataError, match=r"food has no texts/test_titles.csv, images/train: expected UPMC-Food 101"):
        read_food101(source)


def test_pictures_of_one_s_own_need_no_training_part(source: Path, models: dict[str, Path], tmp_path: Path) -> None:
    """What inference reads: the features are those of the same pictures in the published set."""
    prepare_food101(source, tmp_path / "all", **models)
    shutil.rmtree(source / "images/train")
    (source / "texts/train_titles.csv").unlink()
    made = prepare_food101(source, tmp_path / "own", **models)
    assert made.samples == {"train": 0, "test": 3}
    whole, own = (load_features(tmp_path / name, need_label=False) for name in ("all", "own"))
    published = {item["case"]: item for item in whole}
    assert len(own) == 3
    for item in own:
        for name in ("text", "vision"):
            np.testing.assert_allclose(item[name], published[item["case"]][name], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("end", ["", 'apple_pie_2.jpg,"Pie",apple_pie\n'])
def test_a_quote_that_is_not_closed_is_an_error(source: Path, end: str) -> None:
    rows = 'apple_pie_0.jpg,"Pie,apple_pie\nhot_dog_0.jpg,Dog,hot_dog\n' + end
    (source / "texts/train_titles.csv").write_text(rows)
    with pytest.raises(DataError, match=r"train_titles.csv: a quote is not closed.*it ends in line [23]"):
        read_food101(source, skip_bad=True)


def test_what_no_csv_reader_takes_is_an_error(source: Path) -> None:
    (source / "texts/train_titles.csv").write_text('apple_pie_0.jpg,"' + "x" * 200_000 + '",apple_pie\n')
    with pytest.raises(DataError, match=r"train_titles.csv: field larger than field limit .131072. .it ends in line 1"):
        read_food101(source)


# values


def _reference(networks: Any, source: Path, part: str, case: str, title: str) -> tuple[np.ndarray, np.ndarray]:
    """Both networks on one sample whose words are looked up, and whose pixels are computed, here."""
    words = title.lower().replace(",", " ,").replace("pies", "pie ##s").replace("dogs", "dog ##s").split()
    ids = [IDS["[CLS]"], *(IDS.get(word, IDS["[UNK]"]) for word in words), IDS["[SEP]"]]
    with Image.open(source / "images" / part / _class(case) / f"{case}.jpg") as image:
        small = image.convert("RGB").resize((16, 16), Image.Resampling.BILINEAR)
    pixels = (np.asarray(small, dtype=np.float32) / 255 - 0.5) / 0.5
    with torch.no_grad():
        text = networks.bert.bert(torch.tensor([ids])).last_hidden_state[0].numpy()
        given = torch.from_numpy(pixels.transpose(2, 0, 1)[None].copy())
        return networks.vit.vit(given).last_hidden_state[0].numpy(), text


@pytest.mark.parametrize("tokens", ["cls", "all"])
def test_features_are_the_last_hidden_states(
    networks: Any, source: Path, models: dict[str, Path], tmp_path: Path, tokens: Any
) -> None:
    made = prepare_food101(source, tmp_path / "out", tokens=tokens, max_length=14, batch_size=3, **models)
    arrays = {name: np.load(tmp_path / "out" / f"{name}.npy") for name in ARRAYS[tokens]}
    positions = {"cls": ((), ()), "all": ((5,), (14,))}[tokens]
    assert made.shapes == {"vision": (8, *positions[0], 8), "text": (8, *positions[1], 8)}
    assert {name: arrays[name].shape for name in ("vision", "text")} == made.shapes
    assert arrays["vision"].dtype == arrays["text"].dtype == {"cls": np.float32, "all": np.float16}[tokens]
    near = {"cls": 1e-5, "all": 2e-3}[tokens]
    rows = [(part, *item) for part, items in TITLES.items() for item in items]
    for row, (part, case, title) in enumerate(rows):
        image, text = _reference(networks, source, part, case, title)
        if tokens == "cls":
            np.testing.assert_allclose(arrays["vision"][row], image[0], atol=near)
            np.testing.assert_allclose(arrays["text"][row], text[0], atol=near)
        else:
            assert arrays["text_lengths"][row] == len(text)
            np.testing.assert_allclose(arrays["vision"][row], image, atol=near)
            np.testing.assert_allclose(arrays["text"][row, : len(text)], text, atol=near)
            assert not arrays["text"][row, len(text) :].any()


def test_titles_are_cut_before_sep(networks: Any, source: Path, models: dict[str, Path], tmp_path: Path) -> None:
    prepare_food101(source, tmp_path / "out", tokens="all", max_length=4, **models)
    text, lengths = (np.load(tmp_path / "out" / f"{name}.npy") for name in ("text", "text_lengths"))
    assert text.shape == (8, 4, 8)
    assert lengths.tolist() == [4, 4, 4, 2, 3, 4, 3, 3]
    _, cut = _reference(networks, source, "train", "apple_pie_0", "apple pie")
    np.testing.assert_allclose(text[0], cut, atol=2e-3)


@pytest.mark.parametrize("tokens", ["cls", "all"])
def test_batch_size_and_threads_do_not_change_values(
    source: Path, models: dict[str, Path], tmp_path: Path, tokens: Any
) -> None:
    for size in (1, 3, 8):
        prepare_food101(
            source, tmp_path / f"by{size}", tokens=tokens, max_length=16, batch_size=size, workers=size, **models
        )
    for name in ARRAYS[tokens]:
        one, *others = (np.load(tmp_path / f"by{size}" / f"{name}.npy").astype(np.float32) for size in (1, 3, 8))
        for other in others:
            np.testing.assert_allclose(other, one, atol={"cls": 1e-5, "all": 2e-3}[tokens])


# the folder


@pytest.mark.parametrize("tokens", ["cls", "all"])
def test_the_bundle_goes_on_from_the_folder(source: Path, models: dict[str, Path], tmp_path: Path, tokens: Any) -> None:
    """From photographs and titles to a prediction of each test sample."""
    made = prepare_food101(source, tmp_path / "features", tokens=tokens, max_length=12, **models)
    told = bundles.arguments(made.folder, tmp_path / "run", epochs=2, batch_size=2)
    bundles.run("food101_cggm", "train.yaml", **told)
    bundles.run("food101_cggm", "train.yaml", "evaluate.yaml", **told, part="test")
    scores = pd.read_csv(tmp_path / "run/test/cases.csv")
    scores = scores[scores["predictor"] == "fusion"].set_index("case")
    assert {case: row["truth"] for case, row in scores.iterrows()} == {c: _class(c) for c, _ in TITLES["test"]}
    places = {"dataset_dir": str(made.folder), "model_file": str(tmp_path / "run/model.pt")}
    bundles.run(
        "food101_cggm", "inference.yaml", kind="infer", output_dir=str(tmp_path / "out"), **places, **bundles.TINY
    )
    predicted = pd.read_csv(tmp_path / "out/predictions.csv").set_index("case")
    assert set(predicted.index) == set(CASES)
    assert predicted.loc[scores.index, "prediction"].tolist() == scores["prediction"].tolist()


@pytest.mark.parametrize("tokens", ["cls", "all"])
def test_the_folder_is_read_as_it_is(source: Path, models: dict[str, Path], tmp_path: Path, tokens: Any) -> None:
    made = prepare_food101(source, tmp_path / "out", tokens=tokens, max_length=12, **models)
    assert made.samples == {"train": 5, "test": 3}
    assert (made.folder, made.skipped, made.computed) == (tmp_path / "out", {}, 8)
    samples = load_features(tmp_path / "out")
    assert samples.description.modalities == ("text", "vision")
    assert samples.description.sizes == {"vision": 8, "text": 8}
    assert samples.description.classes == ("apple_pie", "hot_dog")
    assert [s["case"] for s in samples] == CASES
    assert [samples.description.classes[s["label"]] for s in samples] == [_class(case) for case in CASES]
    assert [s["part"] for s in samples] == ["train"] * 5 + ["test"] * 3
    if tokens == "all":
        assert [len(s["text"]) for s in samples] == [5, 12, 5, 2, 3, 7, 3, 3]
        assert {s["vision"].shape for s in samples} == {(5, 8)}
    split = split_features(samples, fractions=(0.6, 0.4, 0.0))
    assert {part: len(chosen) for part, chosen in split.items()} == {"train": 3, "validation": 2, "test": 3}
    assert {s["case"] for s in split["test"]} == {case for case, _ in TITLES["test"]}


def test_the_folder_says_what_it_was_made_of(source: Path, models: dict[str, Path], tmp_path: Path) -> None:
    prepare_food101(source, tmp_path / "out", max_length=9, batch_size=5, **models)
    said = json.loads((tmp_path / "out/features.json").read_text())
    settings = said["settings"]
    assert (settings["tokens"], settings["max_length"], settings["skip_bad"]) == ("cls", 9, False)
    for modality, folder, file in (("vision", "vit", "model.safetensors"), ("text", "bert", "vocab.txt")):
        digest = hashlib.sha256((models[folder] / file).read_bytes()).hexdigest()
        assert settings[f"{modality} model, {file}"] == digest
    assert settings["train_titles.csv"] == hashlib.sha256((source / "texts/train_titles.csv").read_bytes()).hexdigest()
    assert said["models"]["text"] == {"name": str(models["bert"]), "revision": None}
    assert said["versions"]["torch"] == str(torch.__version__)
    assert (said["samples"], said["skipped"], said["batch_size"]) == ({"train": 5, "test": 3}, {}, 5)
    names = {"features.json", "vision.npy", "labels.csv", "text.npy"}
    assert {path.name for path in (tmp_path / "out").iterdir()} == names
    assert (tmp_path / "out/labels.csv").read_text().splitlines()[:2] == [
        "id,label,split",
        "apple_pie_0,apple_pie,train",
    ]
    assert not (tmp_path / "out.partial").exists()


def test_progress_is_shown_where_it_is_asked_for(source: Path, models: dict[str, Path], tmp_path: Path) -> None:
    shown = io.StringIO()
    prepare_food101(source, tmp_path / "out", console=Console(file=shown, width=100), **models)
    assert "Checking images" in shown.getvalue()
    assert "8/8" in shown.getvalue().partition("Encoding")[2]


def test_nothing_is_printed_otherwise(
    source: Path, models: dict[str, Path], tmp_path: Path, networks: Any, capfd: pytest.CaptureFixture[str]
) -> None:
    level = networks.hf.logging.get_verbosity()
    prepare_food101(source, tmp_path / "out", **models)
    assert capfd.readouterr() == ("", "")
    assert networks.hf.logging.get_verbosity() == level
    assert networks.hf.logging.is_progress_bar_enabled()


# going on


class Killed(BaseException):
    """What no code of ours catches."""


@pytest.fixture
def encoded(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """The samples whose rows were written, in order."""
    put, written = food101._put, []

    def noted(arrays: Any, start: int, batch: Any, *states: Any) -> None:
        put(arrays, start, batch, *states)
        written.extend(sample.case for sample in batch)

    monkeypatch.setattr(food101, "_put", noted)
    return written


@pytest.mark.parametrize(
    ("tokens", "moment"),
    [
        ("cls", "in its middle"),
        ("all", "in its middle"),
        ("all", "before a batch is written"),
        ("all", "before it is noted"),
        ("all", "at the end"),
    ],
)
def test_a_killed_run_goes_on_to_the_same_bytes(
    source: Path, models: dict[str, Path], tmp_path: Path, tokens: Any, moment: str, encoded: list[str]
) -> None:
    options = {"tokens": tokens, "max_length": 12, "batch_size": 2, **models}
    prepare_food101(source, tmp_path / "whole", **options)
    encoded.clear()
    put, note, move = food101._put, food101._write_json, food101._finish

    def killed_put(arrays: Any, start: int, batch: Any, *states: Any) -> None:
        if start == 4 and moment == "before a batch is written":
            raise Killed
        put(arrays, start, batch, *states)
        if start == 4 and moment == "in its middle":
            arrays["text"][5] = 7
            raise Killed

    def killed_note(path: Path, content: Any) -> None:
        if content.get("done") == 6 and moment == "before it is noted":
            raise Killed
        note(path, content)

    def killed_move(*folders: Path) -> None:
        if moment == "at the end":
            raise Killed
        move(*folders)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(food101, "_put", killed_put)
        patch.setattr(food101, "_write_json", killed_note)
        patch.setattr(food101, "_finish", killed_move)
        with pytest.raises(Killed):
            prepare_food101(source, tmp_path / "out", **options)
    assert not (tmp_path / "out").exists()
    (tmp_path / "out.partial" / ".tmp1-progress.json").touch()  # as a kill while it is written leaves it
    first, again = encoded.copy(), 8 if moment == "at the end" else 4
    encoded.clear()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(food101, "_undecodable", lambda *_: pytest.fail("images are checked again"))
        made = prepare_food101(source, tmp_path / "out", **options)
    assert made.computed == 8 - again
    assert encoded == CASES[again:]
    assert len(set(first) & set(encoded)) <= 2  # one batch
    assert _bytes(tmp_path / "out") == _bytes(tmp_path / "whole")


def test_a_kill_while_the_folder_is_laid_out_begins_anew(
    source: Path, models: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def killed(path: Path, content: Any) -> None:
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(food101, "_write_json", killed)
        with pytest.raises(Killed):
            prepare_food101(source, tmp_path / "out", **models)
    np.load(tmp_path / "out.partial/text.npy", mmap_mode="r+")[:] = 3
    (tmp_path / "out.partial/progress.json").write_text(
        '{"done": 6}'
    )  # and what is left of an older one counts nothing
    with monkeypatch.context() as patch:
        patch.setattr(food101, "_put", lambda *_: killed(tmp_path, None))
        with pytest.raises(Killed):
            prepare_food101(source, tmp_path / "out", **models)
    assert prepare_food101(source, tmp_path / "out", **models).computed == 8
    prepare_food101(source, tmp_path / "whole", **models)
    assert _bytes(tmp_path / "out") == _bytes(tmp_path / "whole")


def test_what_is_complete_is_not_made_again(
    source: Path, models: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = prepare_food101(source, tmp_path / "out", **models)
    before = _bytes(tmp_path / "out")
    monkeypatch.setattr(food101._Encoders, "loaded", lambda *_: pytest.fail("the models are loaded again"))
    monkeypatch.setattr(food101, "_versions", lambda: {"torch": "9"})  # complete, whatever is installed now
    elsewhere = shutil.copytree(models["bert"], tmp_path / "moved")
    again = prepare_food101(source, tmp_path / "out", bert=elsewhere, vit=models["vit"], batch_size=3)
    assert (again.computed, again.samples, again.shapes) == (0, first.samples, first.shapes)
    assert _bytes(tmp_path / "out") == before


def _begin(source: Path, out: Path, models: dict[str, Path], **options: Any) -> None:
    """A folder with one batch of two in it."""
    put = food101._put

    def killed(arrays: Any, start: int, *rest: Any) -> None:
        if start:
            raise Killed
        put(arrays, start, *rest)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(food101, "_put", killed)
        with pytest.raises(Killed):
            prepare_food101(source, out, batch_size=2, **options, **models)


@pytest.mark.parametrize("complete", [True, False], ids=["made", "begun"])
@pytest.mark.parametrize(
    ("options", "difference"),
    [
        ({"tokens": "all"}, "tokens: cls there, all now"),
        ({"max_length": 10}, "max_length: 20 there, 10 now"),
        ({"skip_bad": True}, "skip_bad: False there, True now"),
        ("bert", "text model, model.safetensors: [0-9a-f]{12} there, [0-9a-f]{12} now"),
        ("processor", "vision model, preprocessor_config.json: [0-9a-f]{12} there, [0-9a-f]{12} now"),
        ("tokenizer", "text model, tokenizer_config.json: none there, [0-9a-f]{12} now"),
        ("titles", "test_titles.csv: [0-9a-f]{12} there, [0-9a-f]{12} now"),
    ],
    ids=["tokens", "length", "skip", "weights", "processor", "tokenizer", "titles"],
)
def test_other_options_are_refused(
    source: Path, models: dict[str, Path], tmp_path: Path, complete: bool, options: Any, difference: str
) -> None:
    out = tmp_path / "out"
    if complete:
        prepare_food101(source, out, max_length=20, **models)
    else:
        _begin(source, out, models, max_length=20)
    folder = out if complete else tmp_path / "out.partial"
    before = _bytes(folder)
    if options == "bert":
        _spoil(models["bert"], lambda weights: weights["bert.embeddings.LayerNorm.bias"].add_(1))
    elif options == "processor":
        file = models["vit"] / "preprocessor_config.json"
        file.write_text(file.read_text().replace("0.5", "0.4"))
    elif options == "tokenizer":
        (models["bert"] / "tokenizer_config.json").write_text('{"do_lower_case": false}')
    elif options == "titles":
        _append(source, "test", "")
    given = {"max_length": 20, **(options if isinstance(options, dict) else {})}
    with pytest.raises(
        DataError, match=rf"was {'made' if complete else 'begun'} otherwise.*\n  {difference}$"
    ) as raised:
        prepare_food101(source, out, **given, **models)
    assert str(raised.value).startswith(str(folder))
    assert len(str(raised.value).splitlines()) == 2
    assert _bytes(folder) == before


def test_a_begun_folder_needs_the_same_versions(
    source: Path, models: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _begin(source, tmp_path / "out", models)
    versions = food101._versions()
    monkeypatch.setattr(food101, "_versions", lambda: {**versions, "transformers": "99.0"})
    with pytest.raises(
        DataError, match=rf"begun otherwise.*\n  transformers: {versions['transformers']} there, 99.0 now$"
    ):
        prepare_food101(source, tmp_path / "out", **models)


def test_a_begun_folder_takes_another_batch_size(source: Path, models: dict[str, Path], tmp_path: Path) -> None:
    _begin(source, tmp_path / "out", models, tokens="all", max_length=12)
    assert prepare_food101(source, tmp_path / "out", tokens="all", max_length=12, batch_size=5, **models).computed == 6
    prepare_food101(source, tmp_path / "whole", tokens="all", max_length=12, **models)
    for name in ARRAYS["all"]:
        made, whole = (np.load(tmp_path / folder / f"{name}.npy").astype(float) for folder in ("out", "whole"))
        np.testing.assert_allclose(made, whole, atol=2e-3)


@pytest.mark.parametrize(
    ("content", "problem"),
    [("", "cannot be read .Expecting value.*: delete"), ("[1]", "holds no JSON object: delete")],
)
def test_a_begun_folder_that_says_nothing_is_an_error(
    source: Path, models: dict[str, Path], tmp_path: Path, content: str, problem: str
) -> None:
    (tmp_path / "out.partial").mkdir()
    (tmp_path / "out.partial/features.json").write_text(content)
    with pytest.raises(DataError, match=f"features.json {problem} .*out.partial"):
        prepare_food101(source, tmp_path / "out", **models)


def test_files_of_something_else_are_left_alone(source: Path, models: dict[str, Path], tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "thesis.txt").write_text("words")
    with pytest.raises(FileExistsError, match="out has files of something else"):
        prepare_food101(source, out, **models)
    assert _bytes(out) == {"thesis.txt": b"words"}
    (out / "thesis.txt").unlink()
    assert prepare_food101(source, out, **models).computed == 8  # an empty folder will do


# bad images


def _cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-200])


@pytest.mark.parametrize(
    "spoil", [_cut, lambda p: p.write_bytes(b""), lambda p: p.write_text("<html>not found</html>")]
)
def test_images_that_cannot_be_decoded_are_named_or_left_out(
    source: Path, models: dict[str, Path], tmp_path: Path, spoil: Any, caplog: pytest.LogCaptureFixture
) -> None:
    spoil(source / "images/train/hot_dog/hot_dog_0.jpg")
    with pytest.raises(DataError) as raised:
        prepare_food101(source, tmp_path / "out", **models)
    lines = str(raised.value).splitlines()
    assert lines[0] == "1 of 8 samples cannot be used; --skip-bad leaves them out:"
    assert lines[1].startswith("  hot_dog_0: its image cannot be decoded: ")
    assert lines[1].endswith("(train_titles.csv, line 3)")
    assert not (tmp_path / "out.partial").exists()
    (source / "images/test/apple_pie/apple_pie_9.jpg").unlink()
    with caplog.at_level("WARNING"):
        made = prepare_food101(source, tmp_path / "out", skip_bad=True, **models)
    assert "2 of 8 samples are left out" in caplog.text
    assert made.samples == {"train": 4, "test": 2}
    assert {where: text.split(":")[0] for where, text in made.skipped.items()} == {
        "test_titles.csv, line 2": "apple_pie_9",
        "train_titles.csv, line 3": "hot_dog_0",
    }
    assert json.loads((tmp_path / "out/features.json").read_text())["skipped"] == made.skipped
    samples = load_features(tmp_path / "out")
    assert [s["case"] for s in samples] == [case for case in CASES if case not in ("hot_dog_0", "apple_pie_9")]
    assert samples[-1]["vision"].tolist() == np.load(tmp_path / "out/vision.npy")[5].tolist()


def test_without_one_sample_there_is_nothing_to_make(source: Path, models: dict[str, Path], tmp_path: Path) -> None:
    for path in source.glob("images/*/*/*.jpg"):
        path.unlink()
    with pytest.raises(DataError, match="8 of 8 samples cannot be used and are all that there are:"):
        prepare_food101(source, tmp_path / "out", skip_bad=True, **models)


def test_left_out_samples_stay_out_when_a_run_goes_on(source: Path, models: dict[str, Path], tmp_path: Path) -> None:
    _append(source, "train", "apple_pie_0.jpg,again,apple_pie")
    _cut(source / "images/train/apple_pie/apple_pie_1.jpg")
    prepare_food101(source, tmp_path / "whole", skip_bad=True, batch_size=2, **models)
    _begin(source, tmp_path / "out", models, skip_bad=True)
    made = prepare_food101(source, tmp_path / "out", skip_bad=True, batch_size=2, **models)
    assert (made.computed, made.samples) == (5, {"train": 4, "test": 3})
    assert _bytes(tmp_path / "out") == _bytes(tmp_path / "whole")


def test_an_image_that_goes_while_a_run_pauses_is_an_error(
    source: Path, models: dict[str, Path], tmp_path: Path
) -> None:
    image = source / "images/test/hot_dog/hot_dog_7.jpg"
    _begin(source, tmp_path / "out", models, skip_bad=True)
    kept = image.read_bytes()
    _cut(image)
    with pytest.raises(DataError, match=r"^hot_dog_7: its image cannot be decoded: .*hot_dog_7.jpg"):
        prepare_food101(source, tmp_path / "out", skip_bad=True, **models)
    image.unlink()
    expected = r"1 of 8 samples cannot be used and could be used when the folder was begun:\n  hot_dog_7: there is no"
    with pytest.raises(DataError, match=expected):
        prepare_food101(source, tmp_path / "out", skip_bad=True, **models)
    image.write_bytes(kept)
    assert prepare_food101(source, tmp_path / "out", skip_bad=True, **models).samples == {"train": 5, "test": 3}


# models


def test_models_are_not_looked_for_on_the_network(source: Path, tmp_path: Path) -> None:
    pytest.importorskip("transformers", reason="encoding needs the extra food101")
    with pytest.raises(DataError) as raised:
        prepare_food101(source, tmp_path / "out", bert="nobody/no-bert", vit="no/such/folder")
    hint = "not in the local cache: give its folder (--{} DIR), or allow the network (--download)"
    assert raised.value.problems == [
        f"bert nobody/no-bert: no folder, and {hint.format('bert')}",
        f"vit no/such/folder: no folder, and {hint.format('vit')}",
    ]


def test_the_network_is_used_where_it_is_allowed(
    source: Path, models: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import huggingface_hub

    asked: list[tuple[str, bool]] = []

    def snapshot(name: str, *, allow_patterns: list[str], local_files_only: bool) -> str:
        assert not any(pattern.endswith((".bin", ".py", "*")) for pattern in allow_patterns)
        asked.append((name, local_files_only))
        if name == "someone/gone":
            raise OSError("404 Client Error\nand more")
        return str(models["vit" if "vit" in name else "bert"])

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot)
    prepare_food101(source, tmp_path / "cached")
    prepare_food101(source, tmp_path / "out", download=True)
    local, remote = (True, False)
    names = ("bert-base-uncased", "google/vit-base-patch16-224")
    assert asked == [(name, mode) for mode in (local, remote) for name in names]
    said = json.loads((tmp_path / "out/features.json").read_text())["models"]
    assert said["vision"] == {"name": "google/vit-base-patch16-224", "revision": models["vit"].name}
    expected = r"^bert someone/gone: no folder, and not to be had from the Hugging Face Hub \(404 Client Error\)$"
    with pytest.raises(DataError, match=expected):
        prepare_food101(source, tmp_path / "other", bert="someone/gone", download=True)


def test_weights_that_could_run_code_are_not_read(source: Path, models: dict[str, Path], tmp_path: Path) -> None:
    (models["bert"] / "model.safetensors").rename(models["bert"] / "pytorch_model.bin")
    with pytest.raises(DataError) as raised:
        prepare_food101(source, tmp_path / "out", **models)
    folder = models["bert"]
    assert raised.value.problems == [
        f"bert {folder}: model.safetensors is missing in {folder}",
        f"bert {folder}: pytorch_model.bin is not read, as such files can run code: save it as safetensors",
    ]


def test_all_that_models_lack_is_listed(source: Path, models: dict[str, Path], tmp_path: Path) -> None:
    (models["bert"] / "vocab.txt").unlink()
    (models["vit"] / "preprocessor_config.json").unlink()
    (models["vit"] / "config.json").write_text('{"model_type": "swin"}')
    with pytest.raises(DataError) as raised:
        prepare_food101(source, tmp_path / "out", **models)
    bert, vit = models["bert"], models["vit"]
    assert raised.value.problems == [
        f"bert {bert}: tokenizer.json or vocab.txt is missing in {bert}",
        f"vit {vit}: preprocessor_config.json is missing in {vit}",
        f"vit {vit}: a model of type 'swin', expected 'vit' ({vit}/config.json)",
    ]
    (bert / "config.json").write_text("no JSON")
    with pytest.raises(DataError, match="a model of type None, expected 'bert'"):
        prepare_food101(source, tmp_path / "out", **models)


def _drop(weights: dict[str, torch.Tensor]) -> None:
    del weights["bert.encoder.layer.1.output.dense.bias"]


def _shrink(weights: dict[str, torch.Tensor]) -> None:
    weights["bert.embeddings.position_embeddings.weight"] = torch.zeros(20, 8)


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        (_drop, "the weights lack 1 of its parameters, the first is encoder.layer.1.output.dense.bias"),
        (_shrink, "position_embeddings.weight|cannot be loaded"),
    ],
)
def test_weights_that_do_not_fill_the_network_are_refused(
    source: Path, models: dict[str, Path], tmp_path: Path, change: Any, problem: str
) -> None:
    _spoil(models["bert"], change)
    with pytest.raises(DataError, match=rf"^BertModel.*({problem}).*{models['bert']}"):
        prepare_food101(source, tmp_path / "out", **models)
    assert not (tmp_path / "out.partial").exists()


@pytest.mark.parametrize(("model", "file"), [("bert", "model.safetensors"), ("vit", "preprocessor_config.json")])
def test_a_broken_file_of_a_model_is_an_error(
    source: Path, models: dict[str, Path], tmp_path: Path, model: str, file: str
) -> None:
    (models[model] / file).write_bytes(b"\x08nothing")
    with pytest.raises(DataError, match=rf"^(BertModel|ViTImageProcessor\w*) cannot be loaded: .*{models[model]}"):
        prepare_food101(source, tmp_path / "out", **models)


def test_a_tokenizer_of_another_model_is_refused(source: Path, models: dict[str, Path], tmp_path: Path) -> None:
    (models["bert"] / "vocab.txt").write_text("\n".join([*WORDS, "one", "more"]) + "\n")
    with pytest.raises(DataError, match=rf"the tokenizer has 16 tokens, and its model 14 .*{models['bert']}"):
        prepare_food101(source, tmp_path / "out", **models)


def test_weights_in_half_precision_are_encoded_in_float32(
    source: Path, models: dict[str, Path], tmp_path: Path, networks: Any
) -> None:
    halved = networks.hf.BertForPreTraining.from_pretrained(models["bert"]).half()
    halved.save_pretrained(models["bert"])
    prepare_food101(source, tmp_path / "out", **models)
    ids = torch.tensor([[IDS["[CLS]"], IDS["pie"], IDS["[SEP]"]]])
    with torch.no_grad():
        expected = halved.float().eval().bert(ids).last_hidden_state[0, 0].numpy()
    np.testing.assert_allclose(np.load(tmp_path / "out/text.npy")[4], expected, atol=1e-5)


@pytest.mark.parametrize(
    ("tokens", "scale", "modality", "case"),
    [
        ("cls", torch.nan, "text", "hot_dog_7"),
        ("all", 1e6, "text", "hot_dog_7"),
        ("all", torch.nan, "vision", "apple_pie_0"),
    ],
)
def test_features_that_are_not_finite_are_an_error(
    source: Path, models: dict[str, Path], tmp_path: Path, tokens: Any, scale: float, modality: str, case: str
) -> None:
    def unknown(weights: dict[str, torch.Tensor]) -> None:  # the word that only the last title has
        weights["bert.embeddings.word_embeddings.weight"][IDS["[UNK]"]] *= torch.nan if tokens == "cls" else 1

    if modality == "vision":
        _spoil(models["vit"], lambda weights: weights["vit.layernorm.bias"].mul_(scale))
    elif tokens == "cls":
        _spoil(models["bert"], unknown)
    else:
        _spoil(models["bert"], lambda weights: weights["bert.encoder.layer.1.output.LayerNorm.bias"].mul_(scale))
        case = "apple_pie_0"
    kind = "float32" if tokens == "cls" else "float16"
    with pytest.raises(DataError, match=f"^{case}: its {modality} features are not finite in {kind}$"):
        prepare_food101(source, tmp_path / "out", tokens=tokens, **{"max_length": 20, **models})


# the machine


def test_a_disk_without_room_is_an_error(
    source: Path, models: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    room = 8 * (8 + 8) * 4
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=room - 1))
    with pytest.raises(DataError, match=rf"^{tmp_path}: the features take 0.0 GB, and 0.0 GB are free$"):
        prepare_food101(source, tmp_path / "deep/out", **models)
    assert not (tmp_path / "deep").exists()
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=room))
    _begin(source, tmp_path / "out", models)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=room * 6 / 8))
    assert prepare_food101(source, tmp_path / "out", **models).computed == 6  # a quarter of it is there


@pytest.mark.parametrize("module", [None, SimpleNamespace(__version__="4.57.6")], ids=["none", "old"])
def test_without_transformers_the_extra_is_named(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, module: Any
) -> None:
    monkeypatch.setitem(sys.modules, "transformers", module)
    found = "" if module is None else ", not 4.57.6"
    expected = rf"^encoding needs transformers 5.4 or newer{found}: pip install 'monai_cggm\[food101\]'"
    with pytest.raises(DataError, match=expected):
        prepare_food101(source, tmp_path / "out")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"tokens": "mean"}, "tokens must be 'cls' or 'all', got 'mean'"),
        ({"max_length": 2}, "max_length must be at least 3: .*; got 2"),
        ({"batch_size": 0}, "batch_size and workers must be at least 1, got 0 and 3"),
        ({"workers": 0}, "batch_size and workers must be at least 1, got 32 and 0"),
        ({"device": "abacus"}, "device 'abacus' is unknown: "),
    ],
)
def test_options_out_of_their_range_are_refused(source: Path, tmp_path: Path, options: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        prepare_food101(source, tmp_path / "out", **{"workers": 3, **options})


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_gpu_that_is_not_there_is_refused(source: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="device is 'cuda:1', and PyTorch sees no GPU here"):
        prepare_food101(source, tmp_path / "out", device="cuda:1")


def test_more_tokens_than_the_model_has_positions_are_refused(
    source: Path, models: dict[str, Path], tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match="max_length is 65, and the text model has 64 positions"):
        prepare_food101(source, tmp_path / "out", max_length=65, **models)


# the command


def test_the_command_says_what_it_made(source: Path, models: dict[str, Path], tmp_path: Path) -> None:
    words = ["prepare-food101", source, tmp_path / "out", "--bert", models["bert"], "--vit", models["vit"]]
    first, again = (CliRunner().invoke(app, [str(word) for word in words]) for _ in range(2))
    assert first.exit_code == 0, first.output
    assert f"{tmp_path / 'out'}: train 5, test 3; " in first.stdout
    assert "vision 8" in first.stdout
    assert "(was complete)" not in first.stdout
    assert again.stdout == first.stdout.rstrip("\n") + " (was complete)\n"
