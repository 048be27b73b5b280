"""The naive implementation that `paged` is checked against."""
