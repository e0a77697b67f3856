"""pyarrow, or an error that says how to install it."""

from moe_posterior.errors import MissingDependencyError

try:
    import pyarrow
    import pyarrow.parquet as parquet
except ModuleNotFoundError as error:
    raise MissingDependencyError("pyarrow", "audit") from error

__all__ = ["parquet", "pyarrow"]
