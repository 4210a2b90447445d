# SPDX-License-Identifier: Apache-2.0
r"""UPMC-Food 101, photographs and page titles of 101 dishes, turned into features once.

The data are those of Wang et al. (2015), in the layout in which they are passed around, with the training and test part
as published (67,988 and 22,716 photographs)::

    images/train/apple_pie/apple_pie_0.jpg      a folder a class
    images/test/apple_pie/apple_pie_7.jpg
    texts/train_titles.csv                      image name, title, class; no header
    texts/test_titles.csv

For pictures of one's own the test part alone is enough, under any name for a class.

What comes from where. Guo et al. (2024) use extracted features: of ``bert-base-uncased`` for text, and for images of a
ViT trained on ImageNet. Their code names ``google/vit-base-patch16-224`` and runs both networks, frozen, in every
training step. All positions of the last hidden state are inputs, 50 of text with its padding and 197 of the image,
whose pixels are flipped and recoloured at random in training and not normalised.

Here every sample is encoded once, so that a training reads numbers and no images; random changes of pixels are not
possible then. Pixels are scaled and normalised as the model's own files say. A sample has one vector a modality by
default (``tokens="cls"``): the last hidden state of [CLS], behind the last layer's norm and before any pooler.
``tokens="all"`` gives sequences as the released code has them, with the text's true length; its padding is 0.

References:
    Wang, X., Kumar, D., Thome, N., Cord, M. and Precioso, F. Recipe recognition with large multimodal food dataset.
    ICMEW 2015. Devlin, J. et al. BERT. NAACL 2019. Dosovitskiy, A. et al. An image is worth 16x16 words. ICLR 2021.
    Guo, Z. et al. Classifier-guided gradient modulation for enhanced multimodal learning. NeurIPS 2024.
"""

from __future__ import annotations

import csv
import hashlib
import importlib
import json
import logging
import os
import re
import shutil
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import PIL
import torch
from numpy.lib.format import open_memmap
from PIL import Image
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor

from monai_cggm import __version__
from monai_cggm.errors import DataError
from monai_cggm.files import atomic_path

logger = logging.getLogger(__name__)

BERT = "bert-base-uncased"
VIT = "google/vit-base-patch16-224"
PARTS = ("train", "test")

