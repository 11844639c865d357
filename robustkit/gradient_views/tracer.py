"""Automatic BPDA (Athalye et al. 2018, arXiv:1802.00420): a forward pass with surrogate gradients where they stop.

`Tracer` is a context. Inside it all values are those of the model, bit for bit; only autograd records other
functions. Rounded, compared and selected numbers get the gradient of a smooth function (`smooth_rules`),
detached tensors that of the tensor they were detached from, arrays that went through numpy or Pillow and came
back in the same shape that of the tensor that left, and a `torch.autograd.Function` that of its forward code.
The tracer also lists these places. The model is not changed. Compiled nets run eagerly inside; calls from C++,
as in scripted nets, are not traced.
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
from robustkit.gradient_views.custom_autograd import (
    RecentResults,
    differentiated_as_written,
    is_user_defined,
    run_forward,
)
from robustkit.gradient_views.elementwise import has_misleading_gradient, with_secant_gradient
from robustkit.gradient_views.findings import Finding, Findings
from robustkit.gradient_views.heads import Heads, tensors
from robustkit.gradient_views.indexing import SELECTING
from robustkit.gradient_views.numpy_bridge import TO_NUMPY, NumpyBridge
from robustkit.gradient_views.random_means import RANDOM_FUNCTIONS
from robustkit.gradient_views.surrogate_gradients import SurrogateGradients

DATA = torch.Tensor.data.__get__  # type: ignore[attr-defined]


class Tracer(TorchFunctionMode):
    """Context that gives the passes of a model surrogate gradients; see the module.

    Attributes:
        found: the places where a gradient was replaced, in order.
        has_randomness: whether torch drew random numbers.
        elementwise: modules that get the gradient of secants.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        heads: Heads | None = None,
        record_modules: bool = False,
        noise_free: bool = False,
        relaxed: bool = False,
        elementwise: Sequence[nn.Module] = (),
        sources: list[Tensor] | None = None,
    ) -> None:
        """Set what is traced; the model is run inside the context.

        Args:
            model: the model.
            heads: collects logits inside the model.
            record_modules: record the names of modules, by hooks that are removed on exit, and look for
                elementwise modules.
            noise_free: replace the random draws of torch by their means.
            relaxed: use the surrogate's value, too, in rows where it is near the model's own.
            elementwise: modules that get the gradient of secants.
            sources: a list to which tensors are added that leave torch or that indices are selected from.
        """
        super().__init__()
        self.model, self.heads, self.record_modules, self.sources = model, heads, record_modules, sources
        self.noise_free, self.relaxed = noise_free, relaxed
        self.has_randomness = False
        self.elementwise = list(elementwise)
        self._findings = Findings()
        self._begin()

    def _begin(self) -> None:
        """Reset the state of a pass."""
        self._surrogates = SurrogateGradients(self.relaxed)
        self._numpy = NumpyBridge(self._surrogates, self._findings)
        self._calls = SmoothCalls(self._surrogates, self._findings)
        self._recent = RecentResults()
        self._open: ExitStack | None = None

    @property
    def found(self) -> dict[Finding, None]:
        """The places where a gradient was replaced, in order."""
        return self._findings.found

    def __enter__(self) -> Tracer:
        """Start tracing."""
        with ExitStack() as stack:
            apply = inspect.getattr_static(torch.autograd.Function, "apply")
            stack.enter_context(patch.object(torch._C, "_InferenceMode", self._inference))
            stack.enter_context(patch.object(torch, "from_numpy", self._numpy.entering(torch.from_numpy)))
            stack.enter_context(patch.object(torch.autograd.Function, "apply", self._applying(apply)))
            if any(type(module).__name__ == "OptimizedModule" for module in self.model.modules()):
                stack.enter_context(torch.compiler.set_stance("force_eager"))
            for name, module in self.model.named_modules():
                for hooks in ("_backward_hooks", "_backward_pre_hooks"):
                    if getattr(module, hooks):
                        self._findings.note("changes gradients by a hook", name)
                        stack.enter_context(patch.object(module, hooks, OrderedDict()))
                if module in self.elementwise:
                    stack.callback(module.register_forward_hook(self._bend).remove)
                if self.record_modules and name:
                    stack.callback(module.register_forward_pre_hook(self._findings.enter(name)).remove)
                    stack.callback(module.register_forward_hook(self._leave_module, always_call=True).remove)
            self._calls.own = {id(tensor) for tensor in (*self.model.parameters(), *self.model.buffers())}
            super().__enter__()  # type: ignore[no-untyped-call]
            stack.push(super().__exit__)
            self._open = stack.pop_all()
        return self

    def __exit__(self, *error: Any) -> None:
        """Stop tracing, and release the tensors of the pass."""
        if self._open is not None:
            self._open.__exit__(*error)
        self._findings.stop()
        self._begin()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Call a function with a surrogate gradient where its own stops, and pass the result on to `heads`."""
        kwargs = kwargs or {}
        if torch.is_grad_enabled():
            args = tree_map(self.restored, args)
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
            surrogate = self._surrogates.of(args[0]) if isinstance(real, Tensor) else None
            return real if surrogate is None else self._surrogates.attached(real, func(surrogate))
        if name in RANDOM_FUNCTIONS:
            self.has_randomness = True
            if self.noise_free:
                return RANDOM_FUNCTIONS[name](func, *args, **kwargs)
        if name == "set_grad_enabled":
            return self._switch(func, args)
        if not torch.is_grad_enabled():
            return func(*args, **kwargs)
        first = args[0] if args else None
        if not self._surrogates.depends_on_images((args, kwargs)):
            reconnected = self._numpy.returned(name, func, args, kwargs)
            return func(*args, **kwargs) if reconnected is None else reconnected
        if name in ("get", "detach", "alias_copy"):
            return self._kept(first, func, args, kwargs)
        if self.sources is not None and (raw in TO_NUMPY or name in SELECTING):
            self.sources += [x for x in tensors(self._surrogates.substituted(first)) if x.requires_grad]
        if raw in TO_NUMPY and isinstance(first, Tensor):
            return self._numpy.leave(raw, func, first, args, kwargs)
        if name in ("requires_grad", "set") and isinstance(first, Tensor):
            return first
        if name == "register_hook":
            self._findings.note("changes gradients by a hook")
            return _Handle()
        if raw.endswith("_") and not raw.endswith("__"):
            return self._calls.in_place(func, getattr(Tensor, raw[:-1], None), name, args, kwargs)
        if name == "setitem":
            return self._calls.in_place(func, None, name, args, kwargs)
        return self._calls.fresh(func, name, args, kwargs)

    def _kept(self, x: Any, func: Any, args: Any, kwargs: Any) -> Tensor:
        """Return x in place of a tensor detached from it."""
        surrogate = self._surrogates.of(x)
        if x.requires_grad:
            self._findings.note("detaches")
            alias: Tensor = x.view_as(x)
            return alias
        real: Tensor = func(*args, **kwargs)
        if surrogate is not None:
            self._surrogates.keep(real, surrogate)
        return real

    def _applying(self, original: Any) -> Any:
        """Return a replacement of `Function.apply` that differentiates a Function's forward code."""
        mode = self

        def apply(kind: Any, *args: Any, **kwargs: Any) -> Any:
            if (
                is_user_defined(kind)
                and torch.is_grad_enabled()
                and mode._surrogates.depends_on_images((args, kwargs))
            ):
                out = run_forward(kind, args, kwargs)
                if out is not None:
                    mode._findings.note("writes its own backward pass", kind.__name__)
                    return out
            return original.__get__(None, kind)(*args, **kwargs)

        return classmethod(apply)

    def restored(self, x: Any) -> Any:
        """Return the result of a user's Function with the gradient of its forward code, if its call was missed."""
        made = self._recent.argument(x) if isinstance(x, Tensor) and x.requires_grad else None
        again = None if made is None else differentiated_as_written(made[0], x, made[1])
        if made is None or again is None:
            return x
        self._findings.note("writes its own backward pass", made[0].__name__)
        return again

    def _inference(self, mode: bool = True) -> Any:
        if mode:
            self._findings.note("switches gradients off")
        return nullcontext()

    def _switch(self, func: Any, args: Any) -> Any:
        if args and not args[0]:
            self._findings.note("switches gradients off")
            return None
        return func(*args)

    def _leave_module(self, module: nn.Module, args: Any, output: Any) -> None:
        if (
            len(args) == 1
            and isinstance(args[0], Tensor)
            and isinstance(output, Tensor)
            and module not in self.elementwise
        ):
            with suppress(Exception), torch._C.DisableTorchFunction():
                if has_misleading_gradient(module, args[0], output):
                    self._findings.note("bends")
                    self.elementwise.append(module)
        self._findings.leave()

    def _bend(self, module: nn.Module, args: Any, output: Any) -> Tensor | None:
        if len(args) != 1 or not torch.is_grad_enabled() or not args[0].requires_grad:
            return None
        with torch._C.DisableTorchFunction():
            return with_secant_gradient(module, args[0], output)


class _Handle:
    """The handle of a hook that is not registered."""

    def remove(self) -> None: ...
