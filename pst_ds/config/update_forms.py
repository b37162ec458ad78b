"""The update forms by the name that ``pst.update_form`` gives, including those of other packages."""

from typing import TYPE_CHECKING

from pst_ds.plugins import Registry

if TYPE_CHECKING:  # forms import torch, and run files are checked without it
    from pst_ds.core.forms.form import UpdateForm

LOW_RANK = "low-rank"
"""The form of a run file that names none."""
BESIDE = "beside"
"""The form whose U V is not masked, and stays apart from the weight."""
UPDATE_FORMS: "Registry[type[UpdateForm]]" = Registry(
    "pst_ds.update_forms",
    "update form",
    {
        LOW_RANK: "pst_ds.core.forms.low_rank:LowRank",
        "spp": "pst_ds.core.forms.spp:SPP",
        BESIDE: "pst_ds.core.forms.beside:Beside",
        "learned-ranks": "pst_ds.core.forms.learned_ranks:LearnedRanks",
    },
)


def only_low_rank(use: str, form: str) -> str:
    """Return the message that ``use`` needs the update U V, and not that of the form called ``form``."""
    return f'{use} needs the update U V, and pst.update_form = "{form}" is another. Set pst.update_form = "{LOW_RANK}"'


def update_form(name: str) -> "UpdateForm":
    """Return the form called ``name``. Raises InputError for one that is unknown or cannot be imported."""
    return UPDATE_FORMS.get(name)()
