"""The pretrained model as its folder has it: its own architecture, every weight of it read, none drawn anew."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pst_ds.errors import InputError, first_line
from pst_ds.nn.base_model import refuse_packed, require_model_place
from pst_ds.prune.errors import PruneError


def load_base(path: str, **options: Any) -> Any:
    """The model of transformers at ``path``, a folder or a name on the hub, on the CPU and in its own dtype.

    Its class is the first of ``architectures`` in its config, or what ``AutoModel`` takes. ``options`` go to
    ``from_pretrained``. Raises InputError when it cannot be loaded, is quantised or packed, or lacks weights.
    """
    import transformers
    from safetensors import SafetensorError

    try:
        require_model_place("model.path", path)
        config = transformers.AutoConfig.from_pretrained(path)
        refuse_packed("model.path", path, config)
        names = getattr(config, "architectures", None) or [""]
        kind = getattr(transformers, names[0], None) or transformers.AutoModel
        model, info = kind.from_pretrained(path, dtype="auto", output_loading_info=True, **options)
    except InputError:
        raise
    except (OSError, ValueError, ImportError, SafetensorError) as error:
        raise PruneError(
            f"model.path = {path!r} cannot be loaded, as a folder (looked in {Path(path).absolute()}) or from the hub: "
            f"{first_line(error)}"
        ) from error
    missing = sorted(info["missing_keys"])
    if missing:
        raise PruneError(
            f"model.path = {path!r} lacks {', '.join(missing[:4])}{' and others' if len(missing) > 4 else ''}, which a "
            f"{type(model).__name__} has: they would be random, and written as if they were pretrained. Name in "
            '"architectures" of its config.json the class that it was saved from'
        )
    return model.eval()
