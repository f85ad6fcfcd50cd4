"""The router's own questions to engines: which content a name has."""

from collections.abc import Iterator

from loraplex.engine.ipc.messages.frontend import AdapterCommand


class HashQuestions:
    """Asks for the content hash of a name once; residency is reported by hash."""

    def __init__(self, ids: Iterator[int]) -> None:
        """`ids` yields numbers that no command of the frontend has."""
        self._ids = ids
        self._asked: dict[int, tuple[str, str]] = {}  # id -> engine, name
        self._names: set[str] = set()

    def ask(self, engine_id: str, name: str) -> AdapterCommand | None:
        """Returns the question for an engine; None if another one is open for this name."""
        if name in self._names:
            return None
        command_id = next(self._ids)
        self._asked[command_id] = (engine_id, name)
        self._names.add(name)
        return AdapterCommand(command_id, "list", name)

    def on_reply(self, command_id: int) -> None:
        """Closes a question. Other ids do no harm."""
        if command_id in self._asked:
            self._names.discard(self._asked.pop(command_id)[1])

    def lose_engine(self, engine_id: str) -> None:
        """Closes the questions to an engine that is gone."""
        for command_id in [key for key, (asked, _) in self._asked.items() if asked == engine_id]:
            self.on_reply(command_id)
