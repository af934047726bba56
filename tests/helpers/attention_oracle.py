"""Attention and RoPE in plain PyTorch: the definitions that the operators are compared with."""

from __future__ import annotations

import torch
from torch import Tensor


def rotate(x: Tensor, cos: Tensor, sin: Tensor, rotary_dim: int, interleaved: bool) -> Tensor:
    """RoPE on x [B, T, H, D] in float32; cos and sin [B or 1, T, >= rotary_dim / 2]."""
    half = rotary_dim // 2
    cos, sin = (t[..., None, :half].float() for t in (cos, sin))
    turned, rest = x.float()[..., :rotary_dim], x.float()[..., rotary_dim:]
    if interleaved:
        a, b = turned[..., 0::2], turned[..., 1::2]
        turned = torch.stack((a * cos - b * sin, b * cos + a * sin), -1).flatten(-2)
    else:
        a, b = turned[..., :half], turned[..., half:]
        turned = torch.cat((a * cos - b * sin, b * cos + a * sin), -1)
    return torch.cat((turned, rest), -1).to(x.dtype)


def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    key_scales: Tensor | None = None,
    value_scales: Tensor | None = None,
    length: Tensor | None = None,
    mask: Tensor | None = None,
    alibi_slopes: Tensor | None = None,
    *,
    scale: float,
    causal: bool,
    window: int = 0,
    softcap: float = 0.0,
    sinks: Tensor | None = None,
) -> Tensor:
    """The same in float64, result float64 [B, T, H, Dv]."""
    batch, tokens, heads, _ = query.shape
    n = key.shape[2] if length is None else int(length)
    group = heads // key.shape[1]

    def expand(t: Tensor, scales: Tensor | None) -> Tensor:
        t = t[:, :, :n].double()
        if scales is not None:
            t = t * scales[:, :, :n, None].double()
        return t.repeat_interleave(group, 1)

    k, v = expand(key, key_scales), expand(value, value_scales)
    scores = query.double().transpose(1, 2) @ k.transpose(-1, -2) * scale
    if softcap:
        scores = softcap * torch.tanh(scores / softcap)
    at = torch.arange(n)
    position = (n - tokens + torch.arange(tokens))[:, None]
    seen = torch.ones(batch, heads, tokens, n, dtype=torch.bool)
    if causal:
        seen &= at <= position
    if window:
        seen &= at > position - window
    if alibi_slopes is not None:
        scores = scores + alibi_slopes.double().expand(batch, heads)[..., None, None] * at
    if mask is not None:
        mask = mask[..., :n]
        if mask.dtype == torch.bool:
            seen &= mask
        else:
            scores = scores + mask.double()
            seen &= ~(mask <= torch.finfo(mask.dtype).min)
    scores = scores.masked_fill(~seen, -torch.inf)
    if sinks is not None:  # a score more, without a value
        scores = torch.cat((scores, sinks.double()[:, None, None].expand(batch, heads, tokens, 1)), -1)
    weights = torch.softmax(scores, -1)[..., :n].masked_fill(~seen.any(-1, keepdim=True), 0.0)
    weights = weights[..., None].masked_fill(~seen[..., None], 0.0)
    # A key that a row does not see adds nothing, even where it is NaN.
    values = torch.where(seen[..., None], v[:, :, None], 0.0)
    return (weights * values).sum(-2).transpose(1, 2)
