"""A forward pass whose gradient does not stop where the model's does, and a record of where that was.

`Mending` is a context. Inside it every value is the model's own, to the bit; only what autograd sees is another:
rounded, compared and chosen numbers have the gradient of something smooth (`smooth`), detached ones that of what
they were detached from, numbers that went through numpy or Pillow and came back in the same shape that of what
left, and a `torch.autograd.Function` that of its forward as written. This is BPDA (Athalye et al. 2018,
arXiv:1802.00420) without being told where. Nothing of the model is changed. A compiled net runs eagerly inside;
what calls torch from C++, as a scripted one does, is not seen.
"""

from __future__ import annotations

import inspect
from collections import OrderedDict
from collections.abc import Sequence
from contextlib import ExitStack, nullcontext, suppress
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_map

from robustkit.gradient_views.calls import SmoothCalls
from robustkit.gradient_views.custom_autograd import Recent, foreign, forward_of, rewritten
from robustkit.gradient_views.elementwise import bent, mended
from robustkit.gradient_views.findings import Finding, Findings
from robustkit.gradient_views.heads import Heads, tensors
from robustkit.gradient_views.indexing import CHOOSING
from robustkit.gradient_views.numpy_bridge import LEAVING, NumpyBridge
from robustkit.gradient_views.random_means import DRAWS
from robustkit.gradient_views.surrogate_gradients import SurrogateGradients

DATA = torch.Tensor.data.__get__  # type: ignore[attr-defined]