#: what is read of a model's folder, needed files first; weights in other files than these may run code
_TOKENIZER = ("tokenizer.json", "vocab.txt", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json")
_FILES = {
    "bert": ("config.json", "model.safetensors", *_TOKENIZER),
    "vit": ("config.json", "model.safetensors", "preprocessor_config.json"),
}
#: a row of the list of titles within a title: a quote was not closed
_SWALLOWED = re.compile(r"[\r\n][^,\r\n]+\.jpe?g,", re.IGNORECASE)
#: unusable samples that a message names
_SHOWN = 10
_DESCRIPTION = "features.json"
_PROGRESS = "progress.json"


@dataclass(frozen=True)
class FoodSample:
    """One photograph and its title.

    Attributes:
        case: the image's name without its ending.
        title: of the page that the image is from; may be empty.
        label: the class.
        part: ``train`` or ``test``, as published.
        path: the image.
        where: file and line that list it.
    """

    case: str
    title: str
    label: str
    part: str
    path: Path
    where: str


@dataclass(frozen=True)
class FoodFeatures:
    """What a folder of features holds.

    Attributes:
        folder: which folder.
        samples: how many, for each part.
        shapes: modality → the shape of its array.
        skipped: file and line → why that sample was left out.
        computed: samples that this call encoded; the others were there.
    """

    folder: Path
    samples: Mapping[str, int]
    shapes: Mapping[str, tuple[int, ...]]
    skipped: Mapping[str, str]
    computed: int


def read_food101(source: str | Path, *, skip_bad: bool = False) -> tuple[list[FoodSample], dict[str, str]]:
    r"""Read which samples there are, and look whether the image of each lies where its class says.

    Lines may have commas in a title without quotes; bytes that are no UTF-8 are replaced. Images are not opened.

    Args:
        source: the folder of ``images`` and ``texts``.
        skip_bad: leave out samples that cannot be used, instead of raising.

    Returns:
        The samples, training part first, in the order of the files; and file and line → what is wrong, of those left
        out: no image, an image in another class's folder, an ID for the second time, a line without three cells.

    Raises:
        DataError: where a file or folder of the layout is missing, a quote is not closed, or samples cannot be used;
            it names the first of them and says how many there are.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as name:
        ...     folder = Path(name)
        ...     for part in PARTS:
        ...         (folder / "images" / part / "hot_dog").mkdir(parents=True)
        ...         (folder / "images" / part / "hot_dog" / f"hot_dog_{part}.jpg").touch()
        ...     (folder / "texts").mkdir()
        ...     for part in PARTS:
        ...         line = f'hot_dog_{part}.jpg,"Hot dogs, grilled",hot_dog\n'
        ...         _ = (folder / "texts" / f"{part}_titles.csv").write_text(line)
        ...     samples, _ = read_food101(folder)
        >>> [(sample.case, sample.title, sample.part) for sample in samples]
        [('hot_dog_train', 'Hot dogs, grilled', 'train'), ('hot_dog_test', 'Hot dogs, grilled', 'test')]
    """
    samples, bad = _listed(Path(source))
    if bad and not skip_bad:
        _refuse(bad, len(samples) + len(bad))
    return samples, bad


def prepare_food101(
    source: str | Path,
    out: str | Path,
    *,
    bert: str | Path = BERT,
    vit: str | Path = VIT,
    tokens: str = "cls",
    max_length: int = 64,
    skip_bad: bool = False,
    download: bool = False,
    batch_size: int = 32,
    device: str | None = None,
    workers: int | None = None,
    console: Console | None = None,
) -> FoodFeatures:
    """Encode the titles with BERT and the images with ViT, and write a folder for :func:`.load_features`.

    The folder has ``vision.npy`` and ``text.npy``, ``(N, D)`` in float32 or ``(N, T, D)`` in float16,
    ``text_lengths.npy`` for sequences, ``labels.csv`` (``id``, ``label``, ``split``) in the same order, and
    ``features.json``: models, their files' SHA-256, options, versions, and what was left out.

    All samples are checked before anything is encoded: every image is decoded once. Then the arrays grow in
    ``<out>.partial``, memory-mapped, and the folder gets its own name when it is complete. Stopped at any time, the
    same call goes on behind the last finished batch; with the same device and batch size the files are those of an
    uninterrupted run to the last byte. Another batch size changes values by rounding alone.

    Nothing here runs code from a model's files: weights are read from ``model.safetensors`` and from no other file.

    Args:
        source: folder of ``images`` and ``texts``.
        out: folder to make.
        bert: a folder with a BERT model and its tokenizer, or a name on the Hugging Face Hub.
        vit: the same, for a ViT model and its image processor.
        tokens: ``cls``: one vector a sample. ``all``: all positions.
        max_length: text tokens, [CLS] and [SEP] among them, at which a title is cut.
        skip_bad: leave out samples whose image is missing, lies elsewhere or cannot be decoded, and repeated ones.
        download: whether models may come from the network. Otherwise names are looked for in the local cache.
        batch_size: samples encoded at a time.
        device: such as ``cuda:0``; default: a GPU if there is one.
        workers: threads that decode images; default: one a core, at most 8.
        console: where to show progress; None: nowhere.

    Returns:
        What the folder holds.

    Raises:
        ValueError: for an option out of its range.
        FileExistsError: where ``out`` has files of something else.
        DataError: for models that cannot be had or do not fit, an ``out`` that was made or begun with other options,
            too little room on the disk, features that are not finite, and as in :func:`read_food101`.

    Example:
        >>> made = prepare_food101("UPMC-Food101", "food101", bert="models/bert", vit="models/vit")  # doctest: +SKIP
        >>> made.samples, made.shapes["text"]  # doctest: +SKIP
        ({'train': 67988, 'test': 22716}, (90704, 768))
    """
    workers = min(8, os.cpu_count() or 1) if workers is None else workers
    on = _checked_options(tokens, max_length, batch_size, workers, device)
    source, out = Path(source), Path(out).resolve()
    partial = out.with_name(out.name + ".partial")
    versions = _versions()
    models = _found_models(bert, vit, download=download)
    settings = _settings(source, models, tokens=tokens, max_length=max_length, skip_bad=skip_bad)
    if _is_made(out, settings):
        return _summary(out, computed=0)
    begun = _begun(partial, settings, versions)
    with _bar(console) as bar:
        samples, skipped = _usable_samples(source, begun, workers, bar, skip_bad=skip_bad)
        encoders = _Encoders.loaded(models, max_length, on)
        layout = _layout(encoders, samples, tokens)
        done = 0 if begun is None else _done(partial)
        _check_room(partial, layout, (len(samples) - done) / len(samples))
        if begun is None:
            named = {modality: {"name": model.name, "revision": model.revision} for modality, model in models.items()}
            facts = {"models": named, "settings": settings, "versions": versions, "skipped": skipped}
            _begin(partial, samples, layout, facts | {"device": str(on), "batch_size": batch_size})
        _encode(partial, samples, encoders, done, bar, tokens=tokens, batch_size=batch_size, workers=workers)
    _finish(partial, out)
    return _summary(out, computed=len(samples) - done)


def _checked_options(tokens: str, max_length: int, batch_size: int, workers: int, device: str | None) -> torch.device:
    if tokens not in ("cls", "all"):
        raise ValueError(f"tokens must be 'cls' or 'all', got {tokens!r}")
    if max_length < 3:
        raise ValueError(f"max_length must be at least 3: [CLS], one token and [SEP]; got {max_length}")
    if batch_size < 1 or workers < 1:
        raise ValueError(f"batch_size and workers must be at least 1, got {batch_size} and {workers}")
    try:
        chosen = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    except RuntimeError as error:
        raise ValueError(f"device {device!r} is unknown: {_first_line(error)}") from error
    if chosen.type == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"device is {device!r}, and PyTorch sees no GPU here")
    return chosen


