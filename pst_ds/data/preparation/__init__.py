"""Files and data sets of text, read in pieces by several processes, which make a store of tokens of them."""
