"""Operations on registers beyond arithmetic: powers, reductions in a fixed order, comparisons, prefetch."""

# Numba passes an intrinsic the types of its arguments at compile time; most intrinsics do not need them.
# ruff: noqa: ARG001

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from pqbench.kernels.cpu.vector import (
    F32X4,
    F32X8,
    FLOAT,
    I32X8,
    INT8,
    INT32,
    INT64,
    Register,
    call_llvm,
    emit_fma,
    emit_larger,
    fill,
    operation,
    pointer,
    shuffle,
)

_MAGIC = 12582912.0  # 1.5 * 2**23: adding it rounds a small float to an integer, found in the low bits
# 2**x on [-1/2, 1/2]: Taylor polynomial of exp(x ln 2), relative error 2e-7 with the rounding of float32
_EXP2 = [
    0.00015403530393381609,
    0.0013333558146428443,
    0.009618129107628477,
    0.05550410866482158,
    0.24022650695910072,
    0.6931471805599453,
    1.0,
]
_SMALLEST = -126.0  # powers below 2**-126 are zero


@intrinsic
def splat(typingctx: Any, number: Any) -> Any:
    """One float in eight lanes."""
    return operation(F32X8, [types.float32], lambda b, x: fill(b, x, ir.VectorType(FLOAT, 8)))


@intrinsic
def splat4(typingctx: Any, number: Any) -> Any:
    """One float in four lanes."""
    return operation(F32X4, [types.float32], lambda b, x: fill(b, x, ir.VectorType(FLOAT, 4)))


@intrinsic
def count_from(typingctx: Any, first: Any) -> Any:
    """Integers first to first + 7."""

    def emit(builder: Any, start: Any) -> Any:
        kind = ir.VectorType(INT32, 8)
        return builder.add(fill(builder, start, kind), ir.Constant(kind, list(range(8))))

    return operation(I32X8, [types.int32], emit)


@intrinsic
def exp2(typingctx: Any, x: Any) -> Any:
    """2**x for x <= 127; zero if the result is below 2**-126, NaN for NaN."""
    if not isinstance(x, Register):
        return None

    def emit(builder: Any, x: Any) -> Any:
        constant = lambda number: fill(builder, ir.Constant(FLOAT, number), x.type)  # noqa: E731
        shifted = builder.fadd(x, constant(_MAGIC))
        rest = builder.fsub(x, builder.fsub(shifted, constant(_MAGIC)))
        power = constant(_EXP2[0])
        for coefficient in _EXP2[1:]:
            power = emit_fma(builder, power, rest, constant(coefficient))
        whole = ir.VectorType(INT32, x.type.count)
        exponent = builder.shl(builder.bitcast(shifted, whole), fill(builder, INT32(23), whole))
        scaled = builder.bitcast(builder.add(builder.bitcast(power, whole), exponent), x.type)
        tiny = builder.fcmp_ordered("<", x, constant(_SMALLEST))
        return builder.select(tiny, constant(0.0), scaled)

    return operation(x, [x], emit)


@intrinsic
def sums_of_four(typingctx: Any, a: Any, b: Any, c: Any, d: Any) -> Any:
    """Sums over the lanes of four registers of eight, as one register of four."""

    def pairs(builder: Any, left: Any, right: Any) -> Any:
        even = shuffle(builder, left, right, [0, 2, 8, 10, 4, 6, 12, 14])
        return builder.fadd(even, shuffle(builder, left, right, [1, 3, 9, 11, 5, 7, 13, 15]))

    def emit(builder: Any, a: Any, b: Any, c: Any, d: Any) -> Any:
        total = pairs(builder, pairs(builder, a, b), pairs(builder, c, d))
        low = shuffle(builder, total, None, [0, 1, 2, 3])
        return builder.fadd(low, shuffle(builder, total, None, [4, 5, 6, 7]))

    return operation(F32X4, [F32X8] * 4, emit)


@intrinsic
def sums_of_quads(typingctx: Any, a: Any, b: Any, c: Any, d: Any) -> Any:
    """Sums over the lanes of four registers of four, as one register of four."""

    def pairs(builder: Any, left: Any, right: Any) -> Any:
        even = shuffle(builder, left, right, [0, 2, 4, 6])
        return builder.fadd(even, shuffle(builder, left, right, [1, 3, 5, 7]))

    def emit(builder: Any, a: Any, b: Any, c: Any, d: Any) -> Any:
        return pairs(builder, pairs(builder, a, b), pairs(builder, c, d))

    return operation(F32X4, [F32X4] * 4, emit)


@intrinsic
def swap_halves(typingctx: Any, a: Any) -> Any:
    """The register with lanes 4 to 7 first, then lanes 0 to 3."""
    return operation(F32X8, [F32X8], lambda b, x: shuffle(b, x, None, [4, 5, 6, 7, 0, 1, 2, 3]))


