"""From a dataset to rows of token ids: read (sources), render and tokenise (tokenise), keep (token_file)."""

from attribute.data.sources import Source, open_source, shared_source
from attribute.data.token_file import TokenFile, TokenFileWriter
from attribute.data.tokenise import Row, rows_of

__all__ = ["Row", "Source", "TokenFile", "TokenFileWriter", "open_source", "rows_of", "shared_source"]
