from transformer_engine.pytorch import distributed, fp8, module, ops, router, tensor
from transformer_engine.pytorch.attention import DotProductAttention
from transformer_engine.pytorch.fp8 import fp8_autocast, fp8_model_init
from transformer_engine.pytorch.linears import GroupedLinear, LayerNormLinear, Linear
from transformer_engine.pytorch.norms import LayerNorm, RMSNorm
from transformer_engine.pytorch.ops import Fp8Padding, Fp8Unpadding
