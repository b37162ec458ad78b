"""``pst-ds users``: which users are scored."""

from __future__ import annotations

import argparse

import torch

from pst_ds.checkpoint.user_store import Common, UserStore
from pst_ds.cli.users import _users_to_score


def test_a_user_named_twice_is_scored_once(tmp_path):
    common = Common(
        form="beside",
        dtype="fp32",
        shapes={"layer.personal_U": [2, 1], "layer.personal_V": [1, 2]},
        base_path="base",
        base_fingerprint="",
        masks_sha256={},
        shared_sha256="",
        task="classification",
        labels=["a", "b"],
        beta=1.0,
    )
    store = UserStore.create(tmp_path / "users", common)
    for name in ("ann", "ben", "cai"):
        store.add(name, {part: torch.zeros(shape) for part, shape in common.shapes.items()})
    args = argparse.Namespace(users=["ben", "ann", "ben"], split="test", by="user", store="users")
    assert _users_to_score(args, store, {"ann", "ben"}) == ["ben", "ann"]
    args.users = []
    assert _users_to_score(args, store, {"ann", "ben"}) == ["ann", "ben"]