# the samples


def _listed(source: Path) -> tuple[list[FoodSample], dict[str, str]]:
    lists = _title_files(source)
    folders_of = _folders_of_images(source, lists)
    samples: list[FoodSample] = []
    bad: dict[str, str] = {}
    listed: dict[str, str] = {}
    for part, path in lists.items():
        for line, cells in _title_rows(path):
            where = f"{path.name}, line {line}"
            name, title, label = cells[0].strip(), ",".join(cells[1:-1]).strip(), cells[-1].strip()
            case = Path(name).stem
            problem = _row_problem(cells, folders_of.get(name, []), f"{part}/{label}", listed.get(case))
            if problem:
                bad[where] = f"{case}: {problem}"
                continue
            listed[case] = where
            samples.append(FoodSample(case, title, label, part, source / "images" / part / label / name, where))
    return samples, bad


def _title_files(source: Path) -> dict[str, Path]:
    """The titles of each part that is there; a part is there if its titles or its images are, and needs both."""
    places = {part: (source / "texts" / f"{part}_titles.csv", source / "images" / part) for part in PARTS}
    there = {part: places[part] for part in PARTS if any(path.exists() for path in places[part])} or places
    missing = [titles for titles, _ in there.values() if not titles.is_file()]
    missing += [images for _, images in there.values() if not images.is_dir()]
    if missing:
        names = ", ".join(str(path.relative_to(source)) for path in missing)
        raise DataError([f"{source} has no {names}: expected UPMC-Food 101 with the folders images and texts"])
    return {part: titles for part, (titles, _) in there.items()}


def _title_rows(path: Path) -> Iterator[tuple[int, list[str]]]:
    with path.open(encoding="utf-8-sig", errors="replace", newline="") as file:
        reader = csv.reader(file)
        try:
            for cells in reader:
                if any(_SWALLOWED.search(cell) for cell in cells):
                    raise csv.Error("a quote is not closed, and the title runs over other rows")
                if cells:
                    yield reader.line_num, cells
        except csv.Error as error:
            raise DataError([f"{path}: {error} (it ends in line {reader.line_num})"]) from error


def _folders_of_images(source: Path, parts: Iterable[str]) -> dict[str, list[str]]:
    """Name of an image → where images of that name are, such as ``train/apple_pie``."""
    found: dict[str, list[str]] = {}
    for part in parts:
        for folder in sorted(path for path in (source / "images" / part).iterdir() if path.is_dir()):
            for entry in os.scandir(folder):
                found.setdefault(entry.name, []).append(f"{part}/{folder.name}")
    return found


def _row_problem(cells: Sequence[str], folders: Sequence[str], expected: str, listed: str | None) -> str | None:
    if len(cells) < 3 or not cells[0].strip() or not cells[-1].strip():
        return f"{len(cells)} cells, expected image name, title and class"
    if listed is not None:
        return f"is listed already ({listed})"
    if expected in folders:
        return None
    if folders:
        return f"its image is in images/{folders[0]}, expected in images/{expected}"
    return f"there is no image images/{expected}/{cells[0].strip()}"


