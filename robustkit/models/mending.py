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
from collections.abc import Callable, Sequence
from contextlib import ExitStack, nullcontext, suppress
from dataclasses import dataclass
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_map
from torch.utils.weak import WeakTensorKeyDictionary

from robustkit.models import smooth
from robustkit.models.bends import bent, mended
from robustkit.models.choices import CHOOSING, TABLES, chosen, entry
from robustkit.models.draws import DRAWS
from robustkit.models.heads import Heads, tensors
from robustkit.models.smooth import LOGIC, RULES
from robustkit.models.through import arranged, loosened, through
from robustkit.models.written import Recent, foreign, forward_of, rewritten

DATA = torch.Tensor.data.__get__  # type: ignore[attr-defined]
LEAVING = ("numpy", "__array__", "item", "tolist", "__float__", "__int__", "__bool__", "__index__", "__complex__")
CASTS = ("to", "type", "type_as", "int", "long", "byte", "char", "short", "bool")
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
class Mend:
    """A place where the gradient stops or lies: the module, what it does there, and what is done about it."""

    where: str
    what: str
    remedy: str


class Mending(TorchFunctionMode):
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
    ) -> None:
        """Take the model that will be run inside.

        Args:
            model: What is run.
            heads: What looks for heads among the results.
            told: Note the names of modules, by hooks that are gone afterwards.
            calm: Replace the random draws of torch by their means.
            loose: Give values up as well, in rows where what stands in for them is near.
            bends: Modules to be mended as wholes; told, they are looked for instead.
        """
        super().__init__()
        self.model, self.heads, self.told = model, heads, told
        self.calm, self.loose = calm, loose
        self.found: dict[Mend, None] = {}
        self.drew = False
        self.bends = list(bends)
        self._stand_ins: Any = WeakTensorKeyDictionary()
        self._chosen: Any = WeakTensorKeyDictionary()
        self._left: list[Tensor] = []
        self._stack: list[str] = []
        self._recent = Recent()
        self._open: ExitStack | None = None

    def __enter__(self) -> Mending:
        """Begin."""
        with ExitStack() as stack:
            apply = inspect.getattr_static(torch.autograd.Function, "apply")
            stack.enter_context(patch.object(torch._C, "_InferenceMode", self._inference))
            stack.enter_context(patch.object(torch, "from_numpy", self._entering(torch.from_numpy)))
            stack.enter_context(patch.object(torch.autograd.Function, "apply", self._applying(apply)))
            if any(type(module).__name__ == "OptimizedModule" for module in self.model.modules()):
                stack.enter_context(torch.compiler.set_stance("force_eager"))
            for name, module in self.model.named_modules():
                for hooks in ("_backward_hooks", "_backward_pre_hooks"):
                    if getattr(module, hooks):
                        self._note("changes gradients by a hook", name)
                        stack.enter_context(patch.object(module, hooks, OrderedDict()))
                if module in self.bends:
                    stack.callback(module.register_forward_hook(self._bend).remove)
                if self.told and name:
                    stack.callback(module.register_forward_pre_hook(self._enter_module(name)).remove)
                    stack.callback(module.register_forward_hook(self._leave_module, always_call=True).remove)
            self._own = {id(tensor) for tensor in (*self.model.parameters(), *self.model.buffers())}
            super().__enter__()  # type: ignore[no-untyped-call]
            stack.push(super().__exit__)
            self._open = stack.pop_all()
        return self

    def __exit__(self, *error: Any) -> None:
        """End; what was held for the pass is let go."""
        if self._open is not None:
            self._open.__exit__(*error)
        self._stand_ins, self._chosen = WeakTensorKeyDictionary(), WeakTensorKeyDictionary()
        self._left, self._stack, self._recent, self._open = [], [], Recent(), None

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
            tracked = isinstance(real, Tensor) and args[0] in self._stand_ins
            return self._joined(real, func(self._stand_ins[args[0]])) if tracked else real
        if name in DRAWS:
            self.drew = True
            if self.calm:
                return DRAWS[name](func, *args, **kwargs)
        if name == "set_grad_enabled":
            return self._switch(func, args)
        if not torch.is_grad_enabled():
            return func(*args, **kwargs)
        first = args[0] if args else None
        if not self._depends((args, kwargs)):
            back = self._returned(name, args, kwargs, func)
            return func(*args, **kwargs) if back is None else back
        if name in ("get", "detach", "alias_copy"):
            return self._kept(first, func, args, kwargs)
        if raw in LEAVING and isinstance(first, Tensor):
            return self._leave(raw, func, first, args, kwargs)
        if name in ("requires_grad", "set") and isinstance(first, Tensor):
            return first
        if name == "register_hook":
            self._note("changes gradients by a hook")
            return _Handle()
        if raw.endswith("_") and not raw.endswith("__"):
            return self._in_place(func, getattr(Tensor, raw[:-1], None), name, args, kwargs)
        if name == "setitem":
            return self._in_place(func, None, name, args, kwargs)
        return self._call(func, name, args, kwargs)

    def _call(self, func: Any, name: str, args: Any, kwargs: Any) -> Any:
        """Call a function that returns something new."""
        real = func(*args, **kwargs)
        found = chosen(name, real, self._swapped(args[0]), args, kwargs) if name in CHOOSING else None
        if found is not None:
            self._chosen[found[0]] = found[1]
        elif isinstance(real, Tensor):
            stand_in = self._stand_in(func, name, real, args, kwargs)
            if stand_in is not None:
                return self._joined(real, stand_in)
        elif self._tracked((args, kwargs)):
            try:
                stand_ins = func(*self._swapped(args), **self._swapped(kwargs))
                pairs = zip(real, stand_ins, strict=True)
                return type(real)([self._joined(a, b) for a, b in pairs])
            except Exception:
                return real
        return real

    def _stand_in(self, func: Any, name: str, real: Tensor, args: Any, kwargs: Any) -> Tensor | None:
        """Return what the result's gradient is to be that of; None: its own."""
        try:
            own = self._chosen_mask(name, real, args, kwargs)
            if own is not None:
                return own
            a, k, tracked = self._swapped(args), self._swapped(kwargs), self._tracked((args, kwargs))
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
                return smooth.same(a[0])
        except Exception:  # a function used in a way that no rule knows keeps its own gradient
            return None
        return None

    def _cast(self, real: Tensor, x: Tensor) -> Tensor:
        if real.is_floating_point():
            return x.to(real.device, real.dtype) * 1
        return self._noted("rounds", x.to(real.device) * 1)

    def _noted(self, what: str, stand_in: Tensor) -> Tensor:
        self._note(what)
        return stand_in

    def _joined(self, real: Any, stand_in: Any) -> Any:
        """Return a result with the gradient of its stand-in: at once, or when it becomes a float again."""
        if not isinstance(real, Tensor) or not isinstance(stand_in, Tensor) or not stand_in.requires_grad:
            return real
        if real.shape != stand_in.shape:
            return real
        if real.is_floating_point():
            return loosened(real, stand_in) if self.loose else through(real, stand_in)
        self._stand_ins[real] = stand_in
        return real

    def _in_place(self, func: Any, pure: Any, name: str, args: Any, kwargs: Any) -> Any:
        """Call a function that changes its first argument."""
        target = args[0]
        if not isinstance(target, Tensor):
            return func(*args, **kwargs)
        if id(target) in self._own:
            with torch.no_grad():
                return func(*args, **kwargs)
        if not (name in RULES or name in LOGIC or name == "scatter" or self._tracked((args, kwargs))):
            return func(*args, **kwargs)
        before, was = target.detach().clone(), self._of(target)
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
        self._stand_ins[target] = stand_in
        return target

    def _set(self, old: Tensor, args: Any) -> Tensor | None:
        """Return the smooth `old[index] = value`."""
        index, value = args[1], self._swapped(args[2])
        mask = self._of(index) if isinstance(index, Tensor) else None
        try:
            if mask is not None and index.dtype == torch.bool and mask.shape == old.shape:
                if isinstance(value, Tensor) and value.dim() > 0:
                    filled = old.detach().clone()
                    filled[index] = value
                    value = filled
                return smooth.where(mask, value, old)
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
            picked = self._chosen.get(args[0])
            at = self._of(args[0])
            code = picked.code(real.shape[-1]) if picked is not None else None
            if code is None and at is not None:
                code = smooth.levels(at, real.shape[-1])
            return None if code is None else self._noted("chooses", code)
        base, dim, index, value = (*args, *kwargs.values())[:4]
        picked = self._chosen.get(index)
        if picked is None or picked.source.shape != real.shape:
            return None
        value = self._swapped(value)
        if isinstance(value, Tensor) and value.dim() > 0:
            value = base.scatter(dim, index, value)
        return self._noted("chooses", smooth.where(picked.mask(), value, self._swapped(base)))

    def _kept(self, x: Any, func: Any, args: Any, kwargs: Any) -> Tensor:
        """Return x instead of what is detached from it."""
        stand_in = self._of(x)
        if x.requires_grad:
            self._note("detaches")
            alias: Tensor = x.view_as(x)
            return alias
        real: Tensor = func(*args, **kwargs)
        if stand_in is not None:
            self._stand_ins[real] = stand_in
        return real

    def _leave(self, name: str, func: Any, x: Tensor, args: Any, kwargs: Any) -> Any:
        """Let a value out of torch, and remember what it was."""
        if name in ("numpy", "__array__", "tolist"):
            stand_in = self._of(x)
            self._left.append(x if stand_in is None else stand_in)
        return func(x.detach(), *args[1:], **kwargs)

    def _returned(self, name: str, args: Any, kwargs: Any, func: Any) -> Tensor | None:
        """Return a tensor made of numbers that left torch; None if it is none, or random draws when calm."""
        if name in ("tensor", "as_tensor", "asarray") and self._left:
            real = func(*args, **kwargs)
            return self._home(real)
        return None

    def _home(self, real: Tensor) -> Tensor:
        for left in reversed(self._left):
            stand_in = arranged(left, real)
            if stand_in is not None:
                self._note("leaves torch")
                joined: Tensor = self._joined(real, stand_in.to(real.device))
                return joined
        return real

    def _entering(self, original: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def enter(*args: Any, **kwargs: Any) -> Tensor:
            real = original(*args, **kwargs)
            if not torch.is_grad_enabled() or not self._left:
                return real
            with torch._C.DisableTorchFunction():
                return self._home(real)

        return enter

    def _applying(self, original: Any) -> Any:
        """Return what runs a Function's forward as written."""
        mode = self

        def apply(kind: Any, *args: Any, **kwargs: Any) -> Any:
            if foreign(kind) and torch.is_grad_enabled() and mode._depends((args, kwargs)):
                out = forward_of(kind, args, kwargs)
                if out is not None:
                    mode._note("writes its own backward pass", kind.__name__)
                    return out
            return original.__get__(None, kind)(*args, **kwargs)

        return classmethod(apply)

    def honest(self, x: Any) -> Any:
        """Return a tensor that a foreign Function made, unseen, with the gradient of what is written."""
        made = self._recent.argument(x) if isinstance(x, Tensor) and x.requires_grad else None
        again = None if made is None else rewritten(made[0], x, made[1])
        if made is None or again is None:
            return x
        self._note("writes its own backward pass", made[0].__name__)
        return again

    def _inference(self, mode: bool = True) -> Any:
        if mode:
            self._note("switches gradients off")
        return nullcontext()

    def _switch(self, func: Any, args: Any) -> Any:
        if args and not args[0]:
            self._note("switches gradients off")
            return None
        return func(*args)

    def _depends(self, values: Any) -> bool:
        """Return whether any of the values depends on the images."""
        return any(x.requires_grad or x in self._stand_ins or x in self._chosen for x in tensors(values))

    def _tracked(self, values: Any) -> bool:
        """Return whether any of the values has a stand-in."""
        return any(x in self._stand_ins for x in tensors(values))

    def _of(self, x: Tensor) -> Tensor | None:
        found: Tensor | None = self._stand_ins.get(x)
        return found

    def _index(self, name: str, args: Any) -> Tensor | None:
        index = args[0] if name == "embedding" else args[-1]
        return self._of(index) if isinstance(index, Tensor) else None

    def _swapped(self, values: Any) -> Any:
        """Return the values with their stand-ins for those that have one."""
        return tree_map(lambda x: self._stand_ins.get(x, x) if isinstance(x, Tensor) else x, values)

    def _note(self, what: str, name: str = "") -> None:
        where = self._stack[-1] if self._stack else "before the net"
        self.found[Mend(f"{where} ({name})" if name else where, what, REMEDIES[what])] = None

    def _enter_module(self, name: str) -> Callable[..., None]:
        return lambda module, args: self._stack.append(name)

    def _leave_module(self, module: nn.Module, args: Any, output: Any) -> None:
        if (
            len(args) == 1
            and isinstance(args[0], Tensor)
            and isinstance(output, Tensor)
            and module not in self.bends
        ):
            with suppress(Exception), torch._C.DisableTorchFunction():
                if bent(module, args[0], output):
                    self._note("bends")
                    self.bends.append(module)
        if self._stack:
            self._stack.pop()

    def _bend(self, module: nn.Module, args: Any, output: Any) -> Tensor | None:
        if len(args) != 1 or not torch.is_grad_enabled() or not args[0].requires_grad:
            return None
        with torch._C.DisableTorchFunction():
            return mended(module, args[0], output)


class _Handle:
    """Of a hook that was not registered."""

    def remove(self) -> None: ...
