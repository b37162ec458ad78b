"""Tool calls in an answer: ``<tool_call>`` blocks with JSON, or nothing but JSON."""

import json
import re
import uuid
from collections.abc import Collection

from pst_ds.inference.serve.protocol import JsonTable

_MARK = "<tool_call>"
_BLOCK = re.compile(r"<tool_call>(.*?)(?:</tool_call>|$)", re.DOTALL)


class ToolCalls:
    """Separates the text of an answer from its calls, as its pieces arrive."""

    def __init__(self, names: Collection[str]):
        """``names``: tools that may be called."""
        self._names = frozenset(names)
        self._held = ""
        """Text that may be a call, or the start of one."""
        self._is_text = False
        """True if the answer does not start with JSON."""

    def add(self, piece: str) -> str:
        """Return the text that is certainly not a call."""
        self._held += piece
        start = self._held.lstrip()
        if not self._is_text and (not start or start[0] in "{["):
            return ""
        self._is_text = True
        upto = self._held.find(_MARK)
        if upto < 0:
            # the end of the text may be the start of a mark whose rest has not arrived
            upto = len(self._held)
            for size in range(len(_MARK) - 1, 0, -1):
                if self._held.endswith(_MARK[:size]):
                    upto -= size
                    break
        text = self._held[:upto]
        self._held = self._held[upto:]
        return text

    def end(self) -> tuple[str, list[JsonTable]]:
        """Return the rest of the text and the calls; what looked like calls but is not valid is text."""
        blocks = _BLOCK.findall(self._held) or [self._held]
        try:
            calls: list[JsonTable] = []
            for block in blocks:
                calls += self._read(block)
        except (ValueError, RecursionError):
            return self._held, []
        return "", calls

    def _read(self, block: str) -> list[JsonTable]:
        """Return the calls in a block. Raises ValueError if it is something else."""
        table = json.loads(block)
        calls: list[JsonTable] = []
        for call in table if isinstance(table, list) else [table]:
            arguments = None
            if isinstance(call, dict):
                arguments = call.get("arguments", call.get("parameters"))  # Llama 3 writes "parameters"
            if not isinstance(arguments, dict) or call.get("name") not in self._names:
                raise ValueError("not a call of a tool")
            text = json.dumps(arguments, ensure_ascii=False)
            text.encode()  # raises for an unpaired surrogate, which no reply can have
            function = {"name": call["name"], "arguments": text}
            calls.append({"id": f"call_{uuid.uuid4().hex[:24]}", "type": "function", "function": function})
        return calls
