"""The storage formats of pst-ds, one class per file; found by name through :mod:`pst_ds.storage_format`."""
