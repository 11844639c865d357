"""A pickle module for `torch.load` that builds tensors and plain values, and nothing else.

Whatever else a file names is neither imported nor called: a stand-in takes its place, which takes any arguments,
state and items and does nothing with them. So a checkpoint opens whose tensors lie beside numpy scalars, argument
namespaces, configurations or anything else of the code that wrote it.

What is called is a part of what `torch.load(weights_only=True)` calls. It is narrower than that, which makes
`bytearray(10**12)` where a file says so, and hashes a tuple of 2^40 leaves where one is a key.
"""

from __future__ import annotations

import pickle
import struct
from _compat_pickle import IMPORT_MAPPING, NAME_MAPPING
from collections import OrderedDict
from typing import IO, Any, ClassVar

import torch
from torch import _utils

# Modules whose functions have no place in a file of weights, and the built-in functions that have none.
_HARMFUL = frozenset(
    {"os", "posix", "nt", "sys", "subprocess", "shutil", "socket", "pty", "ctypes", "runpy", "importlib", "io"}
)
_HARMFUL_BUILTINS = frozenset({"eval", "exec", "compile", "__import__", "open", "input", "breakpoint"})
# More names than this, or longer ones, no program has.
_MAX_NAMES, _MAX_NAME_LENGTH = 10_000, 1_000
# What a key may be: whatever is hashed at once. Tuples of these may be one, too.
_KEYS = (str, bytes, int, float, complex, type(None), torch.dtype, torch.Size)


class Harmful(pickle.UnpicklingError):
    """A file names a function that only an attack on the reader needs; `args[0]` is its name."""


class StandIn:
    """Something that is not built. Each class or function of the file is represented by a class of its own.

    Attributes:
        name: Module and name of the class or function that it represents.
        state: Its attributes in the file.
        entries: Items that the file puts into it, as into a dict.
    """

    name = ""
    state: object = None
    entries: dict[object, object]

    def __new__(cls, *args: object, **kwargs: object) -> StandIn:
        """Ignore what it would be built from."""
        value = object.__new__(cls)
        value.entries = {}
        return value

    def __init__(self, *args: object, **kwargs: object) -> None:
        """Ignore them again."""

    def __call__(self, *arguments: object) -> StandIn:
        """Return one for what it would return."""
        return StandIn()

    def __setitem__(self, key: object, value: object) -> None:
        """Keep an item."""
        self.entries[key] = value

    def append(self, item: object) -> None:
        """Ignore an item of a list or queue."""

    def add(self, item: object) -> None:
        """Ignore an item of a set."""


def _without_type(rebuild: Any, kind: object, arguments: Any, state: object) -> Any:
    """Return the tensor that a subclass of Tensor holds: replaces `torch._tensor._rebuild_from_type_v2`."""
    return _made(rebuild, arguments)


def _ordered(items: Any = ()) -> OrderedDict[object, object]:
    """Return what Python 2 pickled as a list of pairs, and Python 3 without its items."""
    if not isinstance(items, (list, tuple)):
        raise pickle.UnpicklingError(f"an OrderedDict of a {type(items).__name__}")
    return OrderedDict((_key(key), value) for key, value in items)


def _size(items: Any) -> torch.Size:
    """Return a torch.Size; of a tensor, which may claim any length, none."""
    if not isinstance(items, (list, tuple)):
        raise pickle.UnpicklingError(f"a Size of a {type(items).__name__}")
    return torch.Size(items)


# What is built, by what. torch's loader itself puts in the types of storages.
_REAL: dict[str, Any] = {
    "collections.OrderedDict": _ordered,
    "torch.Size": _size,
    "torch.storage.UntypedStorage": torch.UntypedStorage,
    "torch._tensor._rebuild_from_type_v2": _without_type,
    **{
        f"torch._utils.{name}": getattr(_utils, name)
        for name in ("_rebuild_tensor", "_rebuild_tensor_v2", "_rebuild_tensor_v3", "_rebuild_parameter")
    },
    **{f"torch.{name}": value for name, value in vars(torch).items() if isinstance(value, torch.dtype)},
}
# A storage's type is named beside the storage, and makes none.
_CALLABLE = [value for value in _REAL.values() if callable(value) and value is not torch.UntypedStorage]


def _is_stand_in(value: object) -> bool:
    """Return whether this is a stand-in, or the class of stand-ins."""
    return isinstance(value, StandIn) or (isinstance(value, type) and issubclass(value, StandIn))


def _made(function: Any, arguments: Any) -> Any:
    """Return what a function makes, which is a real one only if it is known."""
    if not (_is_stand_in(function) or any(function is known for known in _CALLABLE)):
        raise pickle.UnpicklingError(f"a {type(function).__name__} is called")
    return function(*arguments)


def _key(value: Any) -> Any:
    """Return a key of a dict or an item of a set if hashing it takes no time."""
    for part in value if type(value) is tuple else (value,):
        if not (isinstance(part, _KEYS) or _is_stand_in(part)):
            raise pickle.UnpicklingError(f"a {type(part).__name__} is a key")
    return value


def _is_harmful(module: str, name: str) -> bool:
    return name in _HARMFUL_BUILTINS if module == "builtins" else module.partition(".")[0] in _HARMFUL


# The unpickler in C would call and fill whatever a file names; this one can be made not to.
_Python: Any = pickle._Unpickler


