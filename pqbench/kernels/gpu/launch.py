"""What launches of Triton kernels share: the device, block sizes, splits of a long axis, precision of products.

Importing the ``gpu`` modules needs Triton but no GPU. With ``TRITON_INTERPRET=1``, set before Triton is imported, the
same kernels run on CPU tensors, slowly: so they are tested where there is no GPU.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

MOST_SPLITS = 64  # partial results of one row; kernels that merge them hold one number of each in registers
_HALVES = (torch.bfloat16, torch.float16)


@triton.jit
def read(number: tl.tensor) -> tl.tensor:
    """A number that was passed as such, or by its address on the device."""
    if number.dtype.is_ptr():
        number = tl.load(number)
    return number


@triton.jit
def share(count: tl.tensor, block: tl.constexpr) -> tuple[tl.tensor, tl.tensor]:
    """First and last + 1 of ``count`` tokens that are this program's, one of those along the second axis of the grid:
    whole blocks of them. It depends on the count and on how many programs there are, not on the room around."""
    size = tl.cdiv(tl.cdiv(count, block), tl.num_programs(1)) * block
    first = tl.program_id(1) * size
    return first, tl.minimum(count, first + size)


@triton.jit
def rows_of(x: tl.tensor, outer: tl.tensor, pair: tl.tensor, heads: tl.tensor, unit: tl.constexpr) -> tl.tensor:
    """Where the rows of a pair of sequence and head begin, given the two strides of these in units (:func:`outer`)."""
    sequence, head = (pair // heads).to(tl.int64), (pair % heads).to(tl.int64)
    return x + sequence * unit * outer[0] + head * unit * outer[1]


@triton.jit
def product(a: tl.tensor, b: tl.tensor, precision: tl.constexpr) -> tl.tensor:
    """Matrix product accumulated in float32; ``precision`` is that of :func:`precision_for`."""
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
    """Products ``[M, N]`` of rows that begin at addresses ``a`` ``[M]`` with rows at ``b`` ``[N]``, zero for rows not
    ``seen``. ``chunk`` dimensions at a time, so that registers suffice whatever the width."""
    result = tl.zeros([a.shape[0], b.shape[0]], tl.float32)
    for start in range(0, width, chunk):
        d = start + tl.arange(0, chunk)
        left = tl.load(a[:, None] + d[None, :], mask=a_seen[:, None] & (d < width)[None, :], other=0.0)
        right = tl.load(b[:, None] + d[None, :], mask=b_seen[:, None] & (d < width)[None, :], other=0.0)
        result += product(left, tl.trans(right), precision)
    return result


def chunk_for(width: int, precision: str) -> int:
    """Dimensions that one product sums over: three TF32 products hold their operands in registers twice."""
    return min(power(width, 16), 32 if precision == "tf32x3" else 128)


def precision_for(*operands: Tensor) -> str:
    """How tensor cores multiply: nothing of the operands is rounded away.

    Two operands of one half type multiply as they are, products being exact in float32. Both half types fit in TF32
    (8 bits of exponent, 10 of mantissa), so mixed ones do too. Float32 is split into three TF32 products, which leaves
    an error near that of float32 itself. The interpreter computes with numpy, which has no bfloat16.
    """
    kinds = {operand.dtype for operand in operands}
    if not kinds <= set(_HALVES):
        return "tf32x3"
    interpreted = torch.bfloat16 in kinds and triton.knobs.runtime.interpret
    return "native" if len(kinds) == 1 and not interpreted else "tf32"


def on(*tensors: Tensor) -> AbstractContextManager[object]:
    """Launches inside go to the device, and its current stream, of the first tensor that is on a GPU."""
    for tensor in tensors:
        if tensor.is_cuda:
            return torch.cuda.device(tensor.device)
    return nullcontext()


def options(warps: int = 4) -> dict[str, Any]:
    """Options of a launch. Multiplication and addition fuse, whatever Triton's default, which changes in 3.10."""
    return {"num_warps": warps, "num_stages": 2, "enable_fp_fusion": True}


def power(count: int, least: int = 1) -> int:
    """The smallest power of two that is at least ``count`` and ``least``; blocks have such sizes."""
    return max(least, 1 << max(count - 1, 0).bit_length())


def blocks(count: int, block: int) -> int:
    """Blocks that cover ``count``, at least one."""
    return max(1, -(-count // block))


def split(count: int, block: int, programs: int, device: torch.device) -> int:
    """In how many parts to split rows of ``count`` tokens when there are ``programs`` of them. Twice as many programs
    as multiprocessors keep a GPU busy; more would only lengthen the merge."""
    return min(MOST_SPLITS, blocks(count, block), blocks(2 * processors(device), programs))


def processors(device: torch.device) -> int:
    """Multiprocessors of a GPU; some for the interpreter, so that it splits rows too."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 4


def outer(*tensors: Tensor, axes: int = 2) -> tuple[int, tuple[tuple[int, ...], ...]]:
    """A unit and, for each of the tensors, the strides of its first ``axes`` axes in that unit.

    Those strides grow with a context, so kernels must not be compiled for their values; yet wide loads need to know
    that rows begin at multiples of 16. So it is the unit that a kernel is compiled for: 16 elements where the stride of
    the next axis, which no length changes, is a multiple of 16 and the outer ones are too, else 1.

    A kernel takes each stride as an argument of its own, named in ``do_not_specialize``: what a tuple holds Triton
    specialises whatever it is told.
    """
    strides = [x.stride()[: axes + 1] for x in tensors]
    unit = 16 if all(number % 16 == 0 for row in strides for number in row) else 1
    return unit, tuple(tuple(number // unit for number in row[:axes]) for row in strides)


def upload(x: Tensor, device: torch.device) -> Tensor:
    """``x`` from the host on ``device``, without waiting for work under way there.

    The page-locked block may be freed before the copy has read it: ``to`` leaves an event of the copy's stream with
    torch's allocator of such memory, which gives the block to nobody before that has passed. The allocator knows
    nothing of kernels that read a block by its address; for them the tensor must be kept. Of ``x`` that is page-locked
    already no block is made.
    """
    return x.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else x.to(device)


def dense_rows(x: Tensor) -> Tensor:
    """``x``, copied only where its last axis is not contiguous; kernels take every other stride."""
    return x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()
