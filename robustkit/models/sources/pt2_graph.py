"""A net that interprets the graph of an exported program, operation by operation.

torch's own loader evaluates texts of the file as Python and may unpickle parts of it. Here an operation is one of
ATen, or of plain arithmetic, found by its name; any other is refused before a pass.
"""

from __future__ import annotations

import math
import operator
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from robustkit.core.errors import UsageError
from robustkit.models.sources.pt2_archive import DTYPES, Program

_ATEN = re.compile(r"torch\.ops\.aten\.([A-Za-z_]\w*)\.([A-Za-z]\w*)")
# Operations of ATen that read or write files.
_FILES = frozenset({"save", "load", "from_file"})
# They check what the shape of the images determines.
_CHECKS = re.compile(r"torch\.ops\.aten\.(_assert\w*|sym_constrain_range\w*)\.\w+")
_GRAD_MODE = "torch.ops.higher_order.wrap_with_set_grad_enabled"
_ARITHMETIC: Mapping[str, Callable[..., Any]] = {
    **{
        f"_operator.{name}": getattr(operator, name)
        for name in ("add", "sub", "mul", "truediv", "floordiv", "mod", "neg", "pos", "getitem", "and_", "or_")
    },
    **{f"_operator.{name}": getattr(operator, name) for name in ("eq", "ne", "lt", "le", "gt", "ge")},
    **{f"math.{name}": getattr(math, name) for name in ("ceil", "floor", "trunc", "sqrt")},
    "torch.sym_int": int,
    "torch.sym_float": float,
    "torch.sym_max": max,
    "torch.sym_min": min,
    "torch.sym_not": operator.not_,
}
_MEMORY_FORMATS = {
    1: torch.contiguous_format,
    2: torch.channels_last,
    3: torch.channels_last_3d,
    4: torch.preserve_format,
}
_PLAIN = frozenset(
    {"int", "ints", "float", "floats", "string", "strings", "bool", "bools", "int_lists", "float_lists"}
)
_LISTS = {
    "tensors": "tensor",
    "optional_tensors": "optional_tensor",
    "sym_ints": "sym_int",
    "sym_floats": "sym_float",
}
_NAMED = frozenset({"sym_int", "sym_float", "sym_bool", "optional_tensor"})

Values = dict[str, Any]
# Returns an argument's value, given the values so far and the device of the images.
Argument = Callable[[Values, torch.device], Any]


@dataclass(frozen=True)
class _Step:
    """An operation of the graph.

    Attributes:
        function: What is called.
        arguments: Of the call, by position.
        keywords: Of the call, by name.
        outputs: Names of what it returns; a list of names for a list.
        unused: Names of values that no later step needs.
    """

    function: Callable[..., Any]
    arguments: list[Argument]
    keywords: dict[str, Argument]
    outputs: list[str | list[str] | None]
    unused: list[str]


class GraphNet(nn.Module):
    """The net of an exported program; its tensors are numbered in the order of the graph's inputs."""

    def __init__(self, program: Program) -> None:
        """Translate the graph.

        Raises:
            UsageError: It has an operation that is not executed, or was exported in training mode.
        """
        super().__init__()
        self._places: dict[str, str] = {}
        for number, (name, value) in enumerate(program.tensors.items()):
            place = self._places[name] = f"tensor_{number}"
            if name in program.parameters and value is not None and value.is_floating_point():
                self.register_parameter(place, nn.Parameter(value))
            else:
                self.register_buffer(place, value)
        self._image, self._keys = program.image, program.keys
        translator = _Translator(program)
        self._outputs = [argument for _, argument in map(translator.argument, program.graph["outputs"])]
        self._steps = translator.steps(program.graph)

    def forward(self, images: torch.Tensor) -> object:
        """Return what the exported net returns: a tensor, a tuple of tensors, or a dict of them."""
        values: Values = {name: getattr(self, place) for name, place in self._places.items()}
        values[self._image] = images
        _run(self._steps, values, images.device)
        outputs = [output(values, images.device) for output in self._outputs]
        if self._keys is not None and len(self._keys) == len(outputs):
            return dict(zip(self._keys, outputs, strict=True))
        return outputs[0] if len(outputs) == 1 else tuple(outputs)


def _run(steps: Sequence[_Step], values: Values, device: torch.device) -> None:
    for step in steps:
        arguments = [argument(values, device) for argument in step.arguments]
        result = step.function(*arguments, **{name: get(values, device) for name, get in step.keywords.items()})
        results = (result,) if len(step.outputs) == 1 else result
        for name, value in zip(step.outputs, results, strict=False):
            if isinstance(name, list):
                values.update(zip(name, value, strict=True))
            elif name is not None:
                values[name] = value
        for used in step.unused:
            values.pop(used, None)


