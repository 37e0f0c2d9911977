"""`torch.nn.functional.multi_head_attention_forward` written as calls that can be followed one by one.

torch shows the whole function as a single call whose batch is the second dimension. `nn.MultiheadAttention` and WavLM
rest on it. Here the samples come first and each projection is a call of its own.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from ..base import UnsupportedModelError


def multi_head_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    embed_dim_to_check: int,
    num_heads: int,
    in_proj_weight: Tensor | None,
    in_proj_bias: Tensor | None,
    bias_k: Tensor | None,
    bias_v: Tensor | None,
    add_zero_attn: bool,
    dropout_p: float,
    out_proj_weight: Tensor,
    out_proj_bias: Tensor | None,
    training: bool = True,
    key_padding_mask: Tensor | None = None,
    need_weights: bool = True,
    attn_mask: Tensor | None = None,
    use_separate_proj_weight: bool = False,
    q_proj_weight: Tensor | None = None,
    k_proj_weight: Tensor | None = None,
    v_proj_weight: Tensor | None = None,
    static_k: Tensor | None = None,
    static_v: Tensor | None = None,
    average_attn_weights: bool = True,
    is_causal: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """Arguments and results are those of the torch function: query (L, N, E), key and value (S, N, E).

    Raises:
        UnsupportedModelError: Unbatched inputs, added key and value rows, or static keys and values.
    """
    unusual = {"bias_k": bias_k, "bias_v": bias_v, "static_k": static_k, "static_v": static_v}
    given = [name for name, argument in unusual.items() if argument is not None]
    if given or add_zero_attn or query.ndim != 3:
        raise UnsupportedModelError(
            f"multi_head_attention_forward is followed only for batched inputs without added or static keys, but was "
            f"called with {', '.join(given) or 'add_zero_attn or unbatched inputs'}. Set `gradient_engine` to 'loop'."
        )
    packed = None if use_separate_proj_weight else in_proj_weight  # given in both cases, possibly empty
    projected = _project(query, key, value, packed, (q_proj_weight, k_proj_weight, v_proj_weight), in_proj_bias)
    q, k, v = (tensor.unflatten(-1, (num_heads, -1)).transpose(1, 2) for tensor in projected)
    mask = _additive_mask(attn_mask, key_padding_mask, len(q), num_heads, q.dtype)
    dropout_p = dropout_p if training else 0.0
    if need_weights:
        scores = q @ k.transpose(-2, -1) * q.shape[-1] ** -0.5
        weights = (scores if mask is None else scores + mask).softmax(dim=-1)
        attended = F.dropout(weights, dropout_p) @ v
        weights = weights.mean(dim=1) if average_attn_weights else weights
    else:
        attended, weights = F.scaled_dot_product_attention(q, k, v, mask, dropout_p), None
    output = F.linear(attended.transpose(1, 2).flatten(2), out_proj_weight, out_proj_bias)
    return output.transpose(0, 1), weights


def _project(query, key, value, packed_weight, separate_weights, bias) -> tuple[Tensor, ...]:
    """Queries, keys and values, each (N, T, E), the samples first."""
    if packed_weight is not None and query is key and key is value:
        return F.linear(query.transpose(0, 1), packed_weight, bias).chunk(3, dim=-1)
    weights = separate_weights if packed_weight is None else packed_weight.chunk(3)
    biases = (None,) * 3 if bias is None else bias.chunk(3)
    inputs = (tensor.transpose(0, 1) for tensor in (query, key, value))
    return tuple(F.linear(*arguments) for arguments in zip(inputs, weights, biases, strict=True))


def _additive_mask(
    attn_mask: Tensor | None, key_padding_mask: Tensor | None, samples: int, num_heads: int, dtype: torch.dtype
) -> Tensor | None:
    """Both masks as one to be added to scores of shape (N, heads, L, S)."""
    masks = []
    if attn_mask is not None:
        attn_mask = _as_additive(attn_mask, dtype)
        masks.append(attn_mask.unflatten(0, (samples, num_heads)) if attn_mask.ndim == 3 else attn_mask)
    if key_padding_mask is not None:
        masks.append(_as_additive(key_padding_mask, dtype)[:, None, None, :])
    return sum(masks[1:], masks[0]) if masks else None


def _as_additive(mask: Tensor, dtype: torch.dtype) -> Tensor:
    if mask.dtype != torch.bool:
        return mask.to(dtype)
    return torch.zeros_like(mask, dtype=dtype).masked_fill(mask, float("-inf"))