def _usable_samples(
    source: Path, begun: Mapping[str, Any] | None, workers: int, bar: Progress, *, skip_bad: bool
) -> tuple[list[FoodSample], dict[str, str]]:
    """The samples to encode; those of a begun folder are what it says, so that they need not be decoded again."""
    samples, bad = _listed(source)
    total = len(samples) + len(bad)
    if begun is not None:
        skipped = begun["skipped"]
        if new := {where: problem for where, problem in bad.items() if where not in skipped}:
            _refuse(new, total, "could be used when the folder was begun")
        return [sample for sample in samples if sample.where not in skipped], skipped
    if not bad or skip_bad:  # no need to decode images for an error that is certain
        bad |= _undecodable(samples, workers, bar)
    if bad and not skip_bad:
        _refuse(bad, total)
    usable = [sample for sample in samples if sample.where not in bad]
    if not usable:
        _refuse(bad, total, "are all that there are")
    if bad:
        logger.warning("%d of %d samples are left out; %s says why", len(bad), total, _DESCRIPTION)
    return usable, bad


def _refuse(bad: Mapping[str, str], total: int, why: str = "") -> NoReturn:
    lines = [f"{problem} ({where})" for where, problem in list(bad.items())[:_SHOWN]]
    lines += [f"and {len(bad) - _SHOWN} more"] if len(bad) > _SHOWN else []
    head = f"{len(bad)} of {total} samples cannot be used{f' and {why}' if why else '; --skip-bad leaves them out'}"
    raise DataError(["\n  ".join([f"{head}:", *lines])])


def _undecodable(samples: Sequence[FoodSample], workers: int, bar: Progress) -> dict[str, str]:
    # Threads are enough: decoding releases the interpreter.
    with ThreadPoolExecutor(workers) as pool:
        problems = pool.map(_decoding_problem, samples)
        checked = bar.track(zip(samples, problems, strict=True), total=len(samples), description="Checking images")
        return {sample.where: f"{sample.case}: {problem}" for sample, problem in checked if problem}


def _decoding_problem(sample: FoodSample) -> str | None:
    try:
        _read_image(sample.path)
    except Exception as error:  # Pillow's decoders raise many kinds, and each means the same here
        return f"its image cannot be decoded: {_first_line(error)}"
    return None


def _read_image(path: Path) -> Image.Image:
    with Image.open(path) as image:
        return image.convert("RGB")


# the models


@dataclass(frozen=True)
class _Model:
    name: str
    folder: Path
    revision: str | None
    hashes: Mapping[str, str]


def _found_models(bert: str | Path, vit: str | Path, *, download: bool) -> dict[str, _Model]:
    found, problems = {}, []
    for modality, kind, name in (("text", "bert", bert), ("vision", "vit", vit)):
        try:
            found[modality] = _found_model(str(name), kind, download=download)
        except DataError as error:
            problems += error.problems
    if problems:
        raise DataError(problems)
    return found


def _found_model(name: str, kind: str, *, download: bool) -> _Model:
    local = Path(name).is_dir()
    folder = Path(name) if local else _snapshot(name, kind, download=download)
    there = [file for file in _FILES[kind] if (folder / file).is_file()]
    needed = [file for file in _FILES[kind] if file not in _TOKENIZER]
    problems = [f"{kind} {name}: {file} is missing in {folder}" for file in needed if file not in there]
    if kind == "bert" and not {"tokenizer.json", "vocab.txt"} & set(there):
        problems.append(f"{kind} {name}: tokenizer.json or vocab.txt is missing in {folder}")
    if "model.safetensors" not in there and (others := sorted(path.name for path in folder.glob("*.bin"))):
        problems.append(f"{kind} {name}: {others[0]} is not read, as such files can run code: save it as safetensors")
    if "config.json" in there and (found := _model_type(folder / "config.json")) != kind:
        problems.append(f"{kind} {name}: a model of type {found!r}, expected {kind!r} ({folder / 'config.json'})")
    if problems:
        raise DataError(problems)
    hashes = {file: _sha256(folder / file) for file in there}
    return _Model(name, folder, None if local else folder.name, hashes)


