__version__ = "0.1.0"

_functions = dict(scan="scanning", attack="measuring", measure="measuring", repair="repairing", protect="protecting", verify="protecting", compare="plugins")   # name -> module

def __getattr__(name):
    "The functions for one's own model and data, loaded when they are asked for: `mcl_repro --version` has to answer at once."
    if name not in _functions: raise AttributeError(f"module 'mcl_repro' has no attribute {name!r}")
    from importlib import import_module
    return getattr(import_module(f"mcl_repro.{_functions[name]}"), name)
