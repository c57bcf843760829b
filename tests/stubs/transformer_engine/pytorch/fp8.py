import contextlib


class FP8GlobalStateManager:
    enabled, recipe, weights = False, None, False

    @classmethod
    def is_fp8_enabled(cls):
        return cls.enabled


@contextlib.contextmanager
def fp8_autocast(enabled=False, calibrating=False, fp8_recipe=None, fp8_group=None, _graph=False):
    before = FP8GlobalStateManager.enabled, FP8GlobalStateManager.recipe
    FP8GlobalStateManager.enabled, FP8GlobalStateManager.recipe = enabled, fp8_recipe
    try:
        yield
    finally:
        FP8GlobalStateManager.enabled, FP8GlobalStateManager.recipe = before


@contextlib.contextmanager
def fp8_model_init(enabled=False, recipe=None, preserve_high_precision_init_val=False):
    before, FP8GlobalStateManager.weights = FP8GlobalStateManager.weights, enabled
    try:
        yield
    finally:
        FP8GlobalStateManager.weights = before
