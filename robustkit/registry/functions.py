"""An attack given as a plain function `(model, x, y, eps) -> x_adv`, without class or decorator."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

from robustkit.core.errors import UsageError, did_you_mean
from robustkit.registry.code_files import load_reference, plain_values, reference_of
from robustkit.registry.decorators import Info


@dataclass(frozen=True)
class FunctionAttack:
    """A function as an attack; the engine projects and verifies what it returns.

    Its random numbers are torch's global ones, seeded for each batch, so they depend on the batch size.

    Attributes:
        function: called as `function(model, x, y, eps, **keywords)` with images x (B C H W) in [0, 1], labels y
            (B) and eps in [0, 1] pixel units (for l2 and l1, the radius); returns images (B C H W).
        keywords: further arguments.
    """

    function: Callable[..., Any]
    keywords: Mapping[str, Any] = field(default_factory=dict, hash=False)

    info: ClassVar[Info] = Info(
        "attack", "function", norms=("linf", "l2", "l1"), access="any", coupled=True, family=True
    )

    def __post_init__(self) -> None:
        """Refuse arguments that the function does not take.

        Raises:
            UsageError: for such an argument.
        """
        parameters = inspect.signature(self.function).parameters
        known = [name for name, parameter in parameters.items() if parameter.kind is not parameter.VAR_KEYWORD]
        for name in self.keywords:
            if name not in known and len(known) == len(parameters):
                raise did_you_mean(f"field of {self.name}", name, known[4:])

    @property
    def name(self) -> str:
        """The function's name."""
        function = self.function.func if isinstance(self.function, functools.partial) else self.function
        return str(getattr(function, "__name__", type(function).__name__))

    def fields(self) -> dict[str, Any]:
        """Return the arguments, and the numbers and texts that the function holds, for a record."""
        function: Any = self.function
        bound: dict[str, Any] = {}
        while isinstance(function, functools.partial):
            bound |= {f"arg{index}": value for index, value in enumerate(function.args)} | function.keywords
            function = function.func
        values = plain_values(function) | bound | dict(self.keywords)
        plain = (bool, int, float, str)
        return {name: value if isinstance(value, plain) else repr(value) for name, value in values.items()}

    def __call__(self, model: Any, x: Any, goal: Any, threat: Any, *, rng: Any) -> Any:
        """Return the function's images, detached; UsageError for a targeted goal, which it does not support."""
        if goal.targets is not None:
            raise UsageError(f"{self.name} is a function of labels and cannot be given target classes.")
        return self.function(model, x, goal.labels, float(threat.eps), **self.keywords).detach()

    def __reduce__(self) -> tuple[Any, ...]:
        """Let workers load the function, by its file where it was loaded from one."""
        return _restored, (reference_of(self.function) or self.function, dict(self.keywords))


def _restored(function: Any, keywords: dict[str, Any]) -> FunctionAttack:
    return FunctionAttack(load_reference(function) if isinstance(function, str) else function, keywords)


def is_plain_function(function: Any) -> bool:
    """Return whether something may be an attack given as a function: a callable, not registered and no class."""
    return callable(function) and not inspect.isclass(function) and not hasattr(function, "info")
