"""The version of the package, read by the build and compared with the compiled extension."""

__version__ = "0.1.0"
