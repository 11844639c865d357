"""What a mended forward pass says of itself: where the gradient stops or lies, and what is done about it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

REMEDIES = {
    "rounds": "its gradient is taken for that of its argument",
    "takes signs": "its gradient is taken for that of a wide tanh",
    "takes steps": "its gradient is taken for that of a wide sigmoid",
    "compares": "its gradient is taken for that of a wide sigmoid",
    "saturates": "its gradient is taken at a smaller argument",
    "oscillates": "its gradient is left out",
    "bends": "its gradient is taken for that of wide secants",
    "clamps": "its gradient is taken for that of its argument",
    "chooses": "its gradient is taken for that of a softmax or sigmoid of what it chose from",
    "detaches": "the gradient goes on as if it did not",
    "switches gradients off": "they stay on",
    "leaves torch": "what comes back in the same shape has the gradient of what left",
    "writes its own backward pass": "its forward pass is differentiated as written",
    "changes gradients by a hook": "the hook is left out",
    "looks up": "its gradient is taken for the slope between neighbouring entries",
}


@dataclass(frozen=True)
class Finding:
    """A place where the gradient stops or lies: the module, what it does there, and what is done about it."""

    where: str
    what: str
    remedy: str


class Findings:
    """Mends in the order found, and the modules that are being run."""

    def __init__(self) -> None:
        """Begin outside the net."""
        self.found: dict[Finding, None] = {}
        self._stack: list[str] = []

    def note(self, what: str, name: str = "") -> None:
        """Note what is done, a key of `REMEDIES`, by what has that name, in the module that is being run."""
        where = self._stack[-1] if self._stack else "before the net"
        self.found[Finding(f"{where} ({name})" if name else where, what, REMEDIES[what])] = None

    def enter(self, name: str) -> Callable[..., None]:
        """Return a hook that says that the module of that name is being run."""
        return lambda module, args: self._stack.append(name)

    def leave(self) -> None:
        """Be in the module around it again."""
        if self._stack:
            self._stack.pop()

    def stop(self) -> None:
        """Be outside the net again."""
        self._stack = []
