"""Stores of tokens."""

from pathlib import Path

from pst_ds.cli.inspect.text import Inspection
from pst_ds.data.tokens.manifest import BYTES, LEARNED, read_manifest


def token_store(path: Path) -> Inspection:
    """Describe a store by its manifest. Raises InputError for one that is not whole."""
    manifest = read_manifest(path)
    facts = {
        "tokens": manifest.tokens,
        "documents": manifest.documents,
        "text_bytes": manifest.text_bytes,
        "dtype": manifest.tokenizer.dtype.name,
        "vocabulary": manifest.tokenizer.vocabulary,
        "shards": len(manifest.shards),
        "counts_bytes": BYTES in manifest.has,
        "masks_tokens": LEARNED in manifest.has,
        "digest": manifest.digest,
        "tokenizer_sha256": manifest.tokenizer.sha256,
        "sources": manifest.source.get("sources"),
    }
    return Inspection(f"{path}: a store of tokens", facts, [])
