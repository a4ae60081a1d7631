"""The package's version: read by the build and at run time, so it stands alone."""

__version__ = "0.1.0"
