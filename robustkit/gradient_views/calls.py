"""Calls of torch's functions that keep their values and get smooth gradients where their own are useless."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from robustkit.gradient_views import smooth_rules
from robustkit.gradient_views.findings import Findings
from robustkit.gradient_views.indexing import LOOKUPS, SELECTING, find_selection, table_slope
from robustkit.gradient_views.smooth_rules import LOGIC, RULES
from robustkit.gradient_views.straight_through import with_gradient_of
from robustkit.gradient_views.surrogate_gradients import SurrogateGradients

CASTS = ("to", "type", "type_as", "int", "long", "byte", "char", "short", "bool")


class SmoothCalls:
    """Makes the calls of a forward pass; `own` has the ids of the model's tensors, which get no gradient."""

    def __init__(self, surrogates: SurrogateGradients, findings: Findings) -> None:
        """Start without tensors of the model."""
        self.surrogates, self.findings = surrogates, findings
        self.own: set[int] = set()

    def fresh(self, func: Any, name: str, args: Any, kwargs: Any) -> Any:
        """Call a function that returns new tensors."""
        real = func(*args, **kwargs)
        found = (
            find_selection(name, real, self.surrogates.substituted(args[0]), args, kwargs)
            if name in SELECTING
            else None
        )
        if found is not None:
            self.surrogates.chosen[found[0]] = found[1]
        elif isinstance(real, Tensor):
            surrogate = self._surrogate(func, name, real, args, kwargs)
            if surrogate is not None:
                return self.surrogates.attached(real, surrogate)
        elif self.surrogates.has_surrogate((args, kwargs)):
            try:
                surrogates = func(*self.surrogates.substituted(args), **self.surrogates.substituted(kwargs))
                pairs = zip(real, surrogates, strict=True)
                return type(real)([self.surrogates.attached(a, b) for a, b in pairs])
            except Exception:
                return real
        return real

    def in_place(self, func: Any, pure: Any, name: str, args: Any, kwargs: Any) -> Any:
        """Call a function that changes its first argument."""
        target = args[0]
        if not isinstance(target, Tensor):
            return func(*args, **kwargs)
        if id(target) in self.own:
            with torch.no_grad():
                return func(*args, **kwargs)
        if not (
            name in RULES or name in LOGIC or name == "scatter" or self.surrogates.has_surrogate((args, kwargs))
        ):
            return func(*args, **kwargs)
        before, was = target.detach().clone(), self.surrogates.of(target)
        real = before.clone()
        func(real, *args[1:], **kwargs)
        old = (
            was.clone() if was is not None else (target.clone() if target.is_floating_point() else before.float())
        )
        if pure is not None:
            surrogate = self._surrogate(pure, name, real, (old, *args[1:]), kwargs)
        else:
            surrogate = self._set(old, args)
        if surrogate is None or not surrogate.requires_grad or surrogate.shape != real.shape:
            return func(*args, **kwargs)
        if target.is_floating_point():
            return target.copy_(with_gradient_of(real, surrogate))
        target.copy_(real)
        self.surrogates.keep(target, surrogate)
        return target

    def _surrogate(self, func: Any, name: str, real: Tensor, args: Any, kwargs: Any) -> Tensor | None:
        """Return the tensor whose gradient replaces that of the result; None to keep the result's own."""
        try:
            own = self._chosen_mask(name, real, args, kwargs)
            if own is not None:
                return own
            a, k = self.surrogates.substituted(args), self.surrogates.substituted(kwargs)
            has_surrogate = self.surrogates.has_surrogate((args, kwargs))
            if name == "where" and func is Tensor.where:
                a = (a[1], a[0], *a[2:])
            if name == "div" and kwargs.get("rounding_mode") is not None:
                name = "floor_divide"
            if has_surrogate and name in LOGIC:
                return LOGIC[name](*a, **k)
            if (
                has_surrogate
                and name in LOOKUPS
                and (found := table_slope(name, args, self._index(name, args))) is not None
            ):
                return self._noted("looks up", found)
            if name in RULES and (surrogate := RULES[name][0](*a, **k)) is not None:
                return self._noted(RULES[name][1], surrogate)
            if name in CASTS and (has_surrogate or not real.is_floating_point()):
                return self._cast(real, a[0])
            if has_surrogate:
                return func(*a, **{key: value for key, value in k.items() if key != "dtype"})  # type: ignore[no-any-return]
            made = name.endswith("like") or name.startswith("new")
            if not made and not real.requires_grad and real.is_floating_point() and real.shape == a[0].shape:
                return smooth_rules.identity(a[0])
        except Exception:  # a call that no rule covers keeps its own gradient
            return None
        return None

    def _cast(self, real: Tensor, x: Tensor) -> Tensor:
        if real.is_floating_point():
            return x.to(real.device, real.dtype) * 1
        return self._noted("rounds", x.to(real.device) * 1)

    def _noted(self, what: str, surrogate: Tensor) -> Tensor:
        self.findings.note(what)
        return surrogate

    def _set(self, old: Tensor, args: Any) -> Tensor | None:
        """Return a smooth version of `old[index] = value`."""
        index, value = args[1], self.surrogates.substituted(args[2])
        mask = self.surrogates.of(index) if isinstance(index, Tensor) else None
        try:
            if mask is not None and index.dtype == torch.bool and mask.shape == old.shape:
                if isinstance(value, Tensor) and value.dim() > 0:
                    filled = old.detach().clone()
                    filled[index] = value
                    value = filled
                return smooth_rules.where(mask, value, old)
            new = old.clone()
            new[index] = value
            return new
        except Exception:
            return None

    def _chosen_mask(self, name: str, real: Tensor, args: Any, kwargs: Any) -> Tensor | None:
        """Return the smooth one-hot code or mask of selected indices; None for other functions."""
        if name not in ("one_hot", "scatter"):
            return None
        if name == "one_hot":
            picked = self.surrogates.chosen.get(args[0])
            point = self.surrogates.of(args[0])
            code = picked.code(real.shape[-1]) if picked is not None else None
            if code is None and point is not None:
                code = smooth_rules.smooth_one_hot(point, real.shape[-1])
            return None if code is None else self._noted("chooses", code)
        base, dim, index, value = (*args, *kwargs.values())[:4]
        picked = self.surrogates.chosen.get(index)
        if picked is None or picked.source.shape != real.shape:
            return None
        value = self.surrogates.substituted(value)
        if isinstance(value, Tensor) and value.dim() > 0:
            value = base.scatter(dim, index, value)
        return self._noted("chooses", smooth_rules.where(picked.mask(), value, self.surrogates.substituted(base)))

    def _index(self, name: str, args: Any) -> Tensor | None:
        index = args[0] if name == "embedding" else args[-1]
        return self.surrogates.of(index) if isinstance(index, Tensor) else None
