# SPDX-License-Identifier: Apache-2.0
from ignite.engine import Engine, Events

from monai_cggm.handlers import InOrder


class Note:
    def __init__(self, name, notes):
        self.name, self.notes = name, notes

    def attach(self, engine):
        engine.add_event_handler(Events.STARTED, lambda: self.notes.append(self.name))


def test_handlers_act_in_their_order_and_none_is_passed_over(caplog):
    notes = []
    engine = Engine(lambda engine, batch: None)
    with caplog.at_level("INFO"):
        InOrder([Note("method", notes), None, Note("clip", notes)]).attach(engine)
    engine.run([0])
    assert notes == ["method", "clip"]
    assert "attached in this order: Note, Note" in caplog.text
