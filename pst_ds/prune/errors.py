"""What stops one-shot pruning and is the user's to mend."""

from pst_ds.errors import InputError


class PruneError(InputError):
    """A model, or a setting of ``pst-ds prune``, that cannot be pruned so; the message names the layer and the fix."""
