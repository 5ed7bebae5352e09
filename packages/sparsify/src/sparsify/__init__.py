"""sparsify."""

__all__: list[str] = []
