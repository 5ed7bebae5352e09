"""gradstore."""

__all__: list[str] = []
