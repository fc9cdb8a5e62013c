"""Recognising a Mixture-of-Experts layer without importing one."""

LAYER_CLASS_NAMES = frozenset({"MoERunnerInterface", "MoERunner"})


def is_moe_layer(module: object) -> bool:
    """Whether `module` (an object or a class) is a Mixture-of-Experts layer, judged by its inherited class names.

    Names instead of `isinstance`, so that code which the layer itself imports can ask, too (spec 0.4, vLLM pull request
    35782).
    """
    cls = module if isinstance(module, type) else type(module)
    return any(base.__name__ in LAYER_CLASS_NAMES for base in cls.__mro__)