class _Unpickler(_Python):  # type: ignore[misc]
    """Builds real values by the functions of `_REAL` alone, and sets no attribute of any."""

    left_out: dict[str, type[StandIn]]
    dispatch: ClassVar[dict[int, Any]] = dict(_Python.dispatch)

    def find_class(self, module: str, name: str) -> Any:
        """Return the object of a name: the real one, or a stand-in."""
        # Files of Python 2's protocols have Python 2's names.
        module, name = NAME_MAPPING.get((module, name), (IMPORT_MAPPING.get(module, module), name))
        full = f"{module}.{name}"
        if _is_harmful(module, name):
            raise Harmful(full)
        if full in _REAL:
            return _REAL[full]
        if full not in self.left_out:
            if len(full) > _MAX_NAME_LENGTH or len(self.left_out) == _MAX_NAMES:
                raise pickle.UnpicklingError("too many or too long names")
            self.left_out[full] = type("StandIn", (StandIn,), {"name": full})
        return self.left_out[full]

    def _instantiate(self, function: Any, arguments: Any) -> None:
        self.append(_made(function, arguments))

    def load_reduce(self) -> None:
        """Call a function."""
        arguments = self.stack.pop()
        self.stack[-1] = _made(self.stack[-1], arguments)

    def load_newobj(self) -> None:
        """Make an object of a class."""
        arguments = self.stack.pop()
        self.append(_made(self.stack.pop(), arguments))

    def load_newobj_ex(self) -> None:
        """Make an object of a class; its arguments by name matter to no real one."""
        self.stack.pop()
        self.load_newobj()

    def load_build(self) -> None:
        """Keep the attributes of a stand-in; those of real values are not needed."""
        state = self.stack.pop()
        if isinstance(self.stack[-1], StandIn):
            self.stack[-1].state = state

    def load_setitem(self) -> None:
        """Put an item into a dict."""
        value = self.stack.pop()
        self._fill([self.stack.pop(), value])

    def load_setitems(self) -> None:
        """Put items into a dict."""
        self._fill(self.pop_mark())

    def _fill(self, items: list[Any]) -> None:
        target = self._target(dict)
        for key, value in zip(items[::2], items[1::2], strict=True):
            target[_key(key)] = value

    def load_append(self) -> None:
        """Put an item into a list."""
        item = self.stack.pop()
        self._target(list).append(item)

    def load_appends(self) -> None:
        """Put items into a list."""
        items = self.pop_mark()
        target = self._target(list)
        for item in items:
            target.append(item)

    def load_additems(self) -> None:
        """Put items into a set."""
        items = self.pop_mark()
        target = self._target(set)
        for item in items:
            target.add(_key(item))

    def load_frozenset(self) -> None:
        """Make a frozen set."""
        self.append(frozenset(map(_key, self.pop_mark())))

    def load_dict(self) -> None:
        """Make a dict, as protocol 0 does."""
        items = self.pop_mark()
        self.append({})
        self._fill(items)

    def load_bytearray8(self) -> None:
        """Read bytes, as many as there are: Python's own makes room for as many as are claimed."""
        (size,) = struct.unpack("<Q", self.read(8))
        self.append(bytearray(self.read(size)))

    def load_binpersid(self) -> None:
        """Have torch's loader make a storage; the class of a module is its name alone."""
        saved: Any = self.stack.pop()
        if isinstance(saved, tuple) and saved[0] == "module":
            self.append(saved[1])
        else:
            self.append(self.persistent_load(saved))

    def _target(self, kind: type) -> Any:
        """Return the container that items are added to, a stand-in or a value of this type."""
        target = self.stack[-1]
        if not isinstance(target, (kind, StandIn)):
            raise pickle.UnpicklingError(f"items are put into a {type(target).__name__}")
        return target

    def get_extension(self, code: int) -> None:
        """Refuse a class by its number."""
        raise pickle.UnpicklingError(f"extension code {code}")

    for _opcode, _name in (
        (pickle.REDUCE, load_reduce),
        (pickle.NEWOBJ, load_newobj),
        (pickle.NEWOBJ_EX, load_newobj_ex),
        (pickle.BUILD, load_build),
        (pickle.SETITEM, load_setitem),
        (pickle.SETITEMS, load_setitems),
        (pickle.APPEND, load_append),
        (pickle.APPENDS, load_appends),
        (pickle.ADDITEMS, load_additems),
        (pickle.FROZENSET, load_frozenset),
        (pickle.DICT, load_dict),
        (pickle.BYTEARRAY8, load_bytearray8),
        (pickle.BINPERSID, load_binpersid),
    ):
        dispatch[_opcode[0]] = _name


class InertPickle:
    """What `torch.load` takes as `pickle_module`, of one file.

    Attributes:
        left_out: Names of the classes and functions that were replaced by stand-ins.
    """

    __name__ = "robustkit.models.weights.inert_pickle"

    def __init__(self) -> None:
        """Begin with nothing left out."""
        self.left_out: dict[str, type[StandIn]] = {}
        self.Unpickler = type("Unpickler", (_Unpickler,), {"left_out": self.left_out})

    def load(self, file: IO[bytes], **options: Any) -> object:
        """Return what a pickle holds."""
        return self.Unpickler(file, **options).load()
