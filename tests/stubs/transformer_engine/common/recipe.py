class Format:
    E4M3, HYBRID = "e4m3", "hybrid"


class Recipe:
    multiple = 16

    def __init__(self, **settings):
        self.settings = settings


class DelayedScaling(Recipe): ...


class Float8CurrentScaling(Recipe): ...


class Float8BlockScaling(Recipe): ...


class MXFP8BlockScaling(Recipe):
    multiple = 32