class _Translator:
    """Turns the JSON of a graph into steps.

    Attributes:
        path: The file, for errors.
        fixed: Names of parameters and buffers.
    """

    def __init__(self, program: Program) -> None:
        self.path, self.fixed = program.path, frozenset(program.tensors)

    def steps(self, graph: Mapping[str, Any]) -> list[_Step]:
        """Return the steps of a graph; after each, the values that no later one needs are dropped."""
        needed = set(_names(graph["outputs"]))
        steps: list[_Step] = []
        for node in reversed(graph["nodes"]):
            if _CHECKS.fullmatch(node["target"]):
                continue
            used = set(_names(node["inputs"]))
            steps.append(self._step(node, sorted(used - needed)))
            needed |= used
        return steps[::-1]

    def argument(self, value: Mapping[str, Any]) -> tuple[str, Argument]:
        """Return an argument's kind, and what finds its value."""
        ((kind, content),) = value.items()
        kind = kind.removeprefix("as_")
        if kind in _LISTS:
            inner = _LISTS[kind]
            # A list of tensors has their names, another one kinds and values.
            parts = [self.argument({f"as_{inner}": one})[1] for one in content]
            return kind, lambda values, device: [part(values, device) for part in parts]
        if kind == "tensor":
            return kind, self._named(content["name"])
        if kind in _NAMED:
            ((form, inner),) = content.items()
            return kind, self._named(inner) if form == "as_name" else self.argument(content)[1]
        if kind in _PLAIN:
            return kind, lambda values, device: content
        constant: Any = None
        if kind == "device":
            return kind, lambda values, device: device
        if kind == "scalar_type":
            constant = DTYPES[content]
        elif kind == "memory_format":
            constant = _MEMORY_FORMATS[content]
        elif kind == "layout" and content == 7:
            constant = torch.strided
        elif kind == "complex":
            constant = complex(content["real"], content["imag"])
        elif kind != "none":
            raise self._refused(f"an argument of kind {kind!r:.40}")
        return kind, lambda values, device: constant

    def _named(self, name: str) -> Argument:
        return lambda values, device: values[name]

    def _step(self, node: Mapping[str, Any], unused: list[str]) -> _Step:
        target, inputs = node["target"], node["inputs"]
        if target == _GRAD_MODE:
            return self._with_grad_mode(node, unused)
        function = self._function(target)
        if "aten" in target:
            self._check_training(target, {one["name"]: one["arg"] for one in inputs})
        pairs = [(one, self.argument(one["arg"])[1]) for one in inputs]
        keywords = _keyword_only(function)
        return _Step(
            function,
            [argument for one, argument in pairs if one["name"] not in keywords],
            {one["name"]: argument for one, argument in pairs if one["name"] in keywords},
            list(map(_output, node["outputs"])),
            [name for name in unused if name not in self.fixed],
        )

    def _function(self, target: str) -> Callable[..., Any]:
        """Return what a name means; it is looked up among what may be called."""
        if target in _ARITHMETIC:
            return _ARITHMETIC[target]
        aten = _ATEN.fullmatch(target)
        found = None
        if aten and aten[1].rstrip("_") not in _FILES:
            found = getattr(getattr(torch.ops.aten, aten[1], None), aten[2], None)
        if not isinstance(found, torch._ops.OpOverload):
            raise self._refused(f"the operation {target!r:.120}")
        return found

    def _check_training(self, target: str, inputs: Mapping[str, Any]) -> None:
        """Refuse batch norm that updates statistics, and other operations that change the net's tensors."""
        first = [name for one in list(inputs.values())[:1] for name in _names(one)]
        writes = target.split(".")[3].endswith("_") and not self.fixed.isdisjoint(first)
        updates = inputs.get("training", {}).get("as_bool") and "as_tensor" in inputs.get("running_mean", {})
        if writes or updates:
            raise UsageError(
                f"model file '{self.path}' was exported in training mode: call model.eval() before "
                "torch.export.export."
            )

    def _with_grad_mode(self, node: Mapping[str, Any], unused: list[str]) -> _Step:
        """Return the step of a part of the net within `torch.no_grad()` or `torch.enable_grad()`."""
        enabled, graph, *inputs = (one["arg"] for one in node["inputs"])
        inner = graph["as_graph"]["graph"]
        steps = self.steps(inner)
        names = [name for one in inner["inputs"] for name in _names(one)]
        outputs = [self.argument(one)[1] for one in inner["outputs"]]

        def function(*arguments: Any) -> Any:
            values = dict(zip(names, arguments, strict=True))
            device = next(value.device for value in arguments if isinstance(value, torch.Tensor))
            with torch.set_grad_enabled(enabled["as_bool"]):
                _run(steps, values, device)
            return tuple(output(values, device) for output in outputs)

        results = [_output(one) for one in node["outputs"]]
        flat = results[0] if len(results) == 1 and isinstance(results[0], list) else results
        # Of one output the step's result is that output.
        call = function if len(flat) != 1 else lambda *arguments: function(*arguments)[0]
        keep = [name for name in unused if name not in self.fixed]
        return _Step(call, [self.argument(one)[1] for one in inputs], {}, list(flat), keep)

    def _refused(self, what: str) -> UsageError:
        return UsageError(
            f"model file '{self.path}' has {what}, which robustkit does not execute: export a net of operations "
            "of torch alone, or write a function that builds it, as ./net.py:factory."
        )


def _keyword_only(function: Callable[..., Any]) -> set[str]:
    schema = getattr(function, "_schema", None)
    return {one.name for one in schema.arguments if one.kwarg_only} if schema else set()


def _output(value: Mapping[str, Any]) -> str | list[str] | None:
    """Return the name of an output, or those of a list."""
    names = list(_names(value))
    if any(kind.endswith("tensors") for kind in value):
        return names
    return names[0] if names else None


def _names(value: Any) -> Iterator[str]:
    """Yield the names of the values that an argument or a list of arguments refers to."""
    if isinstance(value, list):
        for one in value:
            yield from _names(one)
    elif isinstance(value, Mapping):
        if "arg" in value:
            yield from _names(value["arg"])
            return
        for kind, content in value.items():
            if kind == "as_name" or (kind == "name" and isinstance(content, str)):
                yield content
            elif kind != "as_graph":
                yield from _names(content)
