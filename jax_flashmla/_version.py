"""The version of the package, also in pyproject.toml; the compiled extension must have the same."""

__version__ = "0.1.0"