def _snapshot(name: str, kind: str, *, download: bool) -> Path:
    """The folder of a model of the Hub in the local cache."""
    hub = importlib.import_module("huggingface_hub")  # which transformers bring
    try:
        return Path(hub.snapshot_download(name, allow_patterns=list(_FILES[kind]), local_files_only=not download))
    except (OSError, ValueError) as error:  # all that the client raises for what is not there or not allowed
        what = f"not to be had from the Hugging Face Hub ({_first_line(error)})"
        if not download:
            what = f"not in the local cache: give its folder (--{kind} DIR), or allow the network (--download)"
        raise DataError([f"{kind} {name}: no folder, and {what}"]) from error


def _model_type(path: Path) -> Any:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return content.get("model_type") if isinstance(content, dict) else None


def _transformers() -> Any:
    # by name, as it is no dependency and has types of its own making
    try:
        module = importlib.import_module("transformers")
    except ImportError:
        module = None
    if not hasattr(module, "ViTImageProcessorPil"):
        found = "" if module is None else f", not {module.__version__}"
        raise DataError([f"encoding needs transformers 5.4 or newer{found}: pip install 'monai_cggm[food101]'"])
    return module


@dataclass(frozen=True)
class _Encoders:
    """Both networks and what makes their inputs."""

    tokenizer: Any
    bert: Any
    processor: Any
    vit: Any
    max_length: int
    device: torch.device

    @classmethod
    def loaded(cls, models: Mapping[str, _Model], max_length: int, device: torch.device) -> _Encoders:
        hf = _transformers()
        text, image = models["text"].folder, models["vision"].folder
        with _quiet(hf):
            bert, vit = _network(hf.BertModel, text), _network(hf.ViTModel, image)
            tokenizer = _loaded(hf.BertTokenizer, text)
            processor = _loaded(hf.ViTImageProcessorPil, image)  # the one that needs no torchvision
        if max_length > (most := bert.config.max_position_embeddings):
            raise ValueError(f"max_length is {max_length}, and the text model has {most} positions")
        if len(tokenizer) > (words := bert.config.vocab_size):
            raise DataError([f"the tokenizer has {len(tokenizer)} tokens, and its model {words} ({text})"])
        return cls(tokenizer, bert.to(device), processor, vit.to(device), max_length, device)

    def pixels(self, sample: FoodSample) -> Tensor:
        """``(3, H, W)``, as the model takes them."""
        try:
            image = _read_image(sample.path)
        except Exception as error:
            problem = f"its image cannot be decoded: {_first_line(error)}"
            raise DataError([f"{sample.case}: {problem} ({sample.path})"]) from error
        pixels: Tensor = self.processor(image, return_tensors="pt")["pixel_values"][0]
        return pixels

    def image(self, pixels: Tensor) -> Tensor:
        """The last hidden state, ``(B, P, D)``."""
        hidden: Tensor = self.vit(pixel_values=pixels.to(self.device)).last_hidden_state
        return hidden

    def text(self, titles: Sequence[str]) -> tuple[Tensor, Tensor]:
        """The last hidden state, ``(B, T, D)``, 0 in padding, and the lengths, ``(B,)``; T is the longest of them."""
        batch = self.tokenizer(
            list(titles), padding="longest", truncation=True, max_length=self.max_length, return_tensors="pt"
        ).to(self.device)
        mask: Tensor = batch["attention_mask"]
        hidden: Tensor = self.bert(**batch).last_hidden_state
        return hidden * mask[..., None], mask.sum(dim=1)


def _network(kind: Any, folder: Path) -> Any:
    """The network in float32 for inference, without a pooler; one that the weights do not fill is an error."""
    options = {"add_pooling_layer": False, "use_safetensors": True, "output_loading_info": True}
    network, found = _loaded(kind, folder, **options)
    lacking = sorted(map(str, {*found["missing_keys"], *found["mismatched_keys"]}))
    if lacking:
        what = f"the weights lack {len(lacking)} of its parameters, the first is {lacking[0]}"
        raise DataError([f"{kind.__name__}: {what} ({folder})"])
    return network.eval().float()


def _loaded(kind: Any, folder: Path, **options: Any) -> Any:
    try:
        return kind.from_pretrained(folder, local_files_only=True, trust_remote_code=False, **options)
    except Exception as error:  # of a broken file, its readers raise many kinds
        raise DataError([f"{kind.__name__} cannot be loaded: {_first_line(error)} ({folder})"]) from error


