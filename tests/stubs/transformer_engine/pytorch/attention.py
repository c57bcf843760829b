import torch.nn.functional as F
from torch import nn


class DotProductAttention(nn.Module):
    def __init__(
        self, num_attention_heads, kv_channels, *, num_gqa_groups=None, attention_dropout=0.0, softmax_scale=None,
        attn_mask_type="causal", **_,
    ):  # fmt: skip
        super().__init__()
        assert attn_mask_type == "causal"
        assert not attention_dropout
        self.softmax_scale = softmax_scale

    def forward(self, query, key, value, attention_mask=None, *, attn_mask_type="causal", qkv_format="sbhd", **_):
        """[S, B, heads, d] -> [S, B, heads * d]."""
        assert (attn_mask_type, qkv_format) == ("causal", "sbhd")
        q, k, v = (each.permute(1, 2, 0, 3) for each in (query, key, value))
        out = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=self.softmax_scale, enable_gqa=True)
        return out.permute(2, 0, 1, 3).flatten(2)
