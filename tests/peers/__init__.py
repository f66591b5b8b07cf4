"""zuko's, nflows' and normflows' own test suites, plain and with ``genfast.accelerate`` applied to every model they
build."""
