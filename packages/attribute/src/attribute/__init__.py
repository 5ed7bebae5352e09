"""attribute."""

__all__: list[str] = []
