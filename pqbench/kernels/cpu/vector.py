"""Registers of float32 lanes as a numba type, loaded from plain addresses: what LLVM does not vectorise by itself.

Kernels take memory as integer addresses and byte strides, so that strided views of growing buffers need no copy and one
compiled version serves every shape. ``kind`` arguments are scalars whose *type* names the storage, :data:`FLOAT32` or
:data:`BFLOAT16`; code is compiled for each and holds no branch.

A block of 16 numbers is held in two registers. For float32 these are the first and the last eight, for bfloat16 the
even and the odd ones: widening then costs one operation per register. Sums over all dimensions do not care;
:func:`lane` says where a dimension went.
"""

# An intrinsic gets the types of its arguments when code is made; most need no look.
# ruff: noqa: ARG001, ARG005

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from llvmlite import ir
from numba import njit, types
from numba.extending import intrinsic, models, register_model

FLOAT32, BFLOAT16 = np.float32(0), np.uint16(0)  # kinds of storage
BLOCK = 16  # numbers per block of two registers
OPTIONS: dict[str, Any] = {"nogil": True, "cache": True, "error_model": "numpy"}
INLINE: dict[str, Any] = {"nogil": True, "forceinline": True, "error_model": "numpy"}

INT8, INT32, INT64, FLOAT = ir.IntType(8), ir.IntType(32), ir.IntType(64), ir.FloatType()


class Register(types.Type):
    """Several lanes of one LLVM type."""

    def __init__(self, name: str, lane_type: Any, count: int) -> None:
        self.lane_type, self.count = lane_type, count
        super().__init__(name)


@register_model(Register)
class _RegisterModel(models.PrimitiveModel):
    def __init__(self, manager: Any, kind: Register) -> None:
        super().__init__(manager, kind, ir.VectorType(kind.lane_type, kind.count))


F32X8, F32X4, I32X8 = Register("f32x8", FLOAT, 8), Register("f32x4", FLOAT, 4), Register("i32x8", INT32, 8)
_VEC8, _VEC4, _WORDS8 = ir.VectorType(FLOAT, 8), ir.VectorType(FLOAT, 4), ir.VectorType(INT32, 8)


def pointer(builder: Any, address: Any, kind: Any) -> Any:
    """An address as a pointer to ``kind``."""
    return builder.inttoptr(address, kind.as_pointer())


def call_llvm(builder: Any, name: str, result: Any, arguments: list[Any]) -> Any:
    """Call an intrinsic of LLVM."""
    kind = ir.FunctionType(result, [argument.type for argument in arguments])
    return builder.call(builder.module.globals.get(name) or ir.Function(builder.module, kind, name), arguments)


def fill(builder: Any, scalar: Any, kind: Any) -> Any:
    """One scalar in all lanes."""
    undefined = ir.Constant(kind, ir.Undefined)
    return shuffle(builder, builder.insert_element(undefined, scalar, INT32(0)), None, [0] * kind.count)


def shuffle(builder: Any, left: Any, right: Any, order: list[int]) -> Any:
    """Lanes of two registers in some order; without ``right`` of one."""
    other = ir.Constant(left.type, ir.Undefined) if right is None else right
    return builder.shuffle_vector(left, other, ir.Constant(ir.VectorType(INT32, len(order)), order))