def _fold(builder: Any, x: Any, combine: Any) -> Any:
    """Combine eight lanes into one, in a fixed order."""
    for step in (4, 2, 1):
        x = combine(builder, x, shuffle(builder, x, None, [(i + step) % 8 for i in range(8)]))
    return builder.extract_element(x, INT32(0))


@intrinsic
def total(typingctx: Any, a: Any) -> Any:
    """Sum over eight lanes."""
    return operation(types.float32, [F32X8], lambda b, x: _fold(b, x, lambda b, x, y: b.fadd(x, y)))


@intrinsic
def largest(typingctx: Any, a: Any) -> Any:
    """Maximum over eight lanes."""
    return operation(types.float32, [F32X8], lambda b, x: _fold(b, x, emit_larger))


@intrinsic
def where_greater(typingctx: Any, a: Any, b: Any, x: Any, y: Any) -> Any:
    """Lanes of the integers x where a > b, otherwise lanes of y."""

    def emit(builder: Any, a: Any, b: Any, x: Any, y: Any) -> Any:
        return builder.select(builder.fcmp_ordered(">", a, b), x, y)

    return operation(I32X8, [F32X8, F32X8, I32X8, I32X8], emit)


@intrinsic
def index_of_largest(typingctx: Any, scores: Any, indices: Any) -> Any:
    """The smallest of ``indices`` among the lanes with the largest score."""

    def smaller(builder: Any, a: Any, b: Any) -> Any:
        return builder.select(builder.icmp_signed("<", a, b), a, b)

    def emit(builder: Any, scores: Any, indices: Any) -> Any:
        best = fill(builder, _fold(builder, scores, emit_larger), scores.type)
        never = fill(builder, INT32(0x7FFFFFFF), indices.type)
        return _fold(builder, builder.select(builder.fcmp_ordered("==", scores, best), indices, never), smaller)

    return operation(types.int32, [F32X8, I32X8], emit)


def _mask(builder: Any, lanes: Any) -> Any:
    return builder.zext(builder.bitcast(lanes, INT8), INT32)


@intrinsic
def greater_mask(typingctx: Any, a: Any, b: Any) -> Any:
    """A mask whose bit i is set if lane i of a is greater than that of b."""
    return operation(types.int32, [F32X8, F32X8], lambda c, a, b: _mask(c, c.fcmp_ordered(">", a, b)))


@intrinsic
def not_less_mask(typingctx: Any, a: Any, b: Any) -> Any:
    """A mask whose bit i is set if lane i of a is at least that of b, or if one of them is NaN."""
    return operation(types.int32, [F32X8, F32X8], lambda c, a, b: _mask(c, c.fcmp_unordered(">=", a, b)))


@intrinsic
def trailing_zeros(typingctx: Any, mask: Any) -> Any:
    """Position of the lowest set bit of a mask that is not zero."""

    def emit(builder: Any, mask: Any) -> Any:
        return call_llvm(builder, "llvm.cttz.i32", INT32, [mask, ir.IntType(1)(1)])

    return operation(types.int32, [types.int32], emit)


@intrinsic
def bits_of(typingctx: Any, number: Any) -> Any:
    """The bits of a float32."""
    return operation(types.uint32, [types.float32], lambda b, x: b.bitcast(x, INT32))


@intrinsic
def float_of(typingctx: Any, bits: Any) -> Any:
    """The float32 that has these bits."""
    return operation(types.float32, [types.uint32], lambda b, x: b.bitcast(x, FLOAT))


@intrinsic
def prefetch(typingctx: Any, address: Any) -> Any:
    """Prefetch the cache line at ``address``, which may be invalid.

    The line goes to the level 2 cache. The level 1 cache can wait for too few lines at once, and prefetching whole rows
    into it took 1.5 times as long."""

    def emit(builder: Any, address: Any) -> Any:
        place = builder.inttoptr(address, INT8.as_pointer())
        kind = ir.FunctionType(ir.VoidType(), [place.type, INT32, INT32, INT32])
        function = builder.module.globals.get("llvm.prefetch.p0") or ir.Function(
            builder.module, kind, "llvm.prefetch.p0"
        )
        return builder.call(function, [place, INT32(0), INT32(2), INT32(1)])  # arguments: read, level 2 cache, data

    return operation(types.void, [types.int64], emit)


@intrinsic
def copy_bytes(typingctx: Any, target: Any, source: Any, count: Any) -> Any:
    """Copy ``count`` bytes between addresses (memcpy)."""

    def emit(builder: Any, target: Any, source: Any, count: Any) -> Any:
        to, start = pointer(builder, target, INT8), pointer(builder, source, INT8)
        kind = ir.FunctionType(ir.VoidType(), [to.type, start.type, INT64, ir.IntType(1)])
        name = "llvm.memcpy.p0.p0.i64"
        function = builder.module.globals.get(name) or ir.Function(builder.module, kind, name)
        return builder.call(function, [to, start, count, ir.IntType(1)(0)])

    return operation(types.void, [types.int64] * 3, emit)
