# SPDX-License-Identifier: Apache-2.0
"""Several handlers at one place of a list."""

from __future__ import annotations

import logging
from collections.abc import Iterable
from typing import Any, Protocol

import ignite.distributed as idist
from ignite.engine import Engine

logger = logging.getLogger(__name__)


class Handler(Protocol):
    """What MONAI's engines take in their lists of handlers."""

    def attach(self, engine: Any) -> Any:
        """Register on an engine."""


class InOrder:
    """Attach handlers one after the other, pass over those that are None, and log what was attached.

    MONAI wants every item of ``train#handlers`` to be a component in the list itself. This one holds components that
    other parts of a configuration refer to, and that an overlay may switch off with ``null``: the balancing method, the
    clipping after it, the log of both.

    Args:
        handlers: handlers, or None.

    Example:
        >>> from monai_cggm.handlers import ClipGradients
        >>> import torch
        >>> InOrder([None, ClipGradients([torch.nn.Linear(1, 1)], 1.0)]).names
        ['ClipGradients']
    """

    def __init__(self, handlers: Iterable[Handler | None]) -> None:
        self.handlers = [handler for handler in handlers if handler is not None]

    @property
    def names(self) -> list[str]:
        """The classes of the handlers, in their order."""
        return [type(handler).__name__ for handler in self.handlers]

    def attach(self, engine: Engine) -> None:
        """Attach all of them."""
        for handler in self.handlers:
            handler.attach(engine)
        if idist.get_rank() == 0:
            logger.info("attached in this order: %s", ", ".join(self.names))
