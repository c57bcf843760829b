from torch import nn


class FusibleOperation(nn.Module): ...


class Sequential(nn.Sequential): ...


class Fp8Padding(nn.Module):
    def __init__(self, num_gemms): ...


class Fp8Unpadding(nn.Module):
    def __init__(self, num_gemms): ...
