"""Makes Triton's interpreter faster for the tests, without changing what it computes."""

import dataclasses
import functools
import importlib.util
from collections.abc import Callable
from typing import Any


@functools.cache
def quicken() -> None:
    """Take away from Triton's interpreter what it computes again and again, or for nobody, in about half of its time.

    Nothing here touches a number that a kernel computes. Call it before the first launch. A second call does nothing.
    """
    if importlib.util.find_spec("triton") is None:
        return
    _patch_language_once_per_launch()
    _leave_out_unread_overflow_checks()
    _remember_types()
    _skip_broadcasts_of_equal_shapes()


def _patch_language_once_per_launch() -> None:
    """Let the interpreter patch `triton.language` once for each launch, and search it for what to patch once for each process.

    It patches the module again at every call of a device function, and looks through all members of the module each time.
    That is 71 % of the time of an interpreted launch of these kernels (profiled, Triton 3.9). Triton 3.2 never takes its
    patches back, so there one patch lasts for the whole process.
    """
    import triton.language as tl
    from triton.runtime import interpreter

    patch, launch = interpreter._patch_lang, interpreter.GridExecutor.__call__
    patched: set[frozenset[int]] = set()
    found: dict[frozenset[int], list[tuple[object, str, object]]] = {}

    @functools.cache
    def modules_of(fn: Callable[..., Any]) -> frozenset[int]:
        return frozenset(
            i for i, module in enumerate((tl, tl.core)) if any(v is module for v in fn.__globals__.values())
        )

    def patch_once(fn: Callable[..., Any]) -> Any:
        modules = modules_of(fn)
        if modules in patched:
            return None  # only the launch uses the result, and the launch is always the first to patch
        patched.add(modules)
        if modules not in found:
            scope = patch(fn)
            found[modules] = [(owner, name, getattr(owner, name)) for owner, name, _ in getattr(scope, "_changes", ())]
            return scope
        scope = interpreter._LangPatchScope()
        for owner, name, value in found[modules]:
            scope.set_attr(owner, name, value)
        return scope

    def launch_anew(self: Any, *args: Any, **kwargs: Any) -> Any:
        patched.clear()
        return launch(self, *args, **kwargs)

    interpreter._patch_lang = patch_once
    if hasattr(interpreter, "_LangPatchScope"):
        interpreter.GridExecutor.__call__ = launch_anew


def _leave_out_unread_overflow_checks() -> None:
    """Do not compute whether integers overflow. The interpreter computes it, and reads it under its option debug only."""
    from triton.runtime import interpreter

    builder = interpreter.interpreter_builder
    if not builder.options.debug:
        builder.options = dataclasses.replace(builder.options, sanitize_overflow=False)


def _remember_types() -> None:
    """Make each block type, the attributes of the tensors of a type, and the dtype of NumPy for a type once.

    Types with the same name are alike.
    """
    import triton.language as tl
    from triton.runtime import interpreter

    by_name: dict[tuple[str, ...], Any] = {}

    def remember(function: Callable[..., Any], key: Callable[..., tuple[str, ...]]) -> Callable[..., Any]:
        @functools.wraps(function)
        def remembered(*args: Any) -> Any:
            name = key(*args)
            value = by_name.get(name)
            if value is None:
                value = by_name[name] = function(*args)
            return value

        return remembered

    interpreter._get_np_dtype = remember(interpreter._get_np_dtype, lambda dtype: ("numpy", dtype.name))
    block = tl.core.block_type
    if hasattr(block, "with_element_ty"):
        block.with_element_ty = remember(block.with_element_ty, lambda self, element: (self.name, element.name))

    make, to_ir = tl.core.tensor.__init__, block.to_ir
    interpreted = remember(to_ir, lambda self, builder: ("interpreted", self.name))

    def to_own_ir(self: Any, builder: Any) -> Any:
        return (interpreted if isinstance(builder, interpreter.InterpreterBuilder) else to_ir)(self, builder)

    block.to_ir = to_own_ir

    def make_tensor(self: Any, handle: Any, type: Any) -> None:
        attributes = by_name.get((type.name,))
        if attributes is None:
            make(self, handle, type)
            self.shape = by_name.setdefault(("shape", str(type.shape) if type.is_block() else ""), self.shape)
            by_name[(type.name,)] = {k: v for k, v in self.__dict__.items() if k != "handle"}
        else:
            self.__dict__.update(attributes)
            self.handle = handle

    tl.core.tensor.__init__ = make_tensor


def _skip_broadcasts_of_equal_shapes() -> None:
    """Return two operands as they are if their shapes are equal. Equal shapes are one object, see `_remember_types`."""
    from triton.runtime import interpreter

    semantic = getattr(interpreter, "interpreter_semantic", None)  # Triton 3.2 has none
    if semantic is None:
        return
    broadcast = semantic.broadcast_impl_value

    def broadcast_unequal(lhs: Any, rhs: Any) -> Any:
        return (lhs, rhs) if lhs.shape is rhs.shape else broadcast(lhs, rhs)

    semantic.broadcast_impl_value = broadcast_unequal
