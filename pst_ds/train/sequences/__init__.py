"""Which tokens of a micro-batch see each other: documents apart in one row, and rows that ranks share."""