def operation(result: Any, kinds: list[Any], emit: Callable[..., Any]) -> Any:
    """An intrinsic of fixed types: ``emit(builder, *values)`` makes its code."""

    def code(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        value = emit(builder, *arguments)
        return context.get_dummy_value() if result is types.void else value

    return result(*kinds), code


@intrinsic
def load(typingctx: Any, kind: Any, address: Any, half: Any) -> Any:
    """Register ``half`` (literal 0 or 1) of the block of 16 numbers of storage ``kind`` at ``address``."""
    if not isinstance(half, types.IntegerLiteral):
        return None
    second = half.literal_value

    def emit(builder: Any, tag: Any, start: Any, number: Any) -> Any:
        if kind == types.float32:
            return builder.load(pointer(builder, builder.add(start, INT64(32 * second)), _VEC8), align=4)
        bits = builder.load(pointer(builder, start, _WORDS8), align=2)
        if second:
            wide = builder.and_(bits, fill(builder, INT32(0xFFFF0000), _WORDS8))
        else:
            wide = builder.shl(bits, fill(builder, INT32(16), _WORDS8))
        return builder.bitcast(wide, _VEC8)

    return operation(F32X8, [kind, types.int64, half], emit)


@njit(**INLINE)
def lane(kind: Any, dimension: int) -> int:
    """Place of a dimension among the numbers that :func:`load` returns for a row."""
    if is_bfloat16(kind):
        return dimension // 16 * 16 + dimension % 2 * 8 + dimension % 16 // 2
    return dimension


@intrinsic
def is_bfloat16(typingctx: Any, kind: Any) -> Any:
    """Whether a storage kind is bfloat16; a constant in compiled code."""
    answer = ir.IntType(1)(int(kind == types.uint16))
    return operation(types.boolean, [kind], lambda builder, tag: answer)


@intrinsic
def read_number(typingctx: Any, kind: Any, address: Any) -> Any:
    """The number of storage ``kind`` at ``address`` as float32."""

    def emit(builder: Any, tag: Any, start: Any) -> Any:
        if kind == types.float32:
            return builder.load(pointer(builder, start, FLOAT), align=4)
        bits = builder.zext(builder.load(pointer(builder, start, ir.IntType(16)), align=2), INT32)
        return builder.bitcast(builder.shl(bits, INT32(16)), FLOAT)

    return operation(types.float32, [kind, types.int64], emit)


@njit(**INLINE)
def number_bytes(kind: Any) -> int:
    """Bytes of a number of storage ``kind``."""
    return 2 if is_bfloat16(kind) else 4


@intrinsic
def load_in_order(typingctx: Any, kind: Any, address: Any) -> Any:
    """Eight numbers of storage ``kind`` in the order of memory."""

    def emit(builder: Any, tag: Any, start: Any) -> Any:
        if kind == types.float32:
            return builder.load(pointer(builder, start, _VEC8), align=4)
        bits = builder.load(pointer(builder, start, ir.VectorType(ir.IntType(16), 8)), align=2)
        return builder.bitcast(builder.shl(builder.zext(bits, _WORDS8), fill(builder, INT32(16), _WORDS8)), _VEC8)

    return operation(F32X8, [kind, types.int64], emit)


@njit(**INLINE)
def address_of(array: Any) -> int:
    """Where a contiguous array starts. Arrays die with their last use as arrays, so end with :func:`hold`."""
    return np.int64(array.ctypes.data)  # type: ignore[return-value]


@intrinsic
def hold(typingctx: Any, array: Any) -> Any:
    """Keep an array alive until here, while only its address is used."""
    return operation(types.void, [array], lambda builder, value: None)


def _reader(kind: Any, llvm: Any, align: int) -> Any:
    @intrinsic
    def op(typingctx: Any, address: Any) -> Any:
        return operation(kind, [types.int64], lambda b, start: b.load(pointer(b, start, llvm), align=align))

    return op


def _writer(kind: Any, llvm: Any, align: int) -> Any:
    @intrinsic
    def op(typingctx: Any, address: Any, value: Any) -> Any:
        emit = lambda b, start, number: b.store(number, pointer(b, start, llvm), align=align)  # noqa: E731
        return operation(types.void, [types.int64, kind], emit)

    return op


def _elementwise(emit: Callable[..., Any], operands: int) -> Any:
    """An intrinsic on registers of one type."""
    if operands == 2:

        @intrinsic
        def op(typingctx: Any, a: Any, b: Any) -> Any:
            return operation(a, [a, a], emit) if isinstance(a, Register) else None
    else:

        @intrinsic
        def op(typingctx: Any, a: Any, b: Any, c: Any) -> Any:
            return operation(a, [a, a, a], emit) if isinstance(a, Register) else None

    return op


def emit_fma(builder: Any, a: Any, b: Any, c: Any) -> Any:
    """a * b + c."""
    return call_llvm(builder, f"llvm.fma.v{a.type.count}f32", a.type, [a, b, c])


def emit_larger(builder: Any, a: Any, b: Any) -> Any:
    """Maximum; the second where the first is NaN."""
    return builder.select(builder.fcmp_ordered(">", a, b), a, b)


read_f32, write_f32 = _reader(types.float32, FLOAT, 4), _writer(types.float32, FLOAT, 4)
read_f32x8, write_f32x8 = _reader(F32X8, _VEC8, 4), _writer(F32X8, _VEC8, 4)
read_f32x4, write_f32x4 = _reader(F32X4, _VEC4, 4), _writer(F32X4, _VEC4, 4)
read_i64, write_i64 = _reader(types.int64, INT64, 8), _writer(types.int64, INT64, 8)
read_i32, write_i32 = _reader(types.int32, INT32, 4), _writer(types.int32, INT32, 4)
read_u8, write_u8 = _reader(types.uint8, INT8, 1), _writer(types.uint8, INT8, 1)
write_u16 = _writer(types.uint16, ir.IntType(16), 2)
add = _elementwise(lambda builder, a, b: builder.fadd(a, b), 2)
subtract = _elementwise(lambda builder, a, b: builder.fsub(a, b), 2)
multiply = _elementwise(lambda builder, a, b: builder.fmul(a, b), 2)
larger = _elementwise(emit_larger, 2)  # the second where the first is NaN or equal
fma = _elementwise(emit_fma, 3)  # a * b + c
