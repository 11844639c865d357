"""The places in a traced forward pass whose gradient stops or misleads, and what replaces it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

REMEDIES = {
    "rounds": "the gradient of its argument is used",
    "takes signs": "the gradient of a wide tanh is used",
    "takes steps": "the gradient of a wide sigmoid is used",
    "compares": "the gradient of a wide sigmoid is used",
    "saturates": "the gradient at a smaller argument is used",
    "oscillates": "its gradient is left out",
    "bends": "the gradient of wide secants is used",
    "clamps": "the gradient of its argument is used",
    "chooses": "the gradient of a softmax or sigmoid of its argument is used",
    "detaches": "the gradient continues as without it",
    "switches gradients off": "they stay on",
    "leaves torch": "a tensor that comes back in the same shape has the gradient of the one that left",
    "writes its own backward pass": "its forward code is differentiated",
    "changes gradients by a hook": "the hook is left out",
    "looks up": "the slope between neighbouring entries is used",
}


@dataclass(frozen=True)
class Finding:
    """A place where the gradient stops or misleads: the module, what it does there, and what is used instead."""

    where: str
    what: str
    remedy: str


class Findings:
    """Findings in order, and the stack of modules that are being run."""

    def __init__(self) -> None:
        """Start outside the net."""
        self.found: dict[Finding, None] = {}
        self._stack: list[str] = []

    def note(self, what: str, name: str = "") -> None:
        """Add a finding: a key of `REMEDIES`, in the function of that name, in the module that is being run."""
        where = self._stack[-1] if self._stack else "before the net"
        self.found[Finding(f"{where} ({name})" if name else where, what, REMEDIES[what])] = None

    def enter(self, name: str) -> Callable[..., None]:
        """Return a hook that pushes a module's name when it is called."""
        return lambda module, args: self._stack.append(name)

    def leave(self) -> None:
        """Return to the enclosing module."""
        if self._stack:
            self._stack.pop()

    def stop(self) -> None:
        """Return to outside the net."""
        self._stack = []
