# SPDX-License-Identifier: Apache-2.0
"""Load a trained model, and say plainly where it does not fit."""

from __future__ import annotations

from pathlib import Path

from ignite.engine import Engine
from monai.handlers import CheckpointLoader

from monai_cggm.errors import DataError


class ModelLoader(CheckpointLoader):
    """MONAI's ``CheckpointLoader`` with an error that a user can act on; arguments as there.

    Raises:
        DataError: when the engine starts: there is no such file, or its weights are those of another network.

    Example:
        >>> import torch
        >>> ModelLoader("no_such_run/model.pt", {"model": torch.nn.Linear(2, 1)})(Engine(lambda engine, batch: None))
        Traceback (most recent call last):
            ...
        monai_cggm.errors.DataError: no_such_run/model.pt: no such file; a training writes model.pt to its run folder
    """

    def __call__(self, engine: Engine) -> None:
        """Load the objects."""
        if not Path(self.load_path).is_file():
            raise DataError([f"{self.load_path}: no such file; a training writes model.pt to its run folder"])
        try:
            super().__call__(engine)
        except (RuntimeError, ValueError) as error:
            reason = " ".join(str(error).split())
            raise DataError(
                [
                    f"{self.load_path}: its weights do not fit this network; give the overlays and the network's sizes "
                    f"of its training ({reason[:300]})"
                ]
            ) from error