@contextmanager
def _quiet(hf: Any) -> Iterator[None]:
    """Without the bars and tables of a loading; what matters in them is checked."""
    level, bars = hf.logging.get_verbosity(), hf.logging.is_progress_bar_enabled()
    hf.logging.set_verbosity_error()
    hf.logging.disable_progress_bar()
    try:
        yield
    finally:
        hf.logging.set_verbosity(level)
        if bars:
            hf.logging.enable_progress_bar()


# the folder


def _settings(source: Path, models: Mapping[str, _Model], **options: Any) -> dict[str, Any]:
    """All that a feature depends on, besides images and versions."""
    weights = {f"{modality} model, {file}": h for modality, model in models.items() for file, h in model.hashes.items()}
    titles = {path.name: _sha256(path) for path in _title_files(source).values() if path.is_file()}
    return {**options, **weights, **titles}


def _versions() -> dict[str, str]:
    hf = _transformers()
    tokenizers = importlib.import_module("tokenizers")
    found = {"monai_cggm": __version__, "pillow": PIL.__version__, "torch": str(torch.__version__)}
    return found | {"tokenizers": str(tokenizers.__version__), "transformers": str(hf.__version__)}


def _is_made(out: Path, settings: Mapping[str, Any]) -> bool:
    """Whether the folder is complete; other settings than these, or files of something else, are an error."""
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return False
    if not (out / _DESCRIPTION).is_file():
        raise FileExistsError(f"{out} has files of something else: choose another folder")
    _refuse_other(out, _read_json(out / _DESCRIPTION)["settings"], settings, "made")
    return True


def _begun(partial: Path, settings: Mapping[str, Any], versions: Mapping[str, str]) -> dict[str, Any] | None:
    """What a folder that is not complete says of itself; other settings or versions than these are an error."""
    if not (partial / _DESCRIPTION).is_file():
        return None
    begun = _read_json(partial / _DESCRIPTION)
    _refuse_other(partial, begun["settings"] | begun["versions"], {**settings, **versions}, "begun")
    return begun


def _refuse_other(folder: Path, before: Mapping[str, Any], now: Mapping[str, Any], verb: str) -> None:
    other = [key for key in {**before, **now} if before.get(key) != now.get(key)]
    if other:
        lines = [f"{key}: {_short(before.get(key))} there, {_short(now.get(key))} now" for key in other]
        head = f"{folder} was {verb} otherwise: give the same options, delete it or choose another folder"
        raise DataError(["\n  ".join([head, *lines])])


def _short(value: Any) -> str:
    return "none" if value is None else str(value)[:12]  # of a hash, enough


def _done(partial: Path) -> int:
    file = partial / _PROGRESS
    return int(_read_json(file)["done"]) if file.is_file() else 0


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DataError([f"{path} cannot be read ({_first_line(error)}): delete {path.parent}"]) from error
    if not isinstance(content, dict):
        raise DataError([f"{path} holds no JSON object: delete {path.parent}"])
    return content


def _layout(encoders: _Encoders, samples: Sequence[FoodSample], tokens: str) -> dict[str, tuple[tuple[int, ...], str]]:
    """Shape and type of each array, after a trial with the first sample."""
    with _inference():
        image, text = encoders.image(encoders.pixels(samples[0])[None]), encoders.text([samples[0].title])[0]
    rows, positions, width = len(samples), image.shape[1], text.shape[-1]
    if tokens == "cls":
        return {"vision": ((rows, image.shape[-1]), "float32"), "text": ((rows, width), "float32")}
    return {
        "vision": ((rows, positions, image.shape[-1]), "float16"),
        "text": ((rows, encoders.max_length, width), "float16"),
        "text_lengths": ((rows,), "int32"),
    }


def _check_room(partial: Path, layout: Mapping[str, tuple[tuple[int, ...], str]], share: float) -> None:
    # A full disk would end the process without a word: a mapped file has its size from the start, and no room yet.
    needed = share * sum(np.prod(shape) * np.dtype(kind).itemsize for shape, kind in layout.values())
    there = next(path for path in (partial, *partial.parents) if path.exists())
    free = shutil.disk_usage(there).free
    if needed > free:
        raise DataError([f"{there}: the features take {needed / 1e9:.1f} GB, and {free / 1e9:.1f} GB are free"])


