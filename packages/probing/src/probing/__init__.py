"""probing."""

__all__: list[str] = []
