"""Index kinds, one class per kind, over FAISS.

Importing the package loads all its modules, so that each kind registers itself. Only these modules import FAISS.
"""

from importlib import import_module
from pkgutil import iter_modules

for _module in iter_modules(__path__):
    import_module(f"{__name__}.{_module.name}")
