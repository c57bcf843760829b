from transformer_engine.pytorch.module import base
