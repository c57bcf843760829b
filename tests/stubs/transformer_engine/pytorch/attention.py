import torch
import torch.nn.functional as F
from torch import nn


class DotProductAttention(nn.Module):
    def __init__(
        self, num_attention_heads, kv_channels, *, num_gqa_groups=None, attention_dropout=0.0, softmax_scale=None,
        attn_mask_type="causal", **_,
    ):  # fmt: skip
        super().__init__()
        assert attn_mask_type in ("causal", "padding_causal")
        assert not attention_dropout
        self.softmax_scale = softmax_scale

    def forward(
        self, query, key, value, attention_mask=None, *, attn_mask_type="causal", qkv_format="sbhd",
        cu_seqlens_q=None, cu_seqlens_kv=None, **_,
    ):  # fmt: skip
        """[S, B, heads, d] -> [S, B, heads * d], or in the format thd [T, heads, d] -> [T, heads * d]."""
        if qkv_format == "thd":
            assert attn_mask_type == "padding_causal"
            assert cu_seqlens_q.dtype == torch.int32
            assert cu_seqlens_q.equal(cu_seqlens_kv)
            lengths = cu_seqlens_q.diff().tolist()
            parts = zip(*(each.split(lengths) for each in (query, key, value)), strict=True)
            return torch.cat([self._rows(*(each.unsqueeze(1) for each in part)).squeeze(1) for part in parts])
        assert (attn_mask_type, qkv_format) == ("causal", "sbhd")
        return self._rows(query, key, value)

    def _rows(self, query, key, value):
        q, k, v = (each.permute(1, 2, 0, 3) for each in (query, key, value))
        out = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=self.softmax_scale, enable_gqa=True)
        return out.permute(2, 0, 1, 3).flatten(2)
