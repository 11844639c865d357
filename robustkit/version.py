"""The version, told without asking what is installed: the name robustkit on PyPI is another project's."""

__version__ = "0.1.0"
