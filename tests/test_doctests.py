"""The examples in the package's docstrings run and print what they say."""

from __future__ import annotations

import doctest
import importlib
import pkgutil

import genfast


def test_doctests_of_the_package_run():
    tried = 0
    for info in pkgutil.walk_packages(genfast.__path__, "genfast."):
        if ".kernels" in info.name or info.name.endswith(("__main__", "_cpu", "_cuda")):
            continue
        try:
            module = importlib.import_module(info.name)
        except ModuleNotFoundError as error:
            if error.name not in ("nflows", "normflows", "zuko"):
                raise
            continue  # the integration of a peer that is not installed
        finder = doctest.DocTestFinder(exclude_empty=True)
        for test in finder.find(module, globs={}):
            if test.examples:
                failed, count = doctest.DocTestRunner(optionflags=doctest.NORMALIZE_WHITESPACE).run(test)
                tried += count
                assert failed == 0, test.name
    assert tried > 40
