"""How weights are ranked: one criterion per file. ``pst_ds/config/criteria.py`` finds them by name."""
