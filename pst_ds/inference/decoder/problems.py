"""Facts about a model that the decoder's table cannot express."""


class Problems:
    """Facts for one message: each once, in the order in which they were noticed."""

    def __init__(self) -> None:
        # a dict keeps the order, which a set does not
        self._facts: dict[str, None] = {}

    def note(self, fact: str) -> None:
        self._facts[fact] = None

    def __len__(self) -> int:
        return len(self._facts)

    def __str__(self) -> str:
        return "; ".join(self._facts)
