"""Calls of torch's functions: their own values, with the gradient of something smooth where theirs says little."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from robustkit.gradient_views import smooth_rules
from robustkit.gradient_views.findings import Findings
from robustkit.gradient_views.indexing import CHOOSING, TABLES, chosen, entry
from robustkit.gradient_views.smooth_rules import LOGIC, RULES
from robustkit.gradient_views.straight_through import through
from robustkit.gradient_views.surrogate_gradients import SurrogateGradients

CASTS = ("to", "type", "type_as", "int", "long", "byte", "char", "short", "bool")


class SmoothCalls:
    """Makes the calls of a forward pass; `own` are the ids of the model's tensors, left without gradients."""

    def __init__(self, stand_ins: SurrogateGradients, mends: Findings) -> None:
        """Begin with nothing of the model's own."""
        self.stand_ins, self.mends = stand_ins, mends
        self.own: set[int] = set()

    def fresh(self, func: Any, name: str, args: Any, kwargs: Any) -> Any:
        """Call a function that returns something new."""
        real = func(*args, **kwargs)
        found = chosen(name, real, self.stand_ins.swapped(args[0]), args, kwargs) if name in CHOOSING else None
        if found is not None:
            self.stand_ins.chosen[found[0]] = found[1]
        elif isinstance(real, Tensor):
            stand_in = self._stand_in(func, name, real, args, kwargs)
            if stand_in is not None:
                return self.stand_ins.joined(real, stand_in)
        elif self.stand_ins.tracked((args, kwargs)):
            try:
                stand_ins = func(*self.stand_ins.swapped(args), **self.stand_ins.swapped(kwargs))
                pairs = zip(real, stand_ins, strict=True)
                return type(real)([self.stand_ins.joined(a, b) for a, b in pairs])
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
        if not (name in RULES or name in LOGIC or name == "scatter" or self.stand_ins.tracked((args, kwargs))):
            return func(*args, **kwargs)
        before, was = target.detach().clone(), self.stand_ins.of(target)
        real = before.clone()
        func(real, *args[1:], **kwargs)
        old = (
            was.clone() if was is not None else (target.clone() if target.is_floating_point() else before.float())
        )
        if pure is not None:
            stand_in = self._stand_in(pure, name, real, (old, *args[1:]), kwargs)
        else:
            stand_in = self._set(old, args)
        if stand_in is None or not stand_in.requires_grad or stand_in.shape != real.shape:
            return func(*args, **kwargs)
        if target.is_floating_point():
            return target.copy_(through(real, stand_in))
        target.copy_(real)
        self.stand_ins.keep(target, stand_in)
        return target

    def _stand_in(self, func: Any, name: str, real: Tensor, args: Any, kwargs: Any) -> Tensor | None:
        """Return what the result's gradient is to be that of; None: its own."""
        try:
            own = self._chosen_mask(name, real, args, kwargs)
            if own is not None:
                return own
            a, k = self.stand_ins.swapped(args), self.stand_ins.swapped(kwargs)
            tracked = self.stand_ins.tracked((args, kwargs))
            if name == "where" and func is Tensor.where:
                a = (a[1], a[0], *a[2:])
            if name == "div" and kwargs.get("rounding_mode") is not None:
                name = "floor_divide"
            if tracked and name in LOGIC:
                return LOGIC[name](*a, **k)
            if tracked and name in TABLES and (found := entry(name, args, self._index(name, args))) is not None:
                return self._noted("looks up", found)
            if name in RULES and (stand_in := RULES[name][0](*a, **k)) is not None:
                return self._noted(RULES[name][1], stand_in)
            if name in CASTS and (tracked or not real.is_floating_point()):
                return self._cast(real, a[0])
            if tracked:
                return func(*a, **{key: value for key, value in k.items() if key != "dtype"})  # type: ignore[no-any-return]
            made = name.endswith("like") or name.startswith("new")
            if not made and not real.requires_grad and real.is_floating_point() and real.shape == a[0].shape:
                return smooth_rules.same(a[0])
        except Exception:  # a function used in a way that no rule knows keeps its own gradient
            return None
        return None

    def _cast(self, real: Tensor, x: Tensor) -> Tensor:
        if real.is_floating_point():
            return x.to(real.device, real.dtype) * 1
        return self._noted("rounds", x.to(real.device) * 1)

    def _noted(self, what: str, stand_in: Tensor) -> Tensor:
        self.mends.note(what)
        return stand_in

    def _set(self, old: Tensor, args: Any) -> Tensor | None:
        """Return the smooth `old[index] = value`."""
        index, value = args[1], self.stand_ins.swapped(args[2])
        mask = self.stand_ins.of(index) if isinstance(index, Tensor) else None
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
        """Return the smooth one-hot code or mask of chosen indices; None if it is none."""
        if name not in ("one_hot", "scatter"):
            return None
        if name == "one_hot":
            picked = self.stand_ins.chosen.get(args[0])
            at = self.stand_ins.of(args[0])
            code = picked.code(real.shape[-1]) if picked is not None else None
            if code is None and at is not None:
                code = smooth_rules.levels(at, real.shape[-1])
            return None if code is None else self._noted("chooses", code)
        base, dim, index, value = (*args, *kwargs.values())[:4]
        picked = self.stand_ins.chosen.get(index)
        if picked is None or picked.source.shape != real.shape:
            return None
        value = self.stand_ins.swapped(value)
        if isinstance(value, Tensor) and value.dim() > 0:
            value = base.scatter(dim, index, value)
        return self._noted("chooses", smooth_rules.where(picked.mask(), value, self.stand_ins.swapped(base)))

    def _index(self, name: str, args: Any) -> Tensor | None:
        index = args[0] if name == "embedding" else args[-1]
        return self.stand_ins.of(index) if isinstance(index, Tensor) else None