def _begin(
    partial: Path,
    samples: Sequence[FoodSample],
    layout: Mapping[str, tuple[tuple[int, ...], str]],
    facts: Mapping[str, Any],
) -> None:
    partial.mkdir(parents=True, exist_ok=True)
    (partial / _PROGRESS).unlink(missing_ok=True)
    for name, (shape, kind) in layout.items():
        open_memmap(partial / f"{name}.npy", mode="w+", dtype=kind, shape=shape)
    with (partial / "labels.csv").open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerows([("id", "label", "split"), *((s.case, s.label, s.part) for s in samples)])
    arrays = {name: {"shape": shape, "dtype": kind} for name, (shape, kind) in layout.items()}
    counts = Counter(sample.part for sample in samples)
    # comes last, and says that the rest is there
    _write_json(partial / _DESCRIPTION, {**facts, "samples": {part: counts[part] for part in PARTS}, "arrays": arrays})


def _encode(
    partial: Path,
    samples: Sequence[FoodSample],
    encoders: _Encoders,
    done: int,
    bar: Progress,
    *,
    tokens: str,
    batch_size: int,
    workers: int,
) -> None:
    names = ("vision", "text") if tokens == "cls" else ("vision", "text", "text_lengths")
    arrays = {name: np.load(partial / f"{name}.npy", mmap_mode="r+", allow_pickle=False) for name in names}
    task = bar.add_task("Encoding", total=len(samples), completed=done)
    batches = [samples[start : start + batch_size] for start in range(done, len(samples), batch_size)]
    with ThreadPoolExecutor(workers) as pool, _inference():
        for batch, pixels in zip(batches, _read_ahead(pool, encoders, batches), strict=True):
            _put(arrays, done, batch, encoders.image(pixels), *encoders.text([sample.title for sample in batch]))
            done += len(batch)
            for array in arrays.values():
                array.flush()
            _write_json(partial / _PROGRESS, {"done": done})
            bar.update(task, completed=done)


def _read_ahead(
    pool: ThreadPoolExecutor, encoders: _Encoders, batches: Iterable[Sequence[FoodSample]]
) -> Iterator[Tensor]:
    """Pixels of each batch, ``(B, 3, H, W)``; threads read those of the next one meanwhile."""
    reading = None
    for batch in batches:
        following = [pool.submit(encoders.pixels, sample) for sample in batch]
        if reading is not None:
            yield torch.stack([pixels.result() for pixels in reading])
        reading = following
    if reading is not None:
        yield torch.stack([pixels.result() for pixels in reading])


def _put(
    arrays: Mapping[str, np.ndarray],
    start: int,
    batch: Sequence[FoodSample],
    image: Tensor,
    text: Tensor,
    lengths: Tensor,
) -> None:
    """Write a batch's rows: [CLS], which is the first position, or all positions."""
    rows = slice(start, start + len(batch))
    for name, hidden in (("vision", image), ("text", text)):
        array = arrays[name]
        with np.errstate(over="ignore"):  # what becomes infinite is found here
            values = hidden.cpu().numpy().astype(array.dtype)
        finite = np.isfinite(values).reshape(len(batch), -1).all(axis=1)
        if not finite.all():
            case = batch[int(finite.argmin())].case
            raise DataError([f"{case}: its {name} features are not finite in {array.dtype}"])
        if array.ndim == 2:
            array[rows] = values[:, 0]
        else:
            array[rows, : values.shape[1]] = values
            array[rows, values.shape[1] :] = 0
    if "text_lengths" in arrays:
        arrays["text_lengths"][rows] = lengths.cpu().numpy()


@contextmanager
def _inference() -> Iterator[None]:
    # On a GPU, the patches' convolution is in float32 like all the rest, and the same one in every run.
    with torch.inference_mode(), torch.backends.cudnn.flags(enabled=True, deterministic=True, allow_tf32=False):
        yield


def _finish(partial: Path, out: Path) -> None:
    for stray in partial.glob(".tmp*"):  # of a process that was killed while it wrote its progress
        stray.unlink()
    if out.is_dir():
        out.rmdir()  # is empty
    os.replace(partial, out)
    (out / _PROGRESS).unlink(missing_ok=True)


def _summary(out: Path, *, computed: int) -> FoodFeatures:
    made = _read_json(out / _DESCRIPTION)
    shapes = {name: tuple(made["arrays"][name]["shape"]) for name in ("vision", "text")}
    return FoodFeatures(out, made["samples"], shapes, made["skipped"], computed)


def _write_json(path: Path, content: Mapping[str, Any]) -> None:
    with atomic_path(path) as temporary:
        temporary.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]


def _bar(console: Console | None) -> Progress:
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    return Progress(*columns, console=console, disable=console is None)