class Tracer(TorchFunctionMode):
    """See the module. `found` says what was mended, `drew` whether torch drew random numbers."""

    def __init__(
        self,
        model: nn.Module,
        *,
        heads: Heads | None = None,
        told: bool = False,
        calm: bool = False,
        loose: bool = False,
        bends: Sequence[nn.Module] = (),
        sources: list[Tensor] | None = None,
    ) -> None:
        """Take the model that will be run inside.

        Args:
            model: What is run.
            heads: What looks for heads among the results.
            told: Note the names of modules, by hooks that are gone afterwards.
            calm: Replace the random draws of torch by their means.
            loose: Give values up as well, in rows where what stands in for them is near.
            bends: Modules to be mended as wholes; told, they are looked for instead.
            sources: A list that is given what leaves torch, and what indices are chosen from.
        """
        super().__init__()
        self.model, self.heads, self.told, self.sources = model, heads, told, sources
        self.calm, self.loose = calm, loose
        self.drew = False
        self.bends = list(bends)
        self._mends = Findings()
        self._begin()

    def _begin(self) -> None:
        """Hold nothing."""
        self._stand_ins = SurrogateGradients(self.loose)
        self._abroad = NumpyBridge(self._stand_ins, self._mends)
        self._calls = SmoothCalls(self._stand_ins, self._mends)
        self._recent = Recent()
        self._open: ExitStack | None = None

    @property
    def found(self) -> dict[Finding, None]:
        """What was mended, in the order found."""
        return self._mends.found

    def __enter__(self) -> Tracer:
        """Begin."""
        with ExitStack() as stack:
            apply = inspect.getattr_static(torch.autograd.Function, "apply")
            stack.enter_context(patch.object(torch._C, "_InferenceMode", self._inference))
            stack.enter_context(patch.object(torch, "from_numpy", self._abroad.entering(torch.from_numpy)))
            stack.enter_context(patch.object(torch.autograd.Function, "apply", self._applying(apply)))
            if any(type(module).__name__ == "OptimizedModule" for module in self.model.modules()):
                stack.enter_context(torch.compiler.set_stance("force_eager"))
            for name, module in self.model.named_modules():
                for hooks in ("_backward_hooks", "_backward_pre_hooks"):
                    if getattr(module, hooks):
                        self._mends.note("changes gradients by a hook", name)
                        stack.enter_context(patch.object(module, hooks, OrderedDict()))
                if module in self.bends:
                    stack.callback(module.register_forward_hook(self._bend).remove)
                if self.told and name:
                    stack.callback(module.register_forward_pre_hook(self._mends.enter(name)).remove)
                    stack.callback(module.register_forward_hook(self._leave_module, always_call=True).remove)
            self._calls.own = {id(tensor) for tensor in (*self.model.parameters(), *self.model.buffers())}
            super().__enter__()  # type: ignore[no-untyped-call]
            stack.push(super().__exit__)
            self._open = stack.pop_all()
        return self

    def __exit__(self, *error: Any) -> None:
        """End; what was held for the pass is let go."""
        if self._open is not None:
            self._open.__exit__(*error)
        self._mends.stop()
        self._begin()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Call the function, see to its gradient, and show the result to who looks for heads."""
        kwargs = kwargs or {}
        if torch.is_grad_enabled():
            args = tree_map(self.honest, args)
        result = self._function(func, args, kwargs)
        self._recent.add(result)
        if self.heads is not None:
            self.heads.see((args, kwargs), result)
        return result

    def _function(self, func: Any, args: Any, kwargs: Any) -> Any:
        raw: str = getattr(func, "__name__", "")
        name = raw.strip("_")
        if name == "get" and func != DATA:
            real = func(*args, **kwargs)
            stand_in = self._stand_ins.of(args[0]) if isinstance(real, Tensor) else None
            return real if stand_in is None else self._stand_ins.joined(real, func(stand_in))
        if name in DRAWS:
            self.drew = True
            if self.calm:
                return DRAWS[name](func, *args, **kwargs)
        if name == "set_grad_enabled":
            return self._switch(func, args)
        if not torch.is_grad_enabled():
            return func(*args, **kwargs)
        first = args[0] if args else None
        if not self._stand_ins.depends((args, kwargs)):
            back = self._abroad.returned(name, func, args, kwargs)
            return func(*args, **kwargs) if back is None else back
        if name in ("get", "detach", "alias_copy"):
            return self._kept(first, func, args, kwargs)
        if self.sources is not None and (raw in LEAVING or name in CHOOSING):
            self.sources += [x for x in tensors(self._stand_ins.swapped(first)) if x.requires_grad]
        if raw in LEAVING and isinstance(first, Tensor):
            return self._abroad.leave(raw, func, first, args, kwargs)
        if name in ("requires_grad", "set") and isinstance(first, Tensor):
            return first
        if name == "register_hook":
            self._mends.note("changes gradients by a hook")
            return _Handle()
        if raw.endswith("_") and not raw.endswith("__"):
            return self._calls.in_place(func, getattr(Tensor, raw[:-1], None), name, args, kwargs)
        if name == "setitem":
            return self._calls.in_place(func, None, name, args, kwargs)
        return self._calls.fresh(func, name, args, kwargs)

    def _kept(self, x: Any, func: Any, args: Any, kwargs: Any) -> Tensor:
        """Return x instead of what is detached from it."""
        stand_in = self._stand_ins.of(x)
        if x.requires_grad:
            self._mends.note("detaches")
            alias: Tensor = x.view_as(x)
            return alias
        real: Tensor = func(*args, **kwargs)
        if stand_in is not None:
            self._stand_ins.keep(real, stand_in)
        return real

    def _applying(self, original: Any) -> Any:
        """Return what runs a Function's forward as written."""
        mode = self

        def apply(kind: Any, *args: Any, **kwargs: Any) -> Any:
            if foreign(kind) and torch.is_grad_enabled() and mode._stand_ins.depends((args, kwargs)):
                out = forward_of(kind, args, kwargs)
                if out is not None:
                    mode._mends.note("writes its own backward pass", kind.__name__)
                    return out
            return original.__get__(None, kind)(*args, **kwargs)

        return classmethod(apply)

    def honest(self, x: Any) -> Any:
        """Return a tensor that a foreign Function made, unseen, with the gradient of what is written."""
        made = self._recent.argument(x) if isinstance(x, Tensor) and x.requires_grad else None
        again = None if made is None else rewritten(made[0], x, made[1])
        if made is None or again is None:
            return x
        self._mends.note("writes its own backward pass", made[0].__name__)
        return again

    def _inference(self, mode: bool = True) -> Any:
        if mode:
            self._mends.note("switches gradients off")
        return nullcontext()

    def _switch(self, func: Any, args: Any) -> Any:
        if args and not args[0]:
            self._mends.note("switches gradients off")
            return None
        return func(*args)

    def _leave_module(self, module: nn.Module, args: Any, output: Any) -> None:
        if (
            len(args) == 1
            and isinstance(args[0], Tensor)
            and isinstance(output, Tensor)
            and module not in self.bends
        ):
            with suppress(Exception), torch._C.DisableTorchFunction():
                if bent(module, args[0], output):
                    self._mends.note("bends")
                    self.bends.append(module)
        self._mends.leave()

    def _bend(self, module: nn.Module, args: Any, output: Any) -> Tensor | None:
        if len(args) != 1 or not torch.is_grad_enabled() or not args[0].requires_grad:
            return None
        with torch._C.DisableTorchFunction():
            return mended(module, args[0], output)


class _Handle:
    """Of a hook that was not registered."""

    def remove(self) -> None: ...
