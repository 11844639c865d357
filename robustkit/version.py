"""The version, without reading installed packages: the name robustkit on PyPI is another project's."""

__version__ = "0.1.0"
