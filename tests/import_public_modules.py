"""Imports every public module of an installed otkd; run by `make test-wheel`.

Modules of the training integrations, the studies and the command need the extra `train`. Without
it an integration must say in its ImportError what to install.
"""

import importlib
import pkgutil

import otkd

OPTIONAL = ("otkd.integrations", "otkd.study", "otkd.tasks", "otkd.cli", "otkd.fused")


def main() -> None:
    names = [module.name for module in pkgutil.walk_packages(otkd.__path__, "otkd.")]
    for name in names:
        try:
            importlib.import_module(name)
        except ImportError as error:
            told = "pip install" in str(error) or not name.startswith("otkd.integrations")
            if not name.startswith(OPTIONAL) or not told:
                raise
            print(f"{name}: {error}")
    print(f"{len(names)} modules of otkd {otkd.__version__} at {otkd.__path__[0]}")


if __name__ == "__main__":
    main()
