"""Prepare token stores: read files and datasets in pieces, and tokenise them in several processes."""
