class CudaRNGStatesTracker: ...


def activation_recompute_forward(*_, **__):
    raise NotImplementedError


def checkpoint(*_, **__):
    raise NotImplementedError


def get_all_rng_states():
    return {}
