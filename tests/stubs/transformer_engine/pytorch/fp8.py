import contextlib


class FP8GlobalStateManager:
    @staticmethod
    def is_fp8_enabled():
        return False


def fp8_autocast(enabled=False, calibrating=False, fp8_recipe=None, fp8_group=None, _graph=False):
    assert not enabled, "this stand-in has no FP8"
    return contextlib.nullcontext()


def fp8_model_init(enabled=False, recipe=None, preserve_high_precision_init_val=False):
    assert not enabled, "this stand-in has no FP8"
    return contextlib.nullcontext()
