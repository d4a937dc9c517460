__version__ = "0.1.0"

_FUNCTIONS = {          # what one needs for a model and data of one's own -> module
    "scan": "tools.scanning",
    "attack": "tools.measuring",
    "measure": "tools.measuring",
    "repair": "tools.repairing",
    "protect": "tools.protecting",
    "verify": "tools.protecting",
    "compare": "tools.plugins",
}

def __getattr__(name):
    "The functions for one's own model and data, loaded when they are asked for: `mcl_repro --version` answers at once."
    if name not in _FUNCTIONS:
        raise AttributeError(f"module 'mcl_repro' has no attribute {name!r}")
    from importlib import import_module
    return getattr(import_module(f"mcl_repro.{_FUNCTIONS[name]}"), name)

def __dir__():
    return sorted([*globals(), *_FUNCTIONS])
