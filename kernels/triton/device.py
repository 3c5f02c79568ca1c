"""What several kernels share: reading maps and streams, mixing, joining, and the dropout mask.

Streams and maps are tuples with one ``[BT, BC]`` tile per stream and one ``[BT]`` vector per map
entry, so that the order of every sum over streams is written down. ``tl.fma`` is explicit for the
same reason: two kernels that mix the same streams store the same bits.
"""

import triton
import triton.language as tl


@triton.jit
def load_maps(ptr, t, rows, COUNT: tl.constexpr):
    """Row-major maps ``[T, COUNT]`` -> COUNT vectors ``[BT]``."""
    maps = ()
    for i in tl.static_range(COUNT):
        maps = maps + (tl.load(ptr + t * COUNT + i, mask=rows, other=0.0),)
    return maps


@triton.jit
def columns(tile, COUNT: tl.constexpr):
    """``[BT, COUNT]`` -> COUNT vectors ``[BT]``; COUNT is a power of two."""
    if COUNT == 1:
        return (tl.reshape(tile, [tile.shape[0]]),)
    else:
        halves = tl.permute(tl.reshape(tile, [tile.shape[0], 2, COUNT // 2]), (0, 2, 1))
        first, second = tl.split(halves)
        return columns(first, COUNT // 2) + columns(second, COUNT // 2)


@triton.jit
def load_streams(ptr, offsets, C, mask, N: tl.constexpr):
    """Streams at ``offsets`` of stream 0 -> N tiles ``[BT, BC]`` as they are stored."""
    streams = ()
    for i in tl.static_range(N):
        streams = streams + (tl.load(ptr + offsets + i * C, mask=mask, other=0.0),)
    return streams


@triton.jit
def widened(streams, N: tl.constexpr):
    wide = ()
    for i in tl.static_range(N):
        wide = wide + (streams[i].to(tl.float32),)
    return wide


@triton.jit
def mix(maps, streams, FIRST: tl.constexpr, STEP: tl.constexpr, N: tl.constexpr):
    """sum_j maps[FIRST + j * STEP] * streams[j], in the order of the streams."""
    total = maps[FIRST][:, None] * streams[0].to(tl.float32)
    for j in tl.static_range(1, N):
        total = tl.fma(maps[FIRST + j * STEP][:, None], streams[j].to(tl.float32), total)
    return total


@triton.jit
def join(streams, FIRST: tl.constexpr, STEP: tl.constexpr, N: tl.constexpr):
    """N tiles ``[BT, BC]`` -> one ``[BT, BC, N]`` (its last axes may still be powers of two)."""
    if N == 1:
        return streams[FIRST]
    else:
        even = join(streams, FIRST, STEP * 2, N // 2)
        odd = join(streams, FIRST + STEP, STEP * 2, N // 2)
        return tl.join(even, odd)


@triton.jit
def split(value, PRECISION: tl.constexpr):
    """fp32 -> high and low part in bf16; otherwise the value, twice."""
    if PRECISION == 'bf16x2':
        high = value.to(tl.bfloat16)
        return high, (value - high.to(tl.float32)).to(tl.bfloat16)
    else:
        return value, value


@triton.jit
def fold(tile, VEC: tl.constexpr):
    """Sum of VEC neighbours, which one thread holds: the cheap part of a sum over channels."""
    return tl.sum(tl.reshape(tile, [tile.shape[0], tile.shape[1] // VEC, VEC]), 2)


@triton.jit
def sublayer_output(
    y_ptr,
    bias_ptr,
    seed_ptr,
    t,
    c0,
    c,
    C,
    mask,
    threshold,
    scale,
    HAS_BIAS: tl.constexpr,
    DROPOUT: tl.constexpr,
):
    """dropout(y + bias) in fp32, ``[BT, BC]``."""
    y = tl.load(y_ptr + t[:, None] * C + c[None, :], mask=mask, other=0.0).to(tl.float32)
    if HAS_BIAS:
        y += tl.load(bias_ptr + c, mask=c < C, other=0.0).to(tl.float32)[None, :]
    if DROPOUT:
        y *= dropout_scale(seed_ptr, t, c0, C, threshold, scale, c.shape[0])
    return y


@triton.jit
def dropout_scale(seed_ptr, t, c0, C, threshold, scale, BC: tl.constexpr):
    """0 where the element is dropped, else ``scale`` = 1 / (1 - p); ``[BT, BC]``.

    Philox 4x32-10 with the seed as key and (t * ceil(C/4) + c // 4) as counter; the word is c % 4.
    ``reference/dropout.py`` is its torch form.
    """
    BT: tl.constexpr = t.shape[0]
    # One counter for each 4 channels: c0 is a multiple of 4.
    group = c0 // 4 + tl.arange(0, BC // 4)
    counter = t.to(tl.int64)[:, None] * ((C + 3) // 4) + group[None, :]
    r0, r1, r2, r3 = tl.randint4x(tl.load(seed_ptr), counter)
    words = tl.reshape(tl.join(tl.join(r0, r2), tl.join(r1, r3)), [BT, BC])
    # The upper 24 bits reach the threshold where the word reaches 256 times it; 2^24 none reaches.
    least = tl.full([], 256, tl.uint32) * threshold
    kept = tl.where(threshold < 2**24, scale, 0.0)
    return tl.where(words.to(tl.uint32, bitcast=True) >= least, kept, 0.0)
