"""What all launches of Triton kernels share: the device, block sizes, splits of a long axis, precision of products.

Importing the ``gpu`` modules needs Triton but no GPU. If ``TRITON_INTERPRET=1`` is set before Triton is imported, the
same kernels run on CPU tensors, slowly. In this way they are tested without a GPU.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

MOST_SPLITS = 64  # most partial results of one row; the kernels that merge them hold a number of each in registers
_HALVES = (torch.bfloat16, torch.float16)


@triton.jit
def read(number: tl.tensor) -> tl.tensor:
    """The value of a number that was passed by value or by its address on the device."""
    if number.dtype.is_ptr():
        number = tl.load(number)
    return number


@triton.jit
def share(count: tl.tensor, block: tl.constexpr) -> tuple[tl.tensor, tl.tensor]:
    """First and one-past-last of the ``count`` tokens that belong to this program. The programs along the second axis
    of the grid share the tokens in whole blocks. The result depends only on ``count`` and the number of programs."""
    size = tl.cdiv(tl.cdiv(count, block), tl.num_programs(1)) * block
    first = tl.program_id(1) * size
    return first, tl.minimum(count, first + size)


@triton.jit
def rows_of(x: tl.tensor, outer: tl.tensor, pair: tl.tensor, heads: tl.tensor, unit: tl.constexpr) -> tl.tensor:
    """Address of the first row of a pair of sequence and head; ``outer`` holds their strides in units, see
    :func:`outer`."""
    sequence, head = (pair // heads).to(tl.int64), (pair % heads).to(tl.int64)
    return x + sequence * unit * outer[0] + head * unit * outer[1]


@triton.jit
def product(a: tl.tensor, b: tl.tensor, precision: tl.constexpr) -> tl.tensor:
    """Matrix product with accumulation in float32; ``precision`` comes from :func:`precision_for`."""
    if precision == "native":
        result = tl.dot(a, b)
    else:
        result = tl.dot(a.to(tl.float32), b.to(tl.float32), input_precision=precision)
    return result


@triton.jit
def row_products(
    a: tl.tensor,
    b: tl.tensor,
    a_seen: tl.tensor,
    b_seen: tl.tensor,
    width: tl.constexpr,
    chunk: tl.constexpr,
    precision: tl.constexpr,
) -> tl.tensor:
    """Products ``[M, N]`` of the rows at addresses ``a`` ``[M]`` with the rows at ``b`` ``[N]``; rows that are not
    ``seen`` count as zero. The product sums over ``chunk`` dimensions at a time, so that there are enough registers for
    any width."""
    result = tl.zeros([a.shape[0], b.shape[0]], tl.float32)
    for start in range(0, width, chunk):
        d = start + tl.arange(0, chunk)
        left = tl.load(a[:, None] + d[None, :], mask=a_seen[:, None] & (d < width)[None, :], other=0.0)
        right = tl.load(b[:, None] + d[None, :], mask=b_seen[:, None] & (d < width)[None, :], other=0.0)
        result += product(left, tl.trans(right), precision)
    return result


def chunk_for(width: int, precision: str) -> int:
    """Number of dimensions that one product sums over. It is smaller for three TF32 products, which hold their operands
    in registers twice."""
    return min(power(width, 16), 32 if precision == "tf32x3" else 128)


def precision_for(*operands: Tensor) -> str:
    """The precision with which tensor cores multiply these operands, chosen so that operands are not rounded.

    Two operands of the same half type are multiplied directly, because their products are exact in float32. Operands of
    different half types are converted to TF32 (8 bits of exponent, 10 of mantissa), which holds both exactly. A float32
    product is split into three TF32 products, whose error is near that of float32. Triton's interpreter uses TF32 for
    bfloat16, because numpy has no bfloat16.
    """
    kinds = {operand.dtype for operand in operands}
    if not kinds <= set(_HALVES):
        return "tf32x3"
    interpreted = torch.bfloat16 in kinds and triton.knobs.runtime.interpret
    return "native" if len(kinds) == 1 and not interpreted else "tf32"


def on(*tensors: Tensor) -> AbstractContextManager[object]:
    """Within this context, kernels are launched on the device, and on its current stream, of the first tensor on a
    GPU."""
    for tensor in tensors:
        if tensor.is_cuda:
            return torch.cuda.device(tensor.device)
    return nullcontext()


def options(warps: int = 4) -> dict[str, Any]:
    """Options of a launch. Multiplication and addition are always fused, because Triton's default changes in 3.10."""
    return {"num_warps": warps, "num_stages": 2, "enable_fp_fusion": True}


def power(count: int, least: int = 1) -> int:
    """The smallest power of two that is at least ``count`` and ``least``; Triton's blocks need such sizes."""
    return max(least, 1 << max(count - 1, 0).bit_length())


def blocks(count: int, block: int) -> int:
    """Number of blocks that cover ``count``, at least one."""
    return max(1, -(-count // block))


def split(count: int, block: int, programs: int, device: torch.device) -> int:
    """Number of parts into which to split each of ``programs`` rows of ``count`` tokens. Twice as many programs as
    multiprocessors keep a GPU busy; more would only make the merge longer."""
    return min(MOST_SPLITS, blocks(count, block), blocks(2 * processors(device), programs))


def processors(device: torch.device) -> int:
    """Number of multiprocessors of a GPU; 4 for the interpreter, so that it also splits rows."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 4


def outer(*tensors: Tensor, axes: int = 2) -> tuple[int, tuple[tuple[int, ...], ...]]:
    """A unit in elements and, for each tensor, the strides of its first ``axes`` axes in this unit.

    These strides grow with the context, so kernels must not be compiled for their values. Wide loads, however, need to
    know at compile time that rows begin at multiples of 16 elements. Kernels are therefore compiled for the unit: it is
    16 if these strides and that of the next axis are multiples of 16, otherwise 1.

    A kernel takes each stride as a separate argument that is named in ``do_not_specialize``, because Triton always
    specialises the members of a tuple.
    """
    strides = [x.stride()[: axes + 1] for x in tensors]
    unit = 16 if all(number % 16 == 0 for row in strides for number in row) else 1
    return unit, tuple(tuple(number // unit for number in row[:axes]) for row in strides)


def upload(x: Tensor, device: torch.device) -> Tensor:
    """A copy of the host tensor ``x`` on ``device``, made without waiting for the work of the device.

    The page-locked block that this uses may be freed before the copy has read it: ``to`` records an event with torch's
    allocator, which does not reuse the block before the event has passed. The allocator does not know about kernels
    that read a block by its address; for these the tensor must be held. If ``x`` is already page-locked, no block is
    made.
    """
    return x.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else x.to(device)


def dense_rows(x: Tensor) -> Tensor:
    """``x``, or a contiguous copy if its last axis is not contiguous; kernels support any other strides."""
    return x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()
