"""Names of the packed formats, for those that must not wait for torch; :data:`pst_ds.core.formats.FORMATS` has them."""

PACKINGS = ("bitmask", "2:4", "csr")
